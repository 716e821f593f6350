"""Time ``fit`` from its call to its first step, and ``log_likelihood`` to the end of its first chunk.

    python -m benchmarks.speed.start
    python -m benchmarks.speed.start --root ../before --row before

Also count how often the pair's programs run until then. The second line measures another checkout, e.g. a
``git worktree`` of an older commit. Times are medians of five calls after a first one that is not counted. Rows are
saved next to the rows that are there: compare rows measured on one machine.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

from benchmarks.harness.common import RESULTS, ROOT, save
from benchmarks.harness.peers import launch
from pyro_vae.runtime.files import read_json


@dataclass(frozen=True)
class Options:
    """Time one checkout."""

    root: Path = ROOT
    """Root of the checkout."""
    row: str = "after"
    """Name of the row. A row of this name is replaced."""
    threads: int = 1
    """Threads of torch."""
    results: Path = RESULTS
    """Folder for the results. Give another one for a trial, or the saved figures are replaced."""


def main(options: Options) -> None:
    """Time in a process of the checkout, print and save."""
    started = time.perf_counter()
    script = Path(__file__).with_name("start_run.py")
    # The checkout's package comes first on the path, before an installed one.
    environment = launch.environment(options.threads) | {"PYTHONPATH": str(options.root.resolve())}
    done = subprocess.run(
        [sys.executable, str(script), str(options.threads)],
        cwd=options.root,
        env=environment,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    if not Path(found["package"]).is_relative_to(options.root.resolve()):
        raise SystemExit(f"timed {found['package']}, not the package of {options.root}{os.sep}")
    print(json.dumps(found["cases"], indent=2, ensure_ascii=False))
    path = options.results / "start.json"
    rows = read_json(path)["results"]["rows"] if path.exists() else {}
    results = {"threads": options.threads, "rows": rows | {options.row: found["cases"]}}
    print(f"saved in {save('start', results, started, options.results)}")


if __name__ == "__main__":
    main(tyro.cli(Options))
