"""Measure the cost of each precision on MNIST: nats of the test bound, and time of a step.

    PYRO_VAE_DATA=... python -m benchmarks.accuracy.precision

A 784–400–20 Bernoulli VAE on binarised digits, trained from the same initial values over the same batches; the test
bound is computed in float32, or in float64 for the run in float64: only training differs. Noise is the same in
float32 and bf16-mixed. Other seeds of the run in float32 say how much of a difference is luck. Steps are timed apart,
captured and compiled, in turns: a slow minute of a shared machine affects every precision. Read the ratios.
"""

from __future__ import annotations

import statistics
import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import tyro
from pyro.infer import Trace_ELBO
from rich.console import Console
from rich.table import Table
from torch import Tensor

import pyro_vae as pv
from benchmarks.harness.common import save
from pyro_vae.inspection import inspect
from pyro_vae.networks.mlp import MLP
from pyro_vae.pair.modes import evaluation
from pyro_vae.pair.trace import log_terms
from pyro_vae.runtime.device import resolve_device
from pyro_vae.runtime.random_state import own_random_state
from pyro_vae.training.captured_step import captured_step
from pyro_vae.training.precision import Precision, float32_products, mixed, to_precision

PIXELS, HIDDEN, LATENT = 784, 400, 20
CHUNK = 1000
BATCH = 128
# The first step of a turn finds the caches full of another precision's numbers and is not counted.
TURNS, BLOCK = 30, 11


@dataclass(frozen=True)
class Case:
    """A precision and a seed to train with."""

    precision: Precision
    seed: int = 0
    tf32: bool = False


CASES = {
    "float32": Case("float32"),
    "float64": Case("float64"),
    "bf16-mixed": Case("bf16-mixed"),
    "float32, second seed": Case("float32", seed=1),
    "float32, third seed": Case("float32", seed=2),
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
    """Train every row, time the steps, save the figures and print the table."""
    torch.set_num_threads(options.threads)
    started = time.perf_counter()
    device = resolve_device(options.device)
    cuda = device.type == "cuda"
    digits = pv.data.load("mnist")
    generator = torch.Generator().manual_seed(0)
    train, test = (pv.data.binarise(x, generator).flatten(1) for x in (digits.train, digits.test))
    cases = CASES | ({"float32 with TF32": Case("float32", tf32=True)} if cuda else {})
    rows = {name: trained(case, train, test, options.epochs, device) for name, case in cases.items()}
    timed = {name: case for name, case in cases.items() if case.seed == 0}
    for name, milliseconds in step_times(timed, train[:BATCH], device).items():
        rows[name]["median_ms"] = round(milliseconds, 4)
    settings = {"epochs": options.epochs, "threads": options.threads, "steps": TURNS * (BLOCK - 1)}
    settings["device"] = torch.cuda.get_device_name(device) if cuda else "CPU"
    print(f"saved in {save('precision', settings | {'rows': rows}, started)}")
    table = Table("precision", "test −ELBO, nats", "median ms")
    for name, row in rows.items():
        table.add_row(name, f"{row['test_negative_elbo']:.3f}", f"{row.get('median_ms', float('nan')):.3f}")
    Console().print(table)


def make_pair(case: Case) -> pv.models.VAE:
    """Return the pair before training."""
    torch.manual_seed(case.seed)
    encoder, decoder = MLP([(PIXELS,)], 2 * LATENT, (HIDDEN,)), MLP([(LATENT,)], PIXELS, (HIDDEN,))
    return pv.models.VAE((PIXELS,), pv.StandardNormal(LATENT), pv.Bernoulli(), encoder=encoder, decoder=decoder)


def trained(case: Case, train: Tensor, test: Tensor, epochs: int, device: torch.device) -> dict[str, float]:
    """Train once and return the test bound and its standard error over data."""
    pair = make_pair(case)
    options: dict[str, Any] = {"precision": case.precision, "tf32": case.tf32, "seed": case.seed}
    pv.fit(pair, train, epochs=epochs, batch_size=BATCH, device=device, capture=True, **options)
    x = to_precision(test, case.precision).to(device)
    with evaluation(pair), own_random_state(0, device):
        parts = [log_terms(pair, part, num_particles=10).log_weights.mean(0) for part in x.split(CHUNK)]
    bound = -torch.cat(parts).double()
    error = float(bound.std() / len(bound) ** 0.5)
    return {"test_negative_elbo": round(float(bound.mean()), 4), "standard_error": round(error, 4)}


def step_times(cases: dict[str, Case], x: Tensor, device: torch.device) -> dict[str, float]:
    """Return each precision's median milliseconds of a captured, compiled step."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    steps = {}
    for name, case in cases.items():
        pair = to_precision(make_pair(case), case.precision).to(device)
        rows = to_precision(x, case.precision).to(device)
        optimizer = torch.optim.Adam(pair.parameters(), lr=1e-3, fused=True)
        narrow = list(inspect(pair, (rows,)).networks) if case.precision == "bf16-mixed" else []
        steps[name] = captured_step(pair, Trace_ELBO(), optimizer, compiled=True), rows, narrow
    for turn in range(1 + TURNS):
        for name, (step, rows, narrow) in steps.items():
            with ExitStack() as stack:
                stack.enter_context(float32_products(device, cases[name].tf32))
                stack.enter_context(mixed(narrow, device))
                for i in range(BLOCK):
                    start = time.perf_counter()
                    float(step(rows))
                    # The first turn records and compiles.
                    if turn and i:
                        seconds[name].append(time.perf_counter() - start)
    return {name: 1000 * statistics.median(values) for name, values in seconds.items()}


if __name__ == "__main__":
    main(tyro.cli(Options))
