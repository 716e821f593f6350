"""Train SRVAE on the bundled digits in each reading of q(y | x), and name the quantity that each bound bounds.

The figures: super-resolutions, and samples per mixture component. The text: each reading's log-likelihood with its
label, and the loss's terms by sampling and in closed form.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

import pyro_vae as pv
from pyro_vae.diagnostics.loss_terms import loss_terms
from pyro_vae.report.figures import FIGURES


@dataclass(frozen=True)
class Options:
    """Train SRVAE on digits in three readings."""

    epochs: int = 100
    """Passes over the data."""
    num_particles: int = 500
    """Draws per datum for the log-likelihood."""
    out: Path = Path("runs/plot_srvae_digits")
    """Folder of the figures."""


def main(options: Options) -> None:
    """Train, draw, evaluate."""
    torch.manual_seed(0)
    data = pv.data.load("digits")
    options.out.mkdir(parents=True, exist_ok=True)
    for reading in ("delta", "gaussian", "discretised"):
        pair = pv.models.SRVAE(
            data.x_shape,
            scale=2,
            prior=pv.MixtureOfGaussians(10, 16),
            transition=reading,
            likelihood=pv.DiscretisedLogistic(data.levels),
            levels=data.levels,
        )
        run = pv.fit(pair, data.train, epochs=options.epochs, validation=data.test, lr=2e-3)
        for name in ("loss", "super_resolution", "samples"):
            FIGURES[name](pair, data, run.metrics).savefig(options.out / f"{reading}_{name}.png", dpi=120)

        print(f"\n{reading}: {pv.log_likelihood(pair, data.test, num_particles=options.num_particles)}")
        for column, terms in loss_terms(pair, data.test[:100]).items():
            print(f"  {column:20s}", "  ".join(f"{site} {mean:8.3f} ± {e:.3f}" for site, (mean, e) in terms.items()))
    print(f"figures in {options.out}")


if __name__ == "__main__":
    main(tyro.cli(Options))
