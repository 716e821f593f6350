"""Run published figures again, and keep what came out beside what was published.

    python benchmarks/reproduce.py static_mnist_vae iwae

A row is a module of ``benchmarks/reproductions``. What it returns is kept in ``benchmarks/results``;
``benchmarks/render.py`` then writes ``docs/results.md``.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import reproductions
import tyro
from common import RESULTS, TAKEN_UP, keep


@dataclass(frozen=True)
class Options:
    """Run rows by name, one after the other."""

    names: tyro.conf.Positional[tuple[str, ...]]
    """Rows to run, by the names of their modules."""
    scale: float = 1.0
    """Multiplies the number of epochs of each row's own schedule."""
    data_root: str | None = None
    """Folder of the data sets."""
    results: Path = RESULTS
    """Folder for the results; give another one for a trial, which would replace the kept figures."""


def main(options: Options) -> None:
    """Run each row, keep its results and print its table."""
    if options.scale <= 0:
        raise SystemExit(f"scale is {options.scale}; it multiplies the epochs and must be positive")
    if not options.names:
        raise SystemExit(f"name the rows to run: {', '.join(reproductions.names())}")
    # All names are looked up before the first row trains.
    rows = {name: reproductions.row(name) for name in options.names}
    for name, row in rows.items():
        TAKEN_UP.clear()
        started = time.perf_counter()
        results = row.run(options.scale, options.data_root)
        path = keep(f"reproduce_{name}", results, started, options.results)
        print(f"\n{row.TITLE}\n\n{row.table(json.loads(path.read_text(encoding='utf-8')))}\n\nkept in {path}")


if __name__ == "__main__":
    main(tyro.cli(Options))
