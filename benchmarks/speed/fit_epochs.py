"""Train by ``fit``, an epoch for each line read, whole as a user waits for it. Answers ``launch.Peer``.

python -m benchmarks.speed.fit_epochs KIND BATCH PIXELS HIDDEN LATENT DATA THREADS
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import pyro_vae as pv
from benchmarks.harness import steps
from benchmarks.harness.peers import launch
from benchmarks.harness.peers.turns import turns

KINDS: dict[str, dict[str, Any]] = {
    "fit, captured, compiled": {"capture": True, "compiled": True},
    "fit, captured": {"capture": True},
    "fit, eager": {"capture": False},
    "fit, captured, compiled, bf16": {"capture": True, "compiled": True, "precision": "bf16-mixed"},
}
# The process is ended from outside.
EPOCHS = 10**9


class Between(nn.Module):
    """Is called by ``fit`` between two epochs, as a module with a ``monitor``."""

    def __init__(self, epochs: Iterator[None]) -> None:
        super().__init__()
        self.epochs = epochs

    def monitor(self) -> None:
        """Let an epoch end and the next begin, once it is asked for."""
        next(self.epochs)


def start(kind: str, *sizes: int, threads: int) -> launch.Peer:
    """Start this script."""
    return launch.Peer(Path(sys.executable), __name__, kind, *sizes, threads=threads)


def main(kind: str, batch: int, pixels: int, hidden: int, latent: int, data: int, threads: int) -> None:
    """Train until the process is ended; the first epoch may record and compile."""
    torch.set_num_threads(threads)
    pair = steps.vae(hidden, latent, pixels)
    x = torch.rand(data, pixels).gt(0.7).float()
    pair.between = Between(turns({"version": pv.__version__}, time.perf_counter()))
    pv.fit(pair, x, epochs=EPOCHS, batch_size=batch, lr=steps.LEARNING_RATE, progress=False, **KINDS[kind])


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
