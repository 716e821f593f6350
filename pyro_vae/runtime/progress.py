"""The terminal: one console for results, one for progress and errors, and the progress bar of every long call."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

import rich.progress
from rich.console import Console

__all__ = ["Progress", "console", "error_console", "progress_bar"]

# True draws a bar and False none; a function is called with the number of data done and their total.
Progress: TypeAlias = bool | Callable[[int, int], None]
# Calls that end within this many seconds draw no bar.
DELAY = 1.0
#: Standard output, for results.
console = Console()
#: Standard error, for progress bars and error messages.
error_console = Console(stderr=True)


@contextmanager
def progress_bar(progress: Progress, description: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show progress towards ``total``, and yield a function to call with the number done.

    >>> with progress_bar(lambda done, total: print(f"{done} of {total}"), "counting", 2) as update:
    ...     update(1)
    1 of 2
    """
    if not isinstance(progress, bool):
        yield lambda done: progress(done, total)
        return
    columns = (*rich.progress.Progress.get_default_columns(), rich.progress.TimeElapsedColumn())
    bar = rich.progress.Progress(*columns, disable=not progress, console=error_console)
    task, begun, drawn = bar.add_task(description, total=total), time.monotonic(), False

    def update(done: int) -> None:
        nonlocal drawn
        bar.update(task, completed=done)
        if progress and not drawn and time.monotonic() - begun >= DELAY:
            drawn = True
            bar.start()

    try:
        yield update
    finally:
        if drawn:
            bar.stop()
