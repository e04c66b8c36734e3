"""The progress bar of the command line."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


@contextmanager
def progress(what: str, total: int | None = None) -> Iterator[Any]:
    """A bar on stderr with time left; gives a function of the amount done.

    Where stderr is no terminal there is no bar, but a line for each new note.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    console, last = Console(stderr=True), ""
    silent = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=silent) as bar:
        task = bar.add_task(what, total=total)

        def advance(done: int, of: int | None = None, note: str = "") -> None:
            nonlocal last
            bar.update(task, completed=done, total=of or total, description=f"{what} {note}")
            if silent and note != last:
                sys.stderr.write(f"{what} {note}\n")
                last = note

        yield advance
