"""What each precision costs on MNIST: nats of the test bound, and seconds per epoch.

    PYRO_VAE_DATA=... python benchmarks/precision.py

A 784–400–20 Bernoulli VAE on binarised digits, from the same initial values over the same batches; the test bound is
computed in float32, or in float64 for the run in float64, so that only training differs. Noise is the same in float32
and bf16-mixed. Other seeds of the same run in float32 say how much of a difference is luck.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
import tyro
from common import keep
from rich.console import Console
from rich.table import Table
from torch import Tensor

import pyro_vae as pv
from pyro_vae.networks import MLP
from pyro_vae.pair import evaluation, log_terms
from pyro_vae.precision import Precision, to_precision
from pyro_vae.randomness import own_random_state

PIXELS, HIDDEN, LATENT = 784, 400, 20
CHUNK = 1000
ROWS: dict[str, tuple[Precision, int]] = {
    "float32": ("float32", 0),
    "float64": ("float64", 0),
    "bf16-mixed": ("bf16-mixed", 0),
    "float32, another seed": ("float32", 1),
    "float32, a third seed": ("float32", 2),
}


@dataclass(frozen=True)
class Options:
    """Train a VAE in every precision."""

    epochs: int = 5
    """Passes over the 60 000 digits."""
    threads: int = 2
    """Threads of every row."""
    device: str = "auto"
    """auto, cpu or cuda; CUDA adds a row with TF32."""


def main(options: Options) -> None:
    """Train every row, print the table and keep the figures."""
    torch.set_num_threads(options.threads)
    started = time.perf_counter()
    device = pv.inputs.resolve_device(options.device)
    digits = pv.data.load("mnist")
    train, test = (pv.data.binarise(x, seed=0).flatten(1) for x in (digits.train, digits.test))
    cases = [(name, precision, seed, False) for name, (precision, seed) in ROWS.items()]
    if device.type == "cuda":
        cases.append(("float32 with TF32", "float32", 0, True))
    rows: dict[str, Any] = {}
    for name, precision, seed, tf32 in cases:
        rows[name] = row(train, test, precision, seed, tf32, options.epochs, device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    results = {"epochs": options.epochs, "threads": options.threads, "device": name, "rows": rows}
    print(f"kept in {keep('precision', results, started)}")
    table = Table("precision", "test −ELBO, nats", "median s per epoch")
    for name, figures in rows.items():
        table.add_row(name, f"{figures['test_negative_elbo']:.3f}", f"{figures['median_seconds']:.2f}")
    Console().print(table)


def row(
    train: Tensor, test: Tensor, precision: Precision, seed: int, tf32: bool, epochs: int, device: torch.device
) -> dict[str, Any]:
    """Train once and return the test bound, its standard error over data, and the seconds of an epoch."""
    torch.manual_seed(seed)
    pair = pv.models.VAE(
        (PIXELS,),
        pv.StandardNormal(LATENT),
        pv.Bernoulli(),
        encoder=MLP([(PIXELS,)], 2 * LATENT, (HIDDEN,)),
        decoder=MLP([(LATENT,)], PIXELS, (HIDDEN,)),
    )
    run = pv.fit(pair, train, epochs=epochs, precision=precision, tf32=tf32, seed=seed, device=device, capture=True)
    x = to_precision(test, precision).to(device)
    with evaluation(pair), own_random_state(0, device):
        parts = [log_terms(pair, part, num_particles=10).log_weights.mean(0) for part in x.split(CHUNK)]
    bound = -torch.cat(parts).double()
    return {
        "test_negative_elbo": float(bound.mean()),
        "standard_error": float(bound.std() / len(bound) ** 0.5),
        # Of the steps alone; the first epoch makes the recording.
        "median_seconds": statistics.median(record["seconds"] for record in run.metrics[1:]),
    }


if __name__ == "__main__":
    main(tyro.cli(Options))
