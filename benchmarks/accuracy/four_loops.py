"""Train SRVAE on digits by four loops over the same batches, and compare where they end.

    python -m benchmarks.accuracy.four_loops

Pyro's SVI, ``pv.fit`` and a hand-written torch loop over ``Trace_ELBO`` draw the same noise and so follow one
trajectory; a loop over ``pv.analytic_loss`` has the same gradient in expectation, with its divergences closed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pyro
import torch
import tyro
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from rich.console import Console
from rich.table import Table
from torch import Tensor

import pyro_vae as pv
from benchmarks.harness.common import save

LEARNING_RATE = 1e-3
BATCH = 128


@dataclass(frozen=True)
class Options:
    """Train by each loop for each seed."""

    epochs: int = 30
    """Passes over the data."""
    seeds: int = 5
    """Number of seeds."""


def main(options: Options) -> None:
    """Train, print a table and save the figures."""
    torch.set_default_dtype(torch.float64)
    started = time.perf_counter()
    data = pv.data.load("digits")
    train = data.train[: len(data.train) // BATCH * BATCH]
    rows = {}
    for name, loop in LOOPS.items():
        finals, ends = [], []
        for seed in range(options.seeds):
            torch.manual_seed(seed)
            pair = pv.models.SRVAE(data.x_shape, scale=2, prior=pv.StandardNormal(16))
            loop(pair, train, options.epochs, seed)
            finals.append(closed_form_loss(pair, data.test))
            ends.append(torch.cat([parameter.detach().flatten() for parameter in pair.parameters()]))
        first = rows[next(iter(rows))]["ends"] if rows else ends
        distance = max(float((a - b).norm() / b.norm()) for a, b in zip(ends, first, strict=True))
        rows[name] = {"final_losses": finals, "parameter_distance": distance, "ends": ends}
    for row in rows.values():
        del row["ends"]
    results = {"loops": rows, "epochs": options.epochs, "steps": options.epochs * (len(train) // BATCH)}
    path = save("four_loops", results, started)
    show(rows)
    print(f"saved in {path}")


def closed_form_loss(pair: pv.Pair, x: Tensor) -> float:
    """Return the test −ELBO per datum, by 100 draws of the reconstruction terms."""
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        return float(pv.analytic_loss(pair, x, num_particles=100).total.mean())


def batches(train: Tensor, epochs: int, seed: int) -> Iterator[Tensor]:
    """Yield ``fit``'s batches in its order, the caller's generator seeded as it seeds it."""
    torch.manual_seed(seed)
    for epoch in range(epochs):
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        for rows in order.split(BATCH):
            yield train[rows]


def by_fit(pair: pv.Pair, train: Tensor, epochs: int, seed: int) -> None:
    """Train by the package's loop."""
    pv.fit(pair, train, epochs=epochs, batch_size=BATCH, lr=LEARNING_RATE, seed=seed, device="cpu", progress=False)


def by_svi(pair: pv.Pair, train: Tensor, epochs: int, seed: int) -> None:
    """Train by Pyro's SVI, scaled to the mean per datum."""
    model, guide = (poutine.scale(program, 1 / BATCH) for program in (pair.model, pair.guide))
    svi = SVI(model, guide, pyro.optim.Adam({"lr": LEARNING_RATE}), Trace_ELBO())
    for x in batches(train, epochs, seed):
        svi.step(x)


def by_torch(pair: pv.Pair, train: Tensor, epochs: int, seed: int) -> None:
    """Train by a hand-written torch loop over Pyro's ELBO."""
    elbo = Trace_ELBO()(pair.model, pair.guide)
    descend(pair, lambda x: elbo(x) / len(x), batches(train, epochs, seed))


def by_closed_form(pair: pv.Pair, train: Tensor, epochs: int, seed: int) -> None:
    """Train by a hand-written torch loop over the documents' loss."""
    descend(pair, lambda x: pv.analytic_loss(pair, x).total.mean(), batches(train, epochs, seed))


def descend(pair: pv.Pair, loss: Callable[[Tensor], Tensor], data: Iterator[Tensor]) -> None:
    """Take an Adam step for each batch."""
    optimizer = torch.optim.Adam(pair.parameters(), lr=LEARNING_RATE)
    for x in data:
        optimizer.zero_grad()
        loss(x).backward()
        optimizer.step()


LOOPS: dict[str, Callable[[pv.Pair, Tensor, int, int], None]] = {
    "Pyro's SVI": by_svi,
    "pv.fit": by_fit,
    "torch loop over Trace_ELBO": by_torch,
    "torch loop over pv.analytic_loss": by_closed_form,
}


def show(rows: dict[str, Any]) -> None:
    """Print the table."""
    table = Table("loop", "final −ELBO by seed", "distance")
    for name, row in rows.items():
        losses = " ".join(f"{value:.3f}" for value in row["final_losses"])
        table.add_row(name, losses, f"{row['parameter_distance']:.1e}")
    Console().print(table)


if __name__ == "__main__":
    main(tyro.cli(Options))
