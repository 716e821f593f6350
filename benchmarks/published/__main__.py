"""Run published figures again and save the results.

    python -m benchmarks.published static_mnist_vae iwae

Each name is a module of this folder. Results go to ``benchmarks/results``. Then run ``python -m benchmarks.render``,
which writes ``docs/results.md``.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

from benchmarks import published
from benchmarks.harness.common import RESULTS, TAKEN_UP, save


@dataclass(frozen=True)
class Options:
    """Run rows by name, one after the other."""

    names: tyro.conf.Positional[tuple[str, ...]]
    """Rows to run, by the names of their modules."""
    scale: float = 1.0
    """Multiplies the number of epochs of each row."""
    data_root: str | None = None
    """Folder of the data sets."""
    results: Path = RESULTS
    """Folder for the results. Give another one for a trial, or the saved figures are replaced."""


def main(options: Options) -> None:
    """Run each row, keep its results and print its table."""
    if options.scale <= 0:
        raise SystemExit(f"scale is {options.scale}; it multiplies the epochs and must be positive")
    if not options.names:
        raise SystemExit(f"name the rows to run: {', '.join(published.names())}")
    # All names are looked up before the first row trains.
    rows = {name: published.row(name) for name in options.names}
    for name, row in rows.items():
        TAKEN_UP.clear()
        started = time.perf_counter()
        results = row.run(options.scale, options.data_root)
        path = save(f"reproduce_{name}", results, started, options.results)
        print(f"\n{row.TITLE}\n\n{row.table(json.loads(path.read_text(encoding='utf-8')))}\n\nsaved in {path}")


if __name__ == "__main__":
    main(tyro.cli(Options))
