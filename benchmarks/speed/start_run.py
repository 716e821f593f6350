"""Start ``fit`` and ``log_likelihood`` a few times; print seconds and program runs as one line of JSON.

Use public names only: ``benchmarks.speed.start`` runs this on older versions of the package too.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.networks import MLP

ROUNDS = 5
# Enough steps that ``fit`` captures by default.
DATA, BATCH, PARTICLES = 2560, 128, 10


class StartedError(Exception):
    """Raised to end a call as soon as its first step or chunk is there."""


class FirstStep(torch.optim.Adam):
    """Ends the training at its first update."""

    def step(self, closure: Any = None) -> None:
        """End it."""
        raise StartedError


def vae() -> tuple[pv.Pair, Tensor]:
    """Return a Bernoulli VAE, 784–400–20, and random binary data."""
    encoder, decoder = MLP([(784,)], 40, (400,)), MLP([(20,)], 784, (400,))
    pair = pv.models.VAE((784,), pv.StandardNormal(20), pv.Bernoulli(), encoder=encoder, decoder=decoder)
    return pair, torch.rand(DATA, 784).gt(0.7).float()


def srvae() -> tuple[pv.Pair, Tensor]:
    """Return an SRVAE of 8 × 8 images with 17 gray levels, and random ones."""
    prior, likelihood = pv.MixtureOfGaussians(10, 16), pv.DiscretisedLogistic(17)
    pair = pv.models.SRVAE((1, 8, 8), 2, prior, "discretised", likelihood, levels=17)
    return pair, torch.randint(17, (DATA, 1, 8, 8)) / 16


def counted(pair: pv.Pair) -> Counter[str]:
    """Count from now on how often the pair's two programs run."""
    runs: Counter[str] = Counter()

    def counting(name: str) -> Callable[..., Any]:
        def program(self: pv.Pair, *batch: Tensor) -> Any:
            runs[name] += 1
            return getattr(super(type(self), self), name)(*batch)

        return program

    pair.__class__ = type(type(pair).__name__, (type(pair),), {name: counting(name) for name in ("guide", "model")})
    return runs


def fit(pair: pv.Pair, x: Tensor, **settings: Any) -> None:
    """Train until the first update of the parameters."""

    def optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return FirstStep(parameters, lr=1e-3)

    pv.fit(pair, x, epochs=20, batch_size=BATCH, optimizer=optimizer, progress=False, **settings)


def log_likelihood(pair: pv.Pair, x: Tensor) -> None:
    """Estimate one datum, which is one chunk whether a version computes data together or one by one."""

    def ended(done: int, total: int) -> None:
        if done:
            raise StartedError

    pv.log_likelihood(pair, x[:1], num_particles=PARTICLES, seed=0, progress=ended, capture=False, proposal="guide")


CALLS: dict[str, Callable[[pv.Pair, Tensor], None]] = {
    "fit": fit,
    "fit, eager": lambda pair, x: fit(pair, x, capture=False),
    "log_likelihood": log_likelihood,
}


def measured(make: Callable[[], tuple[pv.Pair, Tensor]], call: Callable[[pv.Pair, Tensor], None]) -> dict[str, Any]:
    """Return the median seconds to the first step or chunk, and the runs of each program before it."""
    seconds: list[float] = []
    # The processor's time, which other programs on the machine disturb less.
    busy: list[float] = []
    runs: Counter[str] = Counter()
    # The first one is not counted: it also imports and fills caches.
    for _ in range(ROUNDS + 1):
        torch.manual_seed(0)
        pair, x = make()
        runs = counted(pair)
        start, start_busy = time.perf_counter(), time.process_time()
        try:
            call(pair, x)
        except StartedError:
            seconds.append(time.perf_counter() - start)
            busy.append(time.process_time() - start_busy)
    low, median, high = statistics.quantiles(seconds[1:], n=4)
    return {
        "median_ms": round(1000 * median, 1),
        "processor_ms": round(1000 * statistics.median(busy[1:]), 1),
        "quartiles_ms": [round(1000 * low, 1), round(1000 * high, 1)],
        "guide_runs": runs["guide"],
        "model_runs": runs["model"],
    }


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[1]))
    warnings.simplefilter("ignore")
    pairs = {"VAE, 784–400–20": vae, "SRVAE, 8 × 8": srvae}
    found = {name: {label: measured(make, call) for label, call in CALLS.items()} for name, make in pairs.items()}
    print(json.dumps({"package": pv.__file__, "cases": found}))
