"""Writing files so that a reader sees the old content or the new, never a part of it."""

import os
from pathlib import Path
from uuid import uuid4


def write_atomically(path: Path, data: bytes | str) -> None:
    """Writes a file in one step, as seen by any reader and after any interruption.

    The content goes to a temporary file beside `path`, reaches the disk, and then takes the
    place of `path`. Any failure on the way, an interrupt from the keyboard included, leaves the
    old file as it was and removes the temporary one.

    Args:
        path: the file to write; its folder must exist.
        data: the whole content; text is written as UTF-8, its line ends untouched.

    Raises:
        OSError: the folder is missing or not writable, or the disk is full.
    """
    temporary = path.parent / f".{uuid4().hex}.tmp"
    try:
        with temporary.open("xb") as stream:
            stream.write(data.encode() if isinstance(data, str) else data)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
