"""Time one training step, captured and by the peers a user would otherwise write or install, in one run.

    python -m benchmarks.speed.training_step

All rows of a case train the same networks on batches of one shape with Adam, float32 unless said. They take turns in
blocks of steps, because a slow minute of a shared machine then affects all of them. Read the ratios.
NumPyro and pythae are installed into a throw-away environment and run from there.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import torch
import tyro
from torch import Tensor

from benchmarks.harness import steps
from benchmarks.harness.common import RESULTS, save_timings
from benchmarks.harness.peers import launch
from benchmarks.harness.side_by_side import bars, by_turns, summaries, table, timed, timings

SIZES = ((400, 20), (2000, 30), (64, 8))
# Counted steps of a row's turn.
BLOCK = 10
# Steps of a peer's turn, after which it answers: NumPyro's is one jitted scan.
PEER_BLOCK = 20
CAPTURED = "captured, compiled"
LONG_RUN = {"eager": 2000, "captured": 2000, CAPTURED: 20000}


@dataclass(frozen=True)
class Options:
    """Time every row in every case."""

    rounds: int = 30
    """Turns of each row, ten counted steps each."""
    minutes: float = 5.0
    """For the timings of all cases, after installing and compiling; a case with less left takes fewer turns."""
    threads: int = 2
    """Threads of every row."""
    peers: bool = True
    """Whether to install and time NumPyro and pythae, on a CPU."""
    long_run: bool = True
    """Whether to follow the memory of up to 20 000 steps."""
    results: Path = RESULTS
    """Folder for the results. Give another one for a trial, or the saved figures are replaced."""


def main(options: Options) -> None:
    """Time, print a table for each case and save the figures."""
    torch.set_num_threads(options.threads)
    pyro.enable_validation(False)
    started = time.perf_counter()
    cases: dict[str, Any] = {}
    with ExitStack() as stack:
        # Peers are installed for the CPU; their times would say nothing beside a GPU's.
        installed = stack.enter_context(launch.installed()) if options.peers and steps.DEVICE.type == "cpu" else {}
        names = {f"{steps.PIXELS}–{hidden}–{latent}": (hidden, latent) for hidden, latent in SIZES}
        seconds = 60 * options.minutes / (len(names) + len(steps.SRVAES))
        for name, (hidden, latent) in names.items():
            rows = steps.vae_rows(hidden, latent)
            cases[name] = _case(rows, (steps.PIXELS,), installed, (hidden, latent), options, seconds)
            print(f"{name}\n{table(cases[name], CAPTURED, 'step')}\n")
        for name in steps.SRVAES:
            cases[name] = _case(steps.srvae_rows(name), steps.IMAGE, {}, (), options, seconds)
            print(f"{name}\n{table(cases[name], CAPTURED, 'step')}\n")
    results = {"threads": options.threads, "batch": steps.BATCH, "cases": cases}
    if options.long_run:
        results["long_run"] = {kind: _long_run(kind, count, options.threads) for kind, count in LONG_RUN.items()}
        print(json.dumps(results["long_run"], indent=2))
    save_timings("training_step", results, started, bars(cases, CAPTURED, "step"), options.threads, options.results)


def _case(
    rows: dict[str, Callable[[Tensor], object]],
    shape: tuple[int, ...],
    installed: dict[str, tuple[Path, str | None]],
    sizes: tuple[int, ...],
    options: Options,
    seconds: float,
) -> dict[str, Any]:
    """Return each row's summary, by turns; a peer that is absent says why."""
    batches = steps.batches_of(shape)
    first = _warm(rows, batches)
    feed = itertools.cycle(batches)
    turns = {name: _turn(row, feed) for name, row in rows.items()}
    work = (steps.BATCH, steps.PIXELS, *sizes, PEER_BLOCK * steps.BATCH)
    with launch.running(launch.starts(installed, "step", *work, threads=options.threads)) as (running, absent):
        turns |= {name: _a_step(peer) for name, peer in running.items()}
        taken = by_turns(turns, options.rounds, seconds)
    return summaries(taken, CAPTURED, first, absent)


def _a_step(peer: launch.Peer) -> Callable[[], list[float]]:
    return lambda: [seconds / PEER_BLOCK for seconds in peer()]


def _turn(row: Callable[[Tensor], object], feed: Iterator[Tensor]) -> Callable[[], list[float]]:
    return lambda: timings(lambda: row(next(feed)), BLOCK)


def _warm(rows: dict[str, Callable[[Tensor], object]], batches: list[Tensor]) -> dict[str, float]:
    """Take the first steps; return the seconds of each row's first, in which it may record and compile."""
    first = {}
    for name, row in rows.items():
        first[name] = round(timed(partial(row, batches[0])), 2)
        for x in batches[1:8]:
            row(x)
    return first


def _long_run(kind: str, count: int, threads: int) -> dict[str, Any]:
    """Return the resident memory of a separate process as it trains."""
    command = [sys.executable, "-m", "benchmarks.speed.long_run", "--kind", kind]
    command += ["--steps", str(count), "--threads", str(threads)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=launch.environment(threads))
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main(tyro.cli(Options))
