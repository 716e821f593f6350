"""Time the training step of this checkout and of another one, by turns in one run.

    git worktree add ../before b9c0967
    python -m benchmarks.speed.versions --before ../before

Each row takes ten steps before and ten after, then the next row does. The ratio is the median of the turns' ratios, and
its error comes from their quartiles: a slow minute of a shared machine affects both.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from benchmarks.harness.common import RESULTS, ROOT, machine_kind, save
from benchmarks.harness.peers import launch
from pyro_vae.report.markdown import markdown_table


@dataclass(frozen=True)
class Options:
    """Time two checkouts."""

    before: Path
    """Root of the other checkout."""
    rounds: int = 40
    """Turns of each row."""
    threads: int = 1
    """Threads of torch."""
    results: Path = RESULTS
    """Folder for the results. Give another one for a trial, or the saved figures are replaced."""


def main(options: Options) -> None:
    """Time, print and save."""
    started = time.perf_counter()
    with ExitStack() as stack:
        roots = {"before": options.before.resolve(), "after": ROOT}
        runs = {when: stack.enter_context(_started(root, options.threads)) for when, root in roots.items()}
        said = {when: json.loads(_line(run)) for when, run in runs.items()}
        for when, root in roots.items():
            if not Path(said[when]["package"]).is_relative_to(root):
                raise SystemExit(f"timed {said[when]['package']}, not the package of {root}")
        taken: dict[str, dict[str, list[float]]] = {name: {"before": [], "after": []} for name in said["after"]["rows"]}
        for i in range(options.rounds):
            for name, seconds in taken.items():
                # Neither always goes first.
                for when in sorted(runs, reverse=i % 2 == 0):
                    seconds[when].append(statistics.median(_turn(runs[when], name)))
        for run in runs.values():
            run.kill()
    rows = {name: _summary(seconds) for name, seconds in taken.items()}
    cells = [
        [name, f"{row['before_ms']:.3f}", f"{row['after_ms']:.3f}", f"{row['ratio']:.3f} ± {row['error']:.3f}"]
        for name, row in rows.items()
    ]
    print(markdown_table(["step", "before, ms", "after, ms", "after ÷ before"], cells))
    results = {
        "threads": options.threads,
        "versions": {when: each["version"] for when, each in said.items()},
        "rows": rows,
    }
    print(f"saved in {save('versions', results, started, options.results / machine_kind(options.threads))}")


def _started(root: Path, threads: int) -> subprocess.Popen[str]:
    script = Path(__file__).with_name("step_run.py")
    # The checkout's package comes first on the path, before an installed one.
    environment = launch.environment(threads) | {"PYTHONPATH": str(root)}
    command = [sys.executable, str(script), str(threads)]
    return subprocess.Popen(
        command, cwd=root, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def _turn(run: subprocess.Popen[str], name: str) -> list[float]:
    assert run.stdin is not None
    run.stdin.write(json.dumps(name) + "\n")
    run.stdin.flush()
    seconds: list[float] = json.loads(_line(run))
    return seconds


def _line(run: subprocess.Popen[str]) -> str:
    assert run.stdout is not None
    line = run.stdout.readline()
    if not line:
        raise SystemExit("a checkout's process ended: its reason is above")
    return line


def _summary(seconds: dict[str, list[float]]) -> dict[str, Any]:
    ratios = [after / before for before, after in zip(seconds["before"], seconds["after"], strict=True)]
    # The standard error of a median of n nearly normal numbers, from their quartiles.
    low, _, high = statistics.quantiles(ratios, n=4)
    error = 1.2533 * (high - low) / 1.349 / len(ratios) ** 0.5
    medians = {f"{when}_ms": round(1000 * statistics.median(each), 4) for when, each in seconds.items()}
    return medians | {"ratio": round(statistics.median(ratios), 4), "error": round(error, 4), "turns": len(ratios)}


if __name__ == "__main__":
    main(tyro.cli(Options))
