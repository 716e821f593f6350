"""Estimate the log-likelihoods of test digits from the guide and from fitted proposals.

    python -m benchmarks.accuracy.settled

A 784–400–20 VAE of binarised MNIST. Times are those of one thread, for each datum; the rows take turns once.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

import pyro_vae as pv
from benchmarks.harness.common import RESULTS, save

ROWS: tuple[tuple[Literal["guide", "auto"], int], ...] = (
    ("guide", 1000),
    ("guide", 5000),
    ("auto", 100),
    ("auto", 1000),
)


@dataclass(frozen=True)
class Options:
    """Train the VAE, then evaluate it in several ways."""

    size: int = 200
    """Test digits."""
    epochs: int = 10
    """Passes over the 60 000 training digits."""
    seed: int = 0
    """Of training and draws."""
    results: Path = RESULTS
    """Folder for the results."""


def main(options: Options) -> None:
    """Print a row for each estimate, and save them."""
    started = time.perf_counter()
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    data = pv.data.load("mnist", os.environ.get("PYRO_VAE_DATA"))
    train, test = ((part > 0.5).float() for part in (data.train, data.test[: options.size]))
    shape = (1, 28, 28)
    pair = pv.models.VAE(
        shape,
        pv.StandardNormal(20),
        pv.Bernoulli(),
        encoder=pv.networks.MLP([shape], 40, (400,)),
        decoder=pv.networks.MLP([(20,)], 784, (400,)),
    )
    pv.fit(pair, train, epochs=options.epochs, seed=options.seed)
    rows = [measured(pair, test, *row, options.seed) for row in ROWS]
    for row in rows:
        print(row)
    save("settled", {"rows": rows, "seed": options.seed, "epochs": options.epochs}, started, options.results)


def measured(
    pair: pv.Pair, x: torch.Tensor, proposal: Literal["guide", "auto"], count: int, seed: int
) -> dict[str, Any]:
    """Return the estimate by one proposal."""
    began = time.perf_counter()
    ll = pv.log_likelihood(pair, x, num_particles=count, seed=seed, proposal=proposal)
    return {
        "proposal": proposal,
        "num_particles": count,
        "data": len(x),
        "mean": ll.mean,
        "monte_carlo_error": ll.mean_monte_carlo_error,
        "share_settled": float(ll.settled.double().mean()),
        "fitted": None if ll.fitted is None else int(ll.fitted.sum()),
        "median_ess": float(ll.ess.median()),
        "milliseconds_per_datum": 1000 * (time.perf_counter() - began) / len(x),
    }


if __name__ == "__main__":
    main(tyro.cli(Options))
