"""Train SRVAE on MNIST, 28 × 28 with y = 14 × 14, and draw many x for one y."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

import pyro_vae as pv
from pyro_vae.report.figures import FIGURES


@dataclass(frozen=True)
class Options:
    """Train SRVAE on MNIST with discretised likelihoods."""

    data_root: str | None = None
    """Folder of the data sets; else $PYRO_VAE_DATA, else the user's cache."""
    download: bool = False
    """Fetch MNIST where it is absent."""
    epochs: int = 10
    """Passes over the data."""
    size: int | None = None
    """Number of training data; all by default."""
    num_particles: int = 100
    """Draws per datum for the log-likelihood."""
    out: Path = Path("runs/plot_srvae_mnist")
    """Folder of the figures."""


def main(options: Options) -> None:
    """Train, draw, evaluate."""
    torch.manual_seed(0)
    data = pv.data.load("mnist", options.data_root, download=options.download)
    pair = pv.models.SRVAE(
        data.x_shape,
        scale=2,
        prior=pv.MixtureOfGaussians(10, 16),
        transition="discretised",
        likelihood=pv.DiscretisedLogistic(data.levels),
        levels=data.levels,
    )
    held_out = pv.data.subset_after_shuffle(data.test, min(1000, options.size or 1000))
    batch_size = min(128, options.size or 128)
    run = pv.fit(pair, data.train[: options.size], epochs=options.epochs, batch_size=batch_size, validation=held_out)

    options.out.mkdir(parents=True, exist_ok=True)
    for name, draw in FIGURES.items():
        if (figure := draw(pair, data, run.metrics)) is not None:
            figure.savefig(options.out / f"{name}.png", dpi=120)
    print(f"figures in {options.out}")
    ll = pv.log_likelihood(pair, held_out, num_particles=options.num_particles)
    print(ll)


if __name__ == "__main__":
    main(tyro.cli(Options))
