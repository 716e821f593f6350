"""Time ``fit`` and an evaluation in one, two and four processes on one machine.

    python -m benchmarks.speed.scaling

The 784–400–20 VAE trains on 60 000 binary images, captured and compiled, in one process with batches of 128, and under
torchrun in several, with as many data per step together (the same steps, shared out) or each (fewer steps). The
log-likelihoods are shared out by data. On a CPU every process has one thread and so one core; one process with as many
threads is what they compete with. On CUDA every process has a device. Launches take turns; read the ratios.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import tyro

from benchmarks.harness import steps
from benchmarks.harness.common import RESULTS, save_timings
from benchmarks.harness.peers import launch
from benchmarks.harness.side_by_side import bars, by_turns, summaries, table

COUNTS = (1, 2, 4)
DATA, EVALUATED, NUM_PARTICLES = 60_000, 1000, 100
ONE = "1 process"


@dataclass(frozen=True)
class Options:
    """Time every number of processes that the machine has cores, or devices, for."""

    rounds: int = 3
    """Launches of each row, of two counted epochs and an evaluation."""
    minutes: float = 5.0
    """For all launches; with less left there are fewer rounds, but three at least."""
    scale: float = 1.0
    """Share of the data to train on and to evaluate; below 1 for a trial."""
    results: Path = RESULTS
    """Folder for the results. Give another one for a trial, or the saved figures are replaced."""


def main(options: Options) -> None:
    """Time, print the tables and save the figures."""
    started = time.perf_counter()
    devices = torch.cuda.device_count() if steps.DEVICE.type == "cuda" else len(os.sched_getaffinity(0))
    counts = [count for count in COUNTS if count <= devices]
    launches = rows(counts)
    turns = {name: partial(_launched, *row, options.scale) for name, row in launches.items()}
    runs = by_turns(turns, options.rounds, 60 * options.minutes)
    evaluated: dict[str, list[dict[str, Any]]] = {}
    for name, (processes, threads, _) in launches.items():
        # How many data a step has is nothing to an evaluation.
        evaluated.setdefault(_label(processes, threads), []).extend(runs[name])
    cases = {}
    for work, shown in (("epoch", runs), ("evaluation", evaluated)):
        taken = {name: [second for run in each for second in run[f"{work}s"]] for name, each in shown.items()}
        first = {name: round(median(run[f"first_{work}"] for run in each), 2) for name, each in shown.items()}
        cases[work] = summaries(taken, ONE, first, {})
        print(f"{table(cases[work], ONE, work, 's')}\n")
    sizes = {"data": _share(DATA, options.scale), "evaluated": _share(EVALUATED, options.scale)}
    results = {"batch": steps.BATCH, **sizes, "num_particles": NUM_PARTICLES, "cases": cases}
    save_timings("scaling", results, started, bars(cases, ONE, "pass over the data", "s"), devices, options.results)


def rows(counts: list[int]) -> dict[str, tuple[int, int, int]]:
    """Return each row's processes, threads of each and data per step of each."""
    found = {ONE: (1, 1, steps.BATCH)}
    for count in counts[1:]:
        if steps.DEVICE.type == "cpu":
            found[_label(1, count)] = (1, count, steps.BATCH)
        found[f"{_label(count, 1)}, {steps.BATCH} data per step together"] = (count, 1, steps.BATCH // count)
        found[f"{_label(count, 1)}, {steps.BATCH} data per step each"] = (count, 1, steps.BATCH)
    return found


def _label(processes: int, threads: int) -> str:
    label = ONE if processes == 1 else f"{processes} processes"
    return label if threads == 1 else f"{label}, {threads} threads"


def _share(count: int, scale: float) -> int:
    return round(count * scale)


def _launched(processes: int, threads: int, batch: int, scale: float) -> list[dict[str, Any]]:
    """Return what the first of so many processes prints."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    arguments = {
        "batch": batch,
        "data": _share(DATA, scale),
        "evaluated": _share(EVALUATED, scale),
        "num-particles": NUM_PARTICLES,
        "threads": threads,
    }
    command += ["--module", "benchmarks.speed.scaling_run"]
    command += [word for name, value in arguments.items() for word in (f"--{name}", str(value))]
    settings = launch.environment(threads)
    done = subprocess.run(command, capture_output=True, text=True, env=settings, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return [json.loads(done.stdout.splitlines()[-1])]


if __name__ == "__main__":
    main(tyro.cli(Options))
