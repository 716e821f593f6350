"""How the cost of a captured training step grows with batch, latent size, hidden width and particles.

    python benchmarks/growth.py

Each axis is varied alone, around the 784–400–20 VAE with batches of 128; sizes take turns. The slope is that of
log(seconds) over log(size), fitted by least squares: 0 where cost is fixed, 1 where it is proportional.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import steps
import torch
import tyro
from common import RESULTS, keep, machine_kind
from matplotlib.figure import Figure
from pyro.infer import Trace_ELBO
from torch import Tensor

from pyro_vae.capture import captured_step
from pyro_vae.figures import save_figure

AXES: dict[str, tuple[int, ...]] = {
    "batch": (32, 128, 512, 2048, 4096),
    "latent": (4, 16, 64, 256),
    "hidden": (64, 256, 1024, 4096),
    "particles": (1, 4, 16, 64),
}
BASE = {"batch": steps.BATCH, "latent": 20, "hidden": 400, "particles": 1}
# Of a turn, the first step is not counted.
BLOCK = 4


@dataclass(frozen=True)
class Options:
    """Time every size of every axis."""

    rounds: int = 10
    """Turns of each size, three counted steps each."""
    threads: int = 2
    """Threads of torch."""
    compiled: bool = True
    """Whether the recordings are compiled, which takes some seconds for each size."""


def main(options: Options) -> None:
    """Time, print the slopes and keep the figures."""
    torch.set_num_threads(options.threads)
    pyro.enable_validation(False)
    started = time.perf_counter()
    axes: dict[str, Any] = {}
    for axis, sizes in AXES.items():
        turns = {size: _turn({**BASE, axis: size}, options.compiled) for size in sizes}
        seconds: dict[int, list[float]] = {size: [] for size in sizes}
        for _ in range(options.rounds):
            for size, turn in turns.items():
                seconds[size] += turn()
        medians = {size: statistics.median(values) for size, values in seconds.items()}
        axes[axis] = {
            "median_ms": {str(size): round(1000 * value, 4) for size, value in medians.items()},
            "slope": round(slope(medians), 3),
            "last_slope": round(slope(dict(list(medians.items())[-2:])), 3),
        }
        print(f"{axis:10s} slope {axes[axis]['slope']:.2f}, of the last two {axes[axis]['last_slope']:.2f}")
    results = {"threads": options.threads, "compiled": options.compiled, "base": BASE, "axes": axes}
    folder = RESULTS / machine_kind(options.threads)
    path = keep("growth", results, started, folder)
    save_figure(drawn(axes), folder / "growth.png")
    print(f"kept in {path}")


def _turn(sizes: dict[str, int], compiled: bool) -> Callable[[], list[float]]:
    pair = steps.vae(sizes["hidden"], sizes["latent"])
    loss = Trace_ELBO(num_particles=sizes["particles"], vectorize_particles=True, max_plate_nesting=1)
    step = captured_step(pair, loss, steps.adam(pair), compiled=compiled)
    shape = (sizes["batch"], steps.PIXELS)
    feed = itertools.cycle([torch.rand(shape, device=steps.DEVICE).gt(0.7).float() for _ in range(2)])

    def timed(x: Tensor) -> float:
        start = time.perf_counter()
        step(x)
        if x.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for _ in range(BLOCK):
        timed(next(feed))
    return lambda: [timed(next(feed)) for _ in range(BLOCK)][1:]


def slope(seconds: dict[int, float]) -> float:
    """Return the least-squares slope of log(seconds) over log(size)."""
    x, y = [math.log(size) for size in seconds], [math.log(value) for value in seconds.values()]
    return statistics.linear_regression(x, y).slope


def drawn(axes: dict[str, Any]) -> Figure:
    """Draw each axis on logarithmic scales, with its slope."""
    figure = Figure(figsize=(3.4 * len(axes), 3.2), layout="constrained")
    for ax, (axis, record) in zip(figure.subplots(1, len(axes)), axes.items(), strict=True):
        sizes = [int(size) for size in record["median_ms"]]
        ax.loglog(sizes, list(record["median_ms"].values()), "o-")
        ax.set_xlabel(axis)
        ax.set_ylabel("ms per step (median)")
        ax.set_title(f"slope {record['slope']:.2f}, last {record['last_slope']:.2f}", fontsize=10)
    return figure


if __name__ == "__main__":
    main(tyro.cli(Options))
