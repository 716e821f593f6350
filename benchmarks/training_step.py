"""Time one training step, captured and by the peers a user would otherwise write or install, in one run.

    python benchmarks/training_step.py

All rows of a case train the same networks on batches of one shape with Adam, float32 unless said. They take turns in
blocks of steps, so that a slow minute of a shared machine falls on all of them; read the ratios, not the milliseconds.
NumPyro and pythae are installed into a throw-away environment and run from there.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peers
import pyro
import steps
import torch
import tyro
from common import RESULTS, keep, machine_kind
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor

from pyro_vae.figures import save_figure

SIZES = ((400, 20), (2000, 30), (64, 8))
# Steps that a row takes in a turn; the first of them finds the caches full of another row's numbers and is not counted.
BLOCK = 11
# Steps of a peer's turn, after which it answers: NumPyro's is one jitted scan.
PEER_BLOCK = 20
LEAST_ROUNDS = 3
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
    """Whether to install and time NumPyro and pythae."""
    long_run: bool = True
    """Whether to follow the memory of up to 20 000 steps."""


def main(options: Options) -> None:
    """Time, print a table for each case and keep the figures."""
    torch.set_num_threads(options.threads)
    pyro.enable_validation(False)
    started = time.perf_counter()
    cases: dict[str, Any] = {}
    with ExitStack() as stack:
        installed = stack.enter_context(_installed()) if options.peers else {}
        names = {f"{steps.PIXELS}–{hidden}–{latent}": (hidden, latent) for hidden, latent in SIZES}
        seconds = 60 * options.minutes / (len(names) + len(steps.SRVAES))
        for name, (hidden, latent) in names.items():
            rows = steps.vae_rows(hidden, latent)
            cases[name] = _case(rows, installed, (hidden, latent), options, seconds)
            show(name, cases[name])
        for name in steps.SRVAES:
            cases[name] = _case(steps.srvae_rows(name), {}, (), options, seconds)
            show(name, cases[name])
    results = {"threads": options.threads, "batch": steps.BATCH, "cases": cases}
    if options.long_run:
        results["long_run"] = {kind: _long_run(kind, count, options.threads) for kind, count in LONG_RUN.items()}
        print(json.dumps(results["long_run"], indent=2))
    folder = RESULTS / machine_kind(options.threads)
    path = keep("training_step", results, started, folder)
    save_figure(drawn(cases), folder / "training_step.png")
    print(f"kept in {path}")


@contextmanager
def _installed() -> Iterator[dict[str, tuple[Path, str | None]]]:
    with peers.environment() as python:
        yield {name: (python, peers.install(python, name)) for name in peers.NAMES}


def _case(
    rows: dict[str, Callable[[Tensor], object]],
    installed: dict[str, tuple[Path, str | None]],
    sizes: tuple[int, ...],
    options: Options,
    seconds: float,
) -> dict[str, Any]:
    """Return each row's summary, by turns; a peer that is absent says why."""
    batches = steps.batches_for(rows)
    first = _warm(rows, batches)
    feed = itertools.cycle(batches)
    turns: dict[str, Callable[[], list[float]]] = {name: _turn(row, feed) for name, row in rows.items()}
    absent: dict[str, str] = {}
    running: list[peers.Peer] = []
    for name, (python, reason) in installed.items():
        label = peers.NAMES[name]
        try:
            if reason is not None:
                raise RuntimeError(reason)
            peer = peers.Peer(python, name, steps.BATCH, steps.PIXELS, *sizes, PEER_BLOCK, threads=options.threads)
            running.append(peer)
            turns[label] = peer
        except RuntimeError as error:
            absent[label] = str(error)
    taken: dict[str, list[float]] = {name: [] for name in turns}
    deadline = time.perf_counter() + seconds
    for done in range(options.rounds):
        if done >= LEAST_ROUNDS and time.perf_counter() > deadline:
            break
        for name, turn in turns.items():
            taken[name] += turn()
    for peer in running:
        peer.close()
    summaries: dict[str, Any] = {name: summary(values, taken[CAPTURED]) for name, values in taken.items()}
    for name, value in first.items():
        summaries[name]["first_step_seconds"] = value
    return summaries | {name: {"absent": reason} for name, reason in absent.items()}


def _turn(row: Callable[[Tensor], object], feed: Iterator[Tensor]) -> Callable[[], list[float]]:
    return lambda: [_timed(row, next(feed)) for _ in range(BLOCK)][1:]


def _warm(rows: dict[str, Callable[[Tensor], object]], batches: list[Tensor]) -> dict[str, float]:
    """Take the first steps; return the seconds of each row's first, in which it may record and compile."""
    first = {}
    for name, row in rows.items():
        first[name] = round(_timed(row, batches[0]), 2)
        for x in batches[1:8]:
            row(x)
    return first


def _timed(row: Callable[[Tensor], object], x: Tensor) -> float:
    start = time.perf_counter()
    row(x)
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _long_run(kind: str, count: int, threads: int) -> dict[str, Any]:
    """Return the resident memory of a process of its own as it trains."""
    command = [sys.executable, str(Path(__file__).with_name("long_run.py")), "--kind", kind]
    command += ["--steps", str(count), "--threads", str(threads)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def summary(seconds: list[float], ours: list[float]) -> dict[str, Any]:
    """Return a row's median in milliseconds, its quartiles, its number of timings, and our median over it."""
    low, median, high = (1000 * q for q in statistics.quantiles(seconds, n=4))
    return {
        "median_ms": round(median, 4),
        "quartiles_ms": [round(low, 4), round(high, 4)],
        "timings": len(seconds),
        "ours_over_it": round(1000 * statistics.median(ours) / median, 3),
    }


def show(name: str, rows: dict[str, dict[str, Any]]) -> None:
    """Print the table of one case."""
    table = Table("step", "median ms", "quartiles", f"{CAPTURED} ÷ it", "first step, s", title=name)
    for row, figures in rows.items():
        if "absent" in figures:
            table.add_row(row, figures["absent"])
        else:
            low, high = figures["quartiles_ms"]
            ratio, first = f"{figures['ours_over_it']:.2f}", str(figures.get("first_step_seconds", ""))
            table.add_row(row, f"{figures['median_ms']:.3f}", f"{low:.3f}–{high:.3f}", ratio, first)
    Console(width=110).print(table)


def drawn(cases: dict[str, Any]) -> Figure:
    """Draw each case's medians as bars, with their quartiles."""
    columns = 2
    lines = math.ceil(len(cases) / columns)
    figure = Figure(figsize=(5.5 * columns, 3.2 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for ax in axes[len(cases) :]:
        ax.axis("off")
    for ax, (name, rows) in zip(axes, cases.items(), strict=False):
        timed = sorted(((k, v) for k, v in rows.items() if "absent" not in v), key=lambda item: -item[1]["median_ms"])
        medians = [v["median_ms"] for _, v in timed]
        spread = [[abs(v["median_ms"] - v["quartiles_ms"][i]) for _, v in timed] for i in (0, 1)]
        colours = ["tab:orange" if k.startswith("captured") else "tab:blue" for k, _ in timed]
        ax.barh([k for k, _ in timed], medians, xerr=spread, color=colours)
        for i, (_, v) in enumerate(timed):
            ax.text(v["quartiles_ms"][1], i, f"  {v['median_ms']:.2f}", va="center", fontsize=8)
        ax.set_title(name)
        ax.set_xlim(0, 1.25 * max(v["quartiles_ms"][1] for _, v in timed))
        ax.set_xlabel("ms per step (median, quartiles)")
    return figure


if __name__ == "__main__":
    main(tyro.cli(Options))
