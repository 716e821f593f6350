"""Time one training step of a Bernoulli VAE, captured and by the peers a user would otherwise write, in one run.

    python benchmarks/training_step.py

All rows train the same networks on the same batches with Adam, float32. They take turns in blocks of steps, so that a
slow minute of a shared machine falls on all of them; read the ratios, not the milliseconds.
"""

from __future__ import annotations

import copy
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import torch
import tyro
from common import keep
from pyro.infer import SVI, Trace_ELBO
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

import pyro_vae as pv
from pyro_vae.capture import captured_step
from pyro_vae.networks import MLP

PIXELS = 784
BATCH = 128
LEARNING_RATE = 1e-3
SIZES = ((400, 20), (2000, 30), (64, 8))
# Steps that a row takes in a turn; the first of them finds the caches full of another row's numbers and is not counted.
BLOCK = 11
CAPTURED = "captured, compiled"


@dataclass(frozen=True)
class Options:
    """Time every row for three sizes of networks."""

    rounds: int = 30
    """Turns of each row, ten counted steps each."""
    threads: int = 2
    """Threads of every row."""


def main(options: Options) -> None:
    """Time, print a table for each size and keep the figures."""
    torch.set_num_threads(options.threads)
    pyro.enable_validation(False)
    started = time.perf_counter()
    batches = [torch.rand(BATCH, PIXELS).gt(0.7).float() for _ in range(16)]
    results = {}
    for hidden, latent in SIZES:
        rows = make_rows(hidden, latent, batches)
        seconds: dict[str, list[float]] = {name: [] for name in rows}
        feed = itertools.cycle(batches)
        for _ in range(options.rounds):
            for name, row in rows.items():
                seconds[name] += [timed(row, next(feed)) for _ in range(BLOCK)][1:]
        name = f"{PIXELS}–{hidden}–{latent}"
        results[name] = {row: summary(values, seconds[CAPTURED]) for row, values in seconds.items()}
        show(name, results[name])
    path = keep("training_step", {"steps": 10 * options.rounds, "threads": options.threads, "sizes": results}, started)
    print(f"kept in {path}")


def timed(row: Callable[[Tensor], object], x: Tensor) -> float:
    """Return the seconds of one step."""
    start = time.perf_counter()
    row(x)
    return time.perf_counter() - start


def make_rows(hidden: int, latent: int, batches: list[Tensor]) -> dict[str, Callable[[Tensor], object]]:
    """Return each way of taking a step, warmed up."""
    torch.manual_seed(0)
    pair = pv.models.VAE(
        (PIXELS,),
        pv.StandardNormal(latent),
        pv.Bernoulli(),
        encoder=MLP([(PIXELS,)], 2 * latent, (hidden,)),
        decoder=MLP([(latent,)], PIXELS, (hidden,)),
    )
    rows = {
        CAPTURED: captured(copy.deepcopy(pair), compiled=True),
        "captured": captured(copy.deepcopy(pair), compiled=False),
        "Pyro's SVI.step": by_svi(copy.deepcopy(pair)),
        "PyTorch by hand": by_hand(copy.deepcopy(pair), compiled=False),
        "PyTorch by hand, torch.compile": by_hand(copy.deepcopy(pair), compiled=True),
        "five products, oneDNN": products(hidden),
    }
    for row in rows.values():
        for x in batches:
            row(x)
    return rows


def captured(pair: pv.Pair, compiled: bool) -> Callable[[Tensor], object]:
    """Return the captured step."""
    return captured_step(pair, Trace_ELBO(), adam(pair), compiled=compiled)


def by_svi(pair: pv.Pair) -> Callable[[Tensor], object]:
    """Return Pyro's own step, without validation."""
    return SVI(pair.model, pair.guide, pyro.optim.Adam({"lr": LEARNING_RATE}), Trace_ELBO()).step


def by_hand(pair: pv.models.VAE, compiled: bool) -> Callable[[Tensor], object]:
    """Return the step that a tutorial would write: the networks, a draw, the loss with its divergence closed."""
    encoder, decoder, optimizer = pair.q_z.network, pair.p_x.network, adam(pair)

    def loss(x: Tensor) -> Tensor:
        loc, raw = encoder(x).chunk(2, -1)
        scale = torch.nn.functional.softplus(raw) + 1e-4
        z = loc + scale * torch.randn_like(scale)
        divergence = 0.5 * (loc**2 + scale**2 - 1).sum() - scale.log().sum()
        return (binary_cross_entropy_with_logits(decoder(z), x, reduction="sum") + divergence) / len(x)

    forward = torch.compile(loss) if compiled else loss

    def step(x: Tensor) -> float:
        optimizer.zero_grad()
        value = forward(x)
        value.backward()
        optimizer.step()
        return value.item()

    return step


def adam(pair: pv.Pair) -> torch.optim.Optimizer:
    """Return the fused optimiser."""
    return torch.optim.Adam(pair.parameters(), lr=LEARNING_RATE, fused=True)


def products(hidden: int) -> Callable[[Tensor], object]:
    """Return the five large matrix products of a step alone: two forward, three backward."""
    shapes = [(BATCH, PIXELS, hidden), (BATCH, hidden, PIXELS), (BATCH, PIXELS, hidden)]
    shapes += [(hidden, BATCH, PIXELS), (PIXELS, BATCH, hidden)]
    pairs = [(torch.randn(rows, inner), torch.randn(columns, inner)) for rows, inner, columns in shapes]

    def step(x: Tensor) -> None:
        for left, right in pairs:
            torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], None)

    return step


def summary(seconds: list[float], ours: list[float]) -> dict[str, Any]:
    """Return a row's median in milliseconds, its quartiles, and our median over it."""
    low, median, high = (1000 * q for q in statistics.quantiles(seconds, n=4))
    ratio = 1000 * statistics.median(ours) / median
    return {
        "median_ms": round(median, 4),
        "quartiles_ms": [round(low, 4), round(high, 4)],
        "ours_over_it": round(ratio, 3),
    }


def show(name: str, rows: dict[str, dict[str, Any]]) -> None:
    """Print the table of one size."""
    table = Table("step", "median ms", f"{CAPTURED} ÷ it", title=name)
    for row, figures in rows.items():
        table.add_row(row, f"{figures['median_ms']:.3f}", f"{figures['ours_over_it']:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main(tyro.cli(Options))
