"""Compare SRVAE in its three readings with a one-stage VAE of equal parameter count on MNIST.

    python -m benchmarks.accuracy.two_stage_mnist --data-root FOLDER

All four put a discretised logistic on x's 256 gray levels. Nats and bits per dimension are comparable. y is 14 × 14.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table

import pyro_vae as pv
from benchmarks.harness.common import save
from pyro_vae.networks.convolutional import ConvDecoder, ConvEncoder

LEVELS = 256
LATENT = 32


@dataclass(frozen=True)
class Options:
    """Train and evaluate all four models."""

    data_root: str | None = None
    """Folder of the data sets; else $PYRO_VAE_DATA, else the user's cache."""
    epochs: int = 10
    """Passes over the data."""
    num_particles: int = 500
    """Importance samples per datum."""
    size: int = 1000
    """Test data of the log-likelihood, after a seeded shuffle."""
    seed: int = 0
    """Of initial values, shuffling and draws."""


def main(options: Options) -> None:
    """Train, evaluate, print a table and save the figures."""
    started = time.perf_counter()
    data = pv.data.load("mnist", options.data_root)
    rows = {}
    for name in ("VAE", "SRVAE, discretised", "SRVAE, gaussian", "SRVAE, delta"):
        torch.manual_seed(options.seed)
        rows[name] = measure(make_pair(name, data.x_shape), data, options)
    results = {"models": rows, "epochs": options.epochs, "seed": options.seed}
    path = save("two_stage_mnist", results, started)
    show(rows)
    print(f"saved in {path}")


def make_pair(name: str, x_shape: tuple[int, ...]) -> pv.Pair:
    """Return one of the four models."""
    if name == "VAE":
        return one_stage_vae(x_shape, num_parameters(two_stage_vae(x_shape, "discretised")))
    reading: Any = name.removeprefix("SRVAE, ")
    return two_stage_vae(x_shape, reading)


def two_stage_vae(x_shape: tuple[int, ...], reading: Literal["delta", "gaussian", "discretised"]) -> pv.Pair:
    """Return SRVAE with u and z of half the one-stage latent's size each."""
    prior = pv.StandardNormal(LATENT // 2)
    return pv.models.SRVAE(x_shape, 2, prior, reading, pv.DiscretisedLogistic(LEVELS), levels=LEVELS)


def one_stage_vae(x_shape: tuple[int, ...], parameters: int) -> pv.Pair:
    """Return the VAE whose hidden width brings its parameter count nearest to the one asked for."""

    def make(hidden: int) -> pv.Pair:
        encoder = ConvEncoder(x_shape, 2 * LATENT, hidden=hidden)
        decoder = ConvDecoder([(LATENT,)], (2 * x_shape[0], *x_shape[1:]), hidden=hidden)
        prior, likelihood = pv.StandardNormal(LATENT), pv.DiscretisedLogistic(LEVELS)
        return pv.models.VAE(x_shape, prior, likelihood, encoder=encoder, decoder=decoder)

    return make(min(range(128, 1024, 4), key=lambda hidden: abs(num_parameters(make(hidden)) - parameters)))


def num_parameters(pair: pv.Pair) -> int:
    """Return the number of parameters."""
    return sum(parameter.numel() for parameter in pair.parameters())


def measure(pair: pv.Pair, data: pv.data.DataSet, options: Options) -> dict[str, Any]:
    """Train a pair and return its bound and its log-likelihood on test data."""
    start = time.perf_counter()
    run = pv.fit(pair, data.train, epochs=options.epochs, validation=data.test, seed=options.seed)
    trained = time.perf_counter()
    x = pv.data.subset_after_shuffle(data.test, options.size, options.seed)
    ll = pv.log_likelihood(pair, x, num_particles=options.num_particles, seed=options.seed)
    return {
        "parameters": num_parameters(pair),
        "quantity": ll.quantity,
        "test_negative_elbo": [record["validation_loss"] for record in run.metrics],
        "log_likelihood": ll.mean,
        "standard_error": ll.mean_standard_error,
        "monte_carlo_error": ll.mean_monte_carlo_error,
        "bits_per_dimension": None if "y)" in ll.quantity else ll.bits_per_dimension,
        "num_particles": options.num_particles,
        "data": options.size,
        "training_seconds": round(trained - start, 1),
        "evaluation_seconds": round(time.perf_counter() - trained, 1),
    }


def show(rows: dict[str, dict[str, Any]]) -> None:
    """Print the table."""
    table = Table("model", "parameters", "quantity", "−ELBO by epoch", "log-likelihood", "bits/dim", "s")
    for name, row in rows.items():
        bits = "–" if row["bits_per_dimension"] is None else f"{row['bits_per_dimension']:.4f}"
        bounds = " ".join(f"{value:.1f}" for value in row["test_negative_elbo"])
        value = f"{row['log_likelihood']:.2f} ± {row['standard_error']:.2f}"
        seconds = str(row["training_seconds"])
        table.add_row(name, str(row["parameters"]), row["quantity"], bounds, value, bits, seconds)
    Console().print(table)


if __name__ == "__main__":
    main(tyro.cli(Options))
