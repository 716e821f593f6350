"""Train by ``fit`` and evaluate, as one of the processes that torchrun started; the first prints one line of JSON."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import tyro
from torch import nn

import pyro_vae as pv
from benchmarks.harness import steps
from benchmarks.harness.common import FAST
from benchmarks.harness.side_by_side import timed
from pyro_vae.likelihood.shared import shared_log_likelihood
from pyro_vae.runtime.distributed import join


@dataclass(frozen=True)
class Options:
    """Train and evaluate."""

    batch: int
    """Data per step and process."""
    data: int
    """Training data."""
    evaluated: int
    """Data whose log-likelihood is estimated."""
    num_particles: int
    """Draws per datum of that."""
    threads: int
    """Threads of each process."""
    epochs: int = 3
    """Epochs; the first one, which records and compiles, is told apart."""


class Clock(nn.Module):
    """Records the time at the end of every epoch, as a module with a ``monitor``."""

    def monitor(self) -> float:
        """Return it in seconds."""
        return time.perf_counter()


def main(options: Options) -> None:
    """Train, evaluate twice, the second time without what is done once, and print the seconds."""
    torch.set_num_threads(options.threads)
    pair = steps.vae(400, 20)
    # Every process has the same data, by the same seed.
    x = torch.rand(options.data, steps.PIXELS).gt(0.7).float()
    pair.clock = Clock()
    training: dict[str, Any] = {**FAST, "lr": steps.LEARNING_RATE, "progress": False}
    run = pv.fit(pair, x, epochs=options.epochs, batch_size=options.batch, **training)
    processes = join(steps.DEVICE)

    def estimate(part: torch.Tensor, seed: int) -> pv.LogLikelihood:
        count = options.num_particles
        return pv.log_likelihood(
            pair, part, num_particles=count, seed=seed, progress=False, capture=False, proposal="guide"
        )

    def evaluate() -> None:
        # Every process returns with the values of all of them, and so ends when the last one does.
        shared_log_likelihood(processes, estimate, x[: options.evaluated], seed=0)

    first, second = timed(evaluate), timed(evaluate)
    ends = [record["monitor"]["clock"] for record in run.metrics]
    record = {
        "first_epoch": run.metrics[0]["seconds"],
        "epochs": [later - earlier for earlier, later in pairwise(ends)],
        "first_evaluation": first,
        "evaluations": [second],
    }
    if processes.is_first:
        print(json.dumps(record))


if __name__ == "__main__":
    main(tyro.cli(Options))
