"""Train a one-stage VAE on the bundled digits and draw its reconstructions and samples.

The figure: the training record, reconstructions and samples; the text: log p(x) by importance sampling from the guide
beside naive Monte Carlo from the prior, with the same number of draws.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

import pyro_vae as pv
from pyro_vae.report.figures import FIGURES


@dataclass(frozen=True)
class Options:
    """Train a one-stage VAE on digits."""

    epochs: int = 100
    """Passes over the data."""
    num_particles: int = 500
    """Draws per datum for the log-likelihood."""
    out: Path = Path("runs/plot_vae_digits")
    """Folder of the figures."""


def main(options: Options) -> None:
    """Train, draw, evaluate."""
    torch.manual_seed(0)
    data = pv.data.load("digits")
    pair = pv.models.VAE(data.x_shape, pv.StandardNormal(16), pv.DiscretisedLogistic(data.levels))
    run = pv.fit(pair, data.train, epochs=options.epochs, validation=data.test, lr=2e-3)

    options.out.mkdir(parents=True, exist_ok=True)
    for name in ("loss", "reconstructions", "samples", "latent_map"):
        FIGURES[name](pair, data, run.metrics).savefig(options.out / f"{name}.png", dpi=120)
    print(f"figures in {options.out}")

    ll = pv.log_likelihood(pair, data.test, num_particles=options.num_particles)
    print(f"importance sampling: {ll}")
    print(f"naive Monte Carlo: {pv.naive_log_likelihood(pair, data.test, num_particles=options.num_particles)}")


if __name__ == "__main__":
    main(tyro.cli(Options))
