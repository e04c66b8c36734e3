"""A run directory: what it holds, and reading it back.

recipe.json             recipe name, plain settings, versions
metrics.jsonl           one line an epoch
checkpoint.safetensors  everything that resuming needs, in one file
model.safetensors       the trained weights, with
config.json             how to build the network (the hub's layout)
certificates.parquet    one row a test sample
bound.json              the bound, layer by layer
summary.json            the result
attack.json             what the attacks found
inequality.parquet      certified, sampled and attacked radii of each test sample
locality.json           what a local bound gains, part by part, with
locality.parquet        one row a test sample
report.html             all of it on one page
"""

import hashlib
import json
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

import lipcert
from lipcert import recipes
from lipcert.errors import LipcertError
from lipcert.files import write_atomically
from lipcert.recipe import Recipe, override, settings


@dataclass(frozen=True)
class Run:
    """A run directory with its recipe."""

    folder: Path
    recipe: Recipe

    def path(self, name: str) -> Path:
        """A file of the directory."""
        return self.folder / name

    def weights_sha256(self) -> str | None:
        """The SHA-256 of model.safetensors, by which results name the weights that they are of.

        None without that file.
        """
        path = self.path("model.safetensors")
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None

    def write_json(self, name: str, content: Any) -> None:
        """Writes a JSON file in one step."""
        write_atomically(self.path(name), json.dumps(content, indent=2) + "\n")

    def read_json(self, name: str, made_by: str) -> Any:
        """Reads a JSON file.

        Args:
            name: Which one.
            made_by: The command that makes it, for the message when it is missing.

        Raises:
            LipcertError: It is missing or broken.
        """
        return _read_json(self.path(name), made_by)


def versions() -> dict[str, str]:
    """What the numbers of a run depend on besides its recipe."""
    return {
        "lipcert": lipcert.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.processor() or platform.machine()}, {_device_name()}",
        "threads": str(torch.get_num_threads()),
    }


def _device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def create(folder: Path, recipe: Recipe) -> Run:
    """Starts a run directory.

    Raises:
        LipcertError: The folder holds a run already, or cannot be made.
    """
    if (folder / "recipe.json").exists():
        raise LipcertError(
            f"{folder} holds a run already. Go on with --resume, or choose another --out."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LipcertError(f"Cannot make the folder {folder}: {error.strerror}.") from None
    run = Run(folder, recipe)
    content = {"recipe": recipe.name, "settings": settings(recipe), "versions": versions()}
    run.write_json("recipe.json", content)
    return run


FILES = (
    *("recipe.json", "metrics.jsonl", "checkpoint.safetensors", "model.safetensors", "config.json"),
    *("certificates.parquet", "bound.json", "summary.json", "attack.json", "report.html"),
    *("inequality.parquet", "locality.json", "locality.parquet"),
)


def remove(folder: Path, recipe_name: str) -> None:
    """Removes the files of an earlier run of this recipe, and nothing else.

    Raises:
        LipcertError: The folder holds a run of another recipe.
    """
    if not (folder / "recipe.json").exists():
        return
    if (found := open_run(folder).recipe.name) != recipe_name:
        raise LipcertError(f"{folder} holds a run of {found}; choose another --out.")
    for name in reversed(FILES):  # recipe.json last: it marks the folder as a run
        (folder / name).unlink(missing_ok=True)


def open_run(folder: Path) -> Run:
    """Opens a run directory.

    Raises:
        LipcertError: It does not exist or holds no run.
    """
    if not folder.is_dir():
        own = "Networks of your own are certified in Python: lc.certify."
        raise LipcertError(
            f"There is no run directory {folder}. "
            + (own if ":" in str(folder) else "Make one: lipcert train RECIPE.")
        )
    content = _read_json(folder / "recipe.json", "lipcert train")
    try:
        recipe = override(recipes.get(content["recipe"]), content["settings"])
    except (KeyError, TypeError):
        raise LipcertError(f"{folder}/recipe.json is not a recipe of this library.") from None
    return Run(folder, recipe)


def _read_json(path: Path, made_by: str) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise LipcertError(f"{path} is missing. It is made by: {made_by}.") from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise LipcertError(f"{path} is not valid JSON. Make it again: {made_by}.") from None


def save_model(run: Run, net: nn.Module, in_shape: tuple[int, ...], classes: tuple[str, ...]):
    """Writes the weights and how to build the network again, in the hub's layout."""
    tensors = {name: t.detach().cpu().contiguous() for name, t in net.state_dict().items()}
    write_atomically(run.path("model.safetensors"), save(tensors))
    config = {
        "library_name": "lipcert",
        "recipe": run.recipe.name,
        "in_shape": list(in_shape),
        "classes": list(classes),
    }
    run.write_json("config.json", config)


def load_model(run: Run) -> tuple[nn.Module, dict[str, Any]]:
    """The trained network in eval mode, and its config.

    Raises:
        LipcertError: The run is not finished, or its files are broken.
    """
    made_by = f"lipcert train {run.recipe.name} --out {run.folder} --resume"
    config = run.read_json("config.json", made_by)
    net = run.recipe.model(in_shape=tuple(config["in_shape"]), classes=len(config["classes"]))
    load_weights(net, run.path("model.safetensors"))
    return net.eval(), config


def load_weights(net: nn.Module, path: Path) -> None:
    """Loads a safetensors file into a network.

    Raises:
        LipcertError: The file is missing, broken, or of another network.
    """
    try:
        net.load_state_dict(load_file(path))
    except FileNotFoundError:
        raise LipcertError(f"There is no weights file {path}.") from None
    except (SafetensorError, OSError) as error:
        raise LipcertError(
            f"{path} is not a readable safetensors file: {error}. To make one of weights in "
            "another format: safetensors.torch.save_file(net.state_dict(), path)."
        ) from None
    except RuntimeError as error:
        raise LipcertError(f"{path} does not fit the network: {_one_line(error)}") from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
