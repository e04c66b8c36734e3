"""Opens a source of pictures through the `datasets` library, and decodes its pictures once."""

import contextlib
import hashlib
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from lipcert.errors import LipcertError
from lipcert.files import write_atomically

if TYPE_CHECKING:
    import datasets

DIGITS = "digits"
"""The source name of the data set that ships with the package: 8x8 digits, 1437 + 360."""

LAYOUT = (
    "train-*.parquet and test-*.parquet as on the Hugging Face hub (columns image and label), "
    "or pictures as train/CLASS/x.png and test/CLASS/x.png"
)
"""What a data folder holds, for error messages."""

_HUB_ID = r"(\w[\w.-]*/[\w.-]+)(?::([\w.-]+))?"  # owner/name, or owner/name:configuration
_DIGITS_FOLDER = Path(__file__).parent / "digits"
_DECODING = 1  # part of the cache key: raise it whenever _decode gives other pixels than before


def read_splits(source: str | Path) -> "dict[str, datasets.Dataset]":
    """Opens every split of a source through the `datasets` library.

    Args:
        source: `DIGITS`, a local folder, or a hub id, which `:NAME` may follow to choose one of
            several configurations; see `lipcert.data.load`.

    Returns:
        The splits by the names that the source gives them, their pictures not yet decoded.

    Raises:
        LipcertError: the source cannot be found, reached or read.
    """
    import datasets

    folder = _DIGITS_FOLDER if source == DIGITS else Path(source).expanduser()
    local = folder.is_dir()
    hub = re.fullmatch(_HUB_ID, source) if isinstance(source, str) else None
    if source == "" or (not local and (folder.exists() or hub is None)):
        raise LipcertError(
            f"data: {'not a folder' if folder.exists() else 'no folder'} {str(source)!r}; give "
            f"--data a folder that holds {LAYOUT}; or a hub id such as ylecun/mnist; or digits"
        )
    try:
        with _quietly():
            place = hub.groups() if hub and not local else (str(folder.resolve()),)
            builder = datasets.load_dataset_builder(*place)
            if local:
                _refuse_several_folders(folder, builder.config.data_files)
            builder.download_and_prepare()
            return {
                name: builder.as_dataset(split=name)
                if info.num_examples
                else datasets.Dataset.from_dict(  # as_dataset refuses a split without rows
                    {column: [] for column in builder.info.features},
                    features=builder.info.features,
                )
                for name, info in builder.info.splits.items()
            }
    except LipcertError:
        raise
    except Exception as error:  # from five packages, without a common base class
        reason = f"{type(error).__name__}: {error.__cause__ or error}"
        if local and (broken := _first_broken_file(folder)):
            message = f"data file {broken}: fetch it again"
        elif local:
            message = (
                f"data folder {str(folder)!r} cannot be read ({reason}). It must hold {LAYOUT}; "
                f"and the cache folder {str(datasets.config.HF_DATASETS_CACHE)!r} must be writable "
                "(HF_HOME moves it)"
            )
        else:
            message = (
                f"data: no folder {str(source)!r} here, and it could not be read from the Hugging "
                f"Face hub ({reason}). Give a local folder instead: --data DIR, where DIR holds "
                f"{LAYOUT}"
            )
        raise LipcertError(message) from error


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Turns off progress bars and log lines of `datasets`, and restores both settings.

    The library has these switches for the whole process only; other threads see them meanwhile.
    """
    import datasets

    verbosity = datasets.logging.get_verbosity()
    bars = datasets.config.HF_DATASETS_DISABLE_PROGRESS_BARS is None  # else the user's word stands
    bars = bars and not datasets.are_progress_bars_disabled()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    if bars:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if bars:
            datasets.enable_progress_bars()


def _refuse_several_folders(folder: Path, data_files: "datasets.data_files.DataFilesDict") -> None:
    """Refuses a folder of several data sets, which the library would join without a word."""
    for split, files in data_files.items():
        places = sorted({str(Path(file).parent) for file in files if file.endswith(".parquet")})
        if len(places) > 1:
            raise LipcertError(
                f"data folder {str(folder)!r} holds parquet files of the split {str(split)!r} in "
                f"several folders: {', '.join(places)}; give --data one of them"
            )


def _first_broken_file(folder: Path) -> str | None:
    """Finds the parquet file that cannot be read to its end, with the reason."""
    import pyarrow
    from pyarrow import parquet

    for path in sorted(folder.rglob("*.parquet")):
        try:
            with parquet.ParquetFile(path) as file:
                for _ in file.iter_batches():
                    pass
        except (pyarrow.ArrowException, OSError) as error:
            return f"{path} cannot be read ({error})"
    return None


def decoded_images(data: "datasets.Dataset", column: str, where: str) -> UInt8[Tensor, "n c h w"]:
    """Decodes the pictures of a split, or takes them from the cache of an earlier call.

    Args:
        data: the split.
        column: the column of pictures.
        where: names the split in messages.

    Returns:
        The bytes of all pictures, one channel if every picture is grey, else RGB.

    Raises:
        LipcertError: the column holds no pictures, or they are damaged, differ in size, or have
            more than 8 bits a channel.
    """
    import datasets
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save

    key = hashlib.sha256(f"{_DECODING}/{data._fingerprint}/{column}".encode()).hexdigest()[:32]
    file = Path(datasets.config.HF_DATASETS_CACHE) / "lipcert-decoded" / f"{key}.safetensors"
    with contextlib.suppress(OSError, SafetensorError, KeyError):  # absent or damaged: made anew
        images = load_file(file)["images"]
        if images.dtype == torch.uint8 and images.ndim == 4 and len(images) == data.num_rows:
            return images
    images = torch.from_numpy(_decode(data, column, where))
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, save({"images": images}))
    except OSError as error:
        warnings.warn(f"decoded pictures were not kept for the next call: {error}", stacklevel=3)
    return images


def _decode(data: "datasets.Dataset", column: str, where: str) -> UInt8[np.ndarray, "n c h w"]:
    """Decodes every picture of a column; grey as long as all are grey, else RGB."""
    import datasets

    try:
        encoded = data.select_columns(column).cast_column(column, datasets.Image(decode=False))
    except Exception as error:  # TypeError, ArrowInvalid, ArrowNotImplementedError ...
        raise LipcertError(
            f"{where}: the column {column!r} holds {data.features[column]}, not pictures; name "
            "the column of pictures image, or choose it in Python: lc.data.load(..., image_column=)"
        ) from error
    decoder = datasets.Image()
    pixels = np.empty((0, 1, 0, 0), np.uint8)
    pictures = (value for batch in encoded.iter(512) for value in batch[column])
    for row, value in enumerate(pictures):
        try:
            if value is None:
                raise ValueError("there is none")
            picture = decoder.decode_example(value)
        except Exception as error:  # a decoder fails in its own way, by format
            file = f" ({value['path']})" if value and value["path"] else ""
            raise LipcertError(
                f"{where}: the picture in row {row}{file} is unreadable: {error}; mend or remove it"
            ) from error
        if picture.mode.startswith(("I", "F")):
            raise LipcertError(
                f"{where}: the picture in row {row} has pixels of mode {picture.mode}; save the "
                "pictures with 8 bits a channel"
            )
        width, height = picture.size
        grey = picture.mode in ("1", "L")
        if row == 0:
            pixels = np.empty((data.num_rows, 1 if grey else 3, height, width), np.uint8)
        if (height, width) != pixels.shape[2:]:
            raise LipcertError(
                f"{where}: the picture in row {row} is {height} x {width} pixels, those before it "
                f"{pixels.shape[2]} x {pixels.shape[3]}; scale or crop all to one size"
            )
        if pixels.shape[1] == 1 and not grey:
            pixels = np.broadcast_to(pixels, (data.num_rows, 3, height, width)).copy()
        channels = pixels.shape[1]
        array = np.asarray(picture.convert("L" if channels == 1 else "RGB"))
        pixels[row] = array.reshape(height, width, channels).transpose(2, 0, 1)
    return pixels
