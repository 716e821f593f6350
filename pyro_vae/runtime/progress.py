"""A progress bar on the terminal, or a caller's own function, for what takes long."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

import rich.progress
from rich.console import Console

__all__ = ["Progress", "progress_bar"]

# Whether to draw a bar; or a function to call with what is done and what is to do, in data.
Progress: TypeAlias = bool | Callable[[int, int], None]
# What is done within so many seconds draws no bar.
DELAY = 1.0


@contextmanager
def progress_bar(progress: Progress, description: str, total: int) -> Iterator[Callable[[int], None]]:
    """Give a function to call with how much is done.

    >>> with progress_bar(lambda done, total: print(f"{done} of {total}"), "counting", 2) as update:
    ...     update(1)
    1 of 2
    """
    if not isinstance(progress, bool):
        yield lambda done: progress(done, total)
        return
    columns = (*rich.progress.Progress.get_default_columns(), rich.progress.TimeElapsedColumn())
    bar = rich.progress.Progress(*columns, disable=not progress, console=Console(stderr=True))
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
