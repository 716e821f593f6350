"""Measure the growth of captured training's cost with batch, latents, hidden width, image side, particles and data.

    python -m benchmarks.speed.growth

Each axis is varied alone, around the 784–400–20 VAE with batches of 128; sizes take turns. The last axis, the number of
data, is that of whole epochs of ``fit``. The slope is that of log(seconds) over log(size), fitted by least squares: 0
where cost is fixed, 1 where it is proportional.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import torch
import tyro
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, ScalarFormatter
from pyro.infer import Trace_ELBO

from benchmarks.harness import steps
from benchmarks.harness.common import RESULTS, save_timings
from benchmarks.harness.peers import launch
from benchmarks.harness.side_by_side import Turn, by_turns, timings
from benchmarks.speed import fit_epochs
from pyro_vae.training.captured_step import captured_step

AXES: dict[str, tuple[int, ...]] = {
    "batch": (32, 128, 512, 2048, 4096),
    "latent": (4, 16, 64, 256),
    "hidden": (64, 256, 1024, 4096),
    "side": (7, 14, 28, 56, 112),
    "particles": (1, 4, 16, 64),
    "data": (1_000, 4_000, 16_000, 64_000),
}
BASE = {"batch": steps.BATCH, "latent": 20, "hidden": 400, "side": steps.SIDE, "particles": 1}
# Counted steps of a turn.
BLOCK = 3
# In which it records, compiles and makes its CUDA graph.
FIRST = 8


@dataclass(frozen=True)
class Options:
    """Time every size of every axis."""

    rounds: int = 10
    """Turns of each size: three counted steps, or one epoch."""
    minutes: float = 3.0
    """For the timings of all axes, after compiling; with less left there are fewer rounds."""
    threads: int = 2
    """Threads of torch."""
    compiled: bool = True
    """Whether the recordings are compiled, which takes some seconds for each size."""
    scale: float = 1.0
    """Share of the sizes of every axis to time, from the smallest; below 1 for a trial."""
    results: Path = RESULTS
    """Folder for the results. Give another one for a trial, or the saved figures are replaced."""


def main(options: Options) -> None:
    """Time, print the slopes and save the figures."""
    torch.set_num_threads(options.threads)
    pyro.enable_validation(False)
    started = time.perf_counter()
    axes: dict[str, Any] = {}
    for axis, every in AXES.items():
        sizes = every[: max(2, round(options.scale * len(every)))]
        work = "epoch" if axis == "data" else "step"
        with _turns(axis, sizes, options) as turns:
            taken = by_turns(turns, options.rounds, 60 * options.minutes / len(AXES))
        axes[axis] = {"work": work, **grown({int(size): seconds for size, seconds in taken.items()})}
        print(f"{axis:10s} slope {axes[axis]['slope']:.2f}, of the last two {axes[axis]['last_slope']:.2f}")
    results = {"threads": options.threads, "compiled": options.compiled, "base": BASE, "axes": axes}
    save_timings("growth", results, started, drawn(axes), options.threads, options.results)


@contextmanager
def _turns(axis: str, sizes: tuple[int, ...], options: Options) -> Iterator[dict[str, Turn]]:
    """Yield a turn of each size."""
    if axis != "data":
        yield {str(size): _steps({**BASE, axis: size}, options.compiled) for size in sizes}
        return
    kind = "fit, captured, compiled" if options.compiled else "fit, captured"
    shape = (BASE["batch"], steps.PIXELS, BASE["hidden"], BASE["latent"])
    starts = {str(size): partial(fit_epochs.start, kind, *shape, size, threads=options.threads) for size in sizes}
    with launch.running(starts) as (running, absent):
        if absent:
            raise RuntimeError(str(absent))
        yield dict(running)


def _steps(sizes: dict[str, int], compiled: bool) -> Turn:
    pixels = sizes["side"] ** 2
    pair = steps.vae(sizes["hidden"], sizes["latent"], pixels)
    loss = Trace_ELBO(num_particles=sizes["particles"], vectorize_particles=True, max_plate_nesting=1)
    step = captured_step(pair, loss, steps.adam(pair), compiled=compiled)
    shape = (sizes["batch"], pixels)
    feed = itertools.cycle([torch.rand(shape, device=steps.DEVICE).gt(0.7).float() for _ in range(2)])
    for _ in range(FIRST):
        step(next(feed))
    return lambda: timings(lambda: step(next(feed)), BLOCK)


def grown(seconds: dict[int, list[float]]) -> dict[str, Any]:
    """Return the medians in milliseconds and quartiles by size, with the slope over all sizes and over the last two."""
    medians = {size: statistics.median(values) for size, values in seconds.items()}
    quartiles = {size: statistics.quantiles(values, n=4) for size, values in seconds.items()}
    return {
        "median_ms": {str(size): round(1000 * value, 4) for size, value in medians.items()},
        "quartiles_ms": {str(n): [round(1000 * q[0], 4), round(1000 * q[2], 4)] for n, q in quartiles.items()},
        "slope": round(slope(medians), 3),
        "last_slope": round(slope(dict(list(medians.items())[-2:])), 3),
    }


def slope(seconds: dict[int, float]) -> float:
    """Return the least-squares slope of log(seconds) over log(size)."""
    x, y = [math.log(size) for size in seconds], [math.log(value) for value in seconds.values()]
    return statistics.linear_regression(x, y).slope


def drawn(axes: dict[str, Any]) -> Figure:
    """Draw each axis on logarithmic scales, with quartiles and its slope."""
    columns = 3
    lines = math.ceil(len(axes) / columns)
    figure = Figure(figsize=(3.6 * columns, 3.2 * lines), layout="constrained")
    for ax, (axis, record) in zip(figure.subplots(lines, columns).flatten(), axes.items(), strict=False):
        sizes = [int(size) for size in record["median_ms"]]
        ax.loglog(sizes, list(record["median_ms"].values()), "o-")
        ax.fill_between(sizes, *zip(*record["quartiles_ms"].values(), strict=True), alpha=0.3)
        ax.set_xticks(sizes, [str(size) for size in sizes], fontsize=8)
        # A range of less than a decade would be left without a number at its side.
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter(ScalarFormatter())
        ax.minorticks_off()
        ax.set_xlabel(axis)
        ax.set_ylabel(f"ms per {record['work']} (median, quartiles)")
        ax.set_title(f"slope {record['slope']:.2f}, last {record['last_slope']:.2f}", fontsize=10)
    return figure


if __name__ == "__main__":
    main(tyro.cli(Options))
