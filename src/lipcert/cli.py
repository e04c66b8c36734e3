"""The command line: seven verbs over run directories.

Commands import torch inside, so that `--help` is quick. Results go to stdout, progress to stderr.
"""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

import lipcert
from lipcert.errors import LipcertError

app = typer.Typer(
    name="lipcert",
    help="Train classifiers whose robustness can be proved, and prove it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

RunDirectory = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]
Data = Annotated[
    str | None, typer.Option(metavar="DIR|HUB_ID", help="Folder or hub id with the data.")
]
Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, mps.")]
BatchSize = Annotated[int | None, typer.Option(help="Samples at a time.", min=1)]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Eps = Annotated[
    list[str] | None, typer.Option(metavar="RADIUS", help="L2 radius, e.g. 36/255; repeatable.")
]
_NAMES = (
    "auto (the tightest of product, liplt and ellipsoid where cheap), product, liplt, ellipsoid, "
    "eclipse, multipliers (a search), tight (all of these); around each sample too: local-product, "
    "local-liplt, local-ellipsoid."
)
Bound = Annotated[str, typer.Option(help=f"Which bound: {_NAMES}")]


def _version(wanted: bool | None) -> None:
    if wanted:
        typer.echo(f"lipcert {lipcert.__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool | None, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")
    ] = None,
) -> None:
    pass


@app.command()
def demo(out: Annotated[Path, typer.Option(help="Where the run goes.")] = Path("demo")) -> None:
    """Digits end to end, in under a minute: train, bound, certify, attack, report."""
    from lipcert import commands

    commands.demo(out)


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="A recipe, for its details.")] = None,
    as_json: Json = False,
) -> None:
    """List the recipes, or show one with its published numbers and their source."""
    from lipcert import commands

    commands.show_recipes(name, as_json)


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="Name of a recipe: see `lipcert recipes`.")],
    data: Data = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Run directory [runs/RECIPE].")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Change the recipe; repeatable."),
    ] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the last checkpoint.")] = False,
    seed: Annotated[int | None, typer.Option(help="Same as --set seed=...", min=0)] = None,
    batch_size: BatchSize = None,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Train a recipe into a run directory; interrupted runs go on with --resume."""
    from lipcert import commands

    changes: dict[str, Any] = {}
    for text in settings or []:
        field, separator, value = text.partition("=")
        if not separator:
            raise LipcertError(f"--set {text!r}: write field=value, e.g. --set epochs=15.")
        changes[field.strip()] = value.strip()
    plain = {"data": data, "seed": seed, "batch_size": batch_size}
    changes |= {field: value for field, value in plain.items() if value is not None}
    commands.train(recipe, changes, out or Path("runs") / recipe, resume, device, as_json)


@app.command()
def bound(
    target: Annotated[
        str, typer.Argument(metavar="RUN|MODULE:FUNCTION", help="A run, or what makes a network.")
    ],
    weights: Annotated[
        Path | None, typer.Option(help="Safetensors file for MODULE:FUNCTION.")
    ] = None,
    input_shape: Annotated[
        str | None, typer.Option(metavar="C,H,W", help="One sample's shape, for MODULE:FUNCTION.")
    ] = None,
    bounds: Annotated[
        list[str] | None,
        typer.Option("--bound", help=f"Which; repeatable [those of auto]: {_NAMES}"),
    ] = None,
    eps: Annotated[
        str | None,
        typer.Option(
            metavar="RADIUS", help="L2 balls of local bounds [the recipe's first radius]."
        ),
    ] = None,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Table of Lipschitz bounds: constants, kind, time, and which layer is loose."""
    from lipcert import commands

    commands.bound(target, weights, input_shape, bounds or [], eps, device, as_json)


@app.command()
def certify(
    run: RunDirectory,
    eps: Eps = None,
    bound: Bound = "auto",
    data: Data = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.parquet", help="One row a sample, also here.")
    ] = None,
    batch_size: BatchSize = None,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Certify every test sample: one row each, and the summary."""
    from lipcert import commands

    commands.certify(run, eps or [], bound, data, out, batch_size, device, as_json)


@app.command()
def attack(
    run: RunDirectory,
    eps: Eps = None,
    attack: Annotated[
        str | None, typer.Option(help="pgd, deepfool, cw or autoattack [pgd].")
    ] = None,
    inequality: Annotated[
        bool, typer.Option("--inequality", help="Radii side by side: certified, sampled, attacked.")
    ] = False,
    steps: Annotated[int, typer.Option(help="Steps of the attack.", min=1)] = 50,
    restarts: Annotated[int, typer.Option(help="Starts a sample (pgd).", min=1)] = 5,
    samples: Annotated[
        int | None, typer.Option(help="Only the first so many samples.", min=1)
    ] = None,
    data: Data = None,
    seed: Annotated[int, typer.Option(help="Of the random starts.", min=0)] = 0,
    batch_size: BatchSize = None,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Attack at the radii given; without --eps inside every certified ball, where it must fail."""
    from lipcert import attack_command, attacking

    effort = attacking.Effort(steps, restarts, samples, seed, batch_size or 512)
    attack_command.attack(run, eps or [], attack, inequality, effort, data, device, as_json)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories.")],
    out: Annotated[Path | None, typer.Option(metavar="FILE.html", help="[RUN/report.html]")] = None,
) -> None:
    """One self-contained page: curve, tables, attack, sample images."""
    from lipcert import commands

    commands.report(runs, out)


def main() -> None:
    """Entry point: bad input ends with a message and exit code 2, an interrupt with 130."""
    try:
        app()
    except LipcertError as error:
        _fail(str(error), 2)
    except OSError as error:  # a full disk, a folder without rights
        _fail(f"{error.filename or 'file'}: {error.strerror or error}", 2)
    except KeyboardInterrupt:
        _fail("interrupted", 130)


def _fail(message: str, status: int) -> None:
    print(f"lipcert: {message}", file=sys.stderr)
    sys.exit(status)
