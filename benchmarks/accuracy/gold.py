"""Hold settled log-likelihoods against annealing, and against bounds from both sides on simulated data.

    python -m benchmarks.accuracy.gold

The model is the VAE 784–400–40 of :mod:`benchmarks.accuracy.settled`, on one thread.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

import pyro_vae as pv
from benchmarks.accuracy.settled import MODELS, trained_pair
from benchmarks.harness.common import RESULTS, save


@dataclass(frozen=True)
class Options:
    """Evaluate some digits in three ways."""

    size: int = 16
    """Test digits, and simulated ones."""
    temperatures: int = 2000
    """Temperatures of annealing and bounds."""
    chains: int = 16
    """Chains a digit."""
    seed: int = 0
    """Of the draws."""
    data_root: str | None = None
    """Folder of the data sets."""
    results: Path = RESULTS
    """Folder for the results."""


def main(options: Options) -> None:
    """Print both comparisons and save them."""
    started = time.perf_counter()
    torch.set_num_threads(1)
    model = MODELS["mlp"]
    data = pv.data.load(model.data, options.data_root)
    pair = trained_pair("mlp", model, data, 0)
    chains: dict[str, Any] = {
        "num_temperatures": options.temperatures,
        "num_chains": options.chains,
        "seed": options.seed,
    }
    x = pv.data.subset_after_shuffle(data.test, options.size)
    annealed, begun = pv.annealed_log_likelihood(pair, x, start="guide", **chains), time.perf_counter()
    ll = pv.log_likelihood(pair, x, seed=options.seed, progress=False)
    seconds = time.perf_counter() - begun
    difference = ll.per_datum - annealed.per_datum
    errors = torch.hypot(ll.standard_error, annealed.standard_error)
    bounds = pv.bidirectional_log_likelihood(pair, options.size, **chains)
    simulated = pv.log_likelihood(pair, bounds.x, seed=options.seed, progress=False)
    results = {
        "digits": options.size,
        "temperatures": options.temperatures,
        "settled": int(ll.settled.sum()),
        "mean": ll.mean,
        "annealed_mean": annealed.mean,
        "difference": difference.tolist(),
        "errors": [float(error) for error in errors.nan_to_num(posinf=-1.0)],
        "seconds": [begun - started, seconds],
        "simulated": {
            "settled": int(simulated.settled.sum()),
            "lower": float(bounds.lower.mean()),
            "mean": simulated.mean,
            "upper": float(bounds.upper.mean()),
            "outside": int(((simulated.per_datum < bounds.low) | (simulated.per_datum > bounds.high)).sum()),
        },
    }
    print(results)
    save("gold", results, started, options.results)


if __name__ == "__main__":
    main(tyro.cli(Options))
