"""Time whole epochs of MNIST-shaped data, by ``fit`` and by the loops a user would otherwise write or install.

    python -m benchmarks.speed.epoch

An epoch is 60 000 binary images of 784 pixels in batches of 128, in a new order each time, float32 unless said, Adam.
All rows train the same networks; each loop gathers batches and reads losses in its way. They take turns of one epoch,
because a slow minute of a shared machine then affects all of them. Read the ratios. ``fit`` evaluates its losses after
every epoch, and that counts. NumPyro leaves the short last batch out, as its example does.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import torch
import tyro
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.harness import steps
from benchmarks.harness.common import RESULTS, save_timings
from benchmarks.harness.peers import launch
from benchmarks.harness.side_by_side import Turn, bars, by_turns, summaries, table, timed
from benchmarks.speed import fit_epochs

SIZES = ((400, 20), (64, 8))
OURS = "fit, captured, compiled"
DATA = 60_000


@dataclass(frozen=True)
class Options:
    """Time every row in every case."""

    rounds: int = 9
    """Epochs of each row."""
    minutes: float = 3.0
    """For the timings of all cases, after installing and compiling; with less left there are fewer rounds."""
    threads: int = 2
    """Threads of every row."""
    scale: float = 1.0
    """Share of the 60 000 images; below 1 for a trial."""
    peers: bool = True
    """Whether to install and time NumPyro and pythae."""
    results: Path = RESULTS
    """Folder for the results. Give another one for a trial, or the saved figures are replaced."""


def main(options: Options) -> None:
    """Time, print a table for each case and save the figures."""
    torch.set_num_threads(options.threads)
    # For Pyro's loops; fit validates only its first step.
    pyro.enable_validation(False)
    started = time.perf_counter()
    data = round(DATA * options.scale)
    cases: dict[str, Any] = {}
    with ExitStack() as stack:
        installed = stack.enter_context(launch.installed()) if options.peers else {}
        for sizes in SIZES:
            name = "–".join(map(str, (steps.PIXELS, *sizes)))
            cases[name] = _case(sizes, data, installed, options)
            print(f"{name}\n{table(cases[name], OURS, 'epoch', 's')}\n")
    results = {"threads": options.threads, "batch": steps.BATCH, "data": data, "cases": cases}
    save_timings("epoch", results, started, bars(cases, OURS, "epoch", "s"), options.threads, options.results)


def _case(
    sizes: tuple[int, int], data: int, installed: dict[str, tuple[Path, str | None]], options: Options
) -> dict[str, Any]:
    """Return each row's summary, by turns; a peer that is absent says why."""
    shape = (steps.BATCH, steps.PIXELS, *sizes, data)
    starts = launch.starts(installed, "epoch", *shape, threads=options.threads)
    for kind in fit_epochs.KINDS:
        starts[kind] = partial(fit_epochs.start, kind, *shape, threads=options.threads)
    with launch.running(starts) as (running, absent):
        if OURS in absent:
            raise RuntimeError(absent[OURS])
        first = {name: peer.said["first_seconds"] for name, peer in running.items() if "first_seconds" in peer.said}
        turns: dict[str, Turn] = dict(running)
        for name, epoch in loops(sizes, data).items():
            first[name] = round(timed(epoch), 2)
            turns[name] = partial(_turn, epoch)
        taken = by_turns(turns, options.rounds, 60 * options.minutes / len(SIZES))
    return summaries(taken, OURS, first, absent)


def loops(sizes: tuple[int, int], data: int) -> dict[str, Callable[[], None]]:
    """Return an epoch of each loop that is written around a step."""
    pair, x = steps.vae(*sizes), torch.rand(data, steps.PIXELS).gt(0.7).float()
    by_svi, by_loader = steps.by_svi(copy.deepcopy(pair)), steps.by_svi(copy.deepcopy(pair))
    rows = x.to(steps.DEVICE)
    return {
        "Pyro's SVI, DataLoader": partial(_over_loader, by_loader, x),
        "Pyro's SVI, index batches": partial(_over_rows, by_svi, rows),
        "PyTorch by hand": partial(_over_rows, steps.by_hand(copy.deepcopy(pair), compiled=False), rows),
        "PyTorch by hand, torch.compile": partial(_over_rows, steps.by_hand(pair, compiled=True), rows),
    }


def _over_rows(step: steps.Row, x: Tensor) -> None:
    for rows in torch.randperm(len(x), device=x.device).split(steps.BATCH):
        step(x[rows])


def _over_loader(step: steps.Row, x: Tensor) -> None:
    """Take an epoch as Pyro's VAE example does, labels loaded and left."""
    data = TensorDataset(x, torch.zeros(len(x)))
    for batch, _ in DataLoader(data, steps.BATCH, shuffle=True, pin_memory=steps.DEVICE.type == "cuda"):
        step(batch.to(steps.DEVICE))


def _turn(epoch: Callable[[], None]) -> list[float]:
    return [timed(epoch)]


if __name__ == "__main__":
    main(tyro.cli(Options))
