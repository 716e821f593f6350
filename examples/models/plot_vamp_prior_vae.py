"""Train a VAE with a VampPrior on digits, beside the same networks with the prior N(0, I).

The figure: pseudo-inputs as they began, at training data, and as they were learned; the digits that the prior's
component at each of them gives; samples under both priors. The text: log p(x) of test data under both.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

import pyro_vae as pv
from pyro_vae.models.vamp_prior_vae import starting_pseudo_inputs
from pyro_vae.networks.mlp import GatedMLP
from pyro_vae.report.figures import image_grid, save_figure

LATENT = 10


@dataclass(frozen=True)
class Options:
    """Train with a VampPrior and without one on digits."""

    epochs: int = 80
    """Passes over the data."""
    pseudo_inputs: int = 50
    """Components of the VampPrior."""
    num_particles: int = 500
    """Draws per datum for the log-likelihood."""
    out: Path = Path("runs/plot_vamp_prior_vae")
    """Folder of the figure."""


def main(options: Options) -> None:
    """Train both, draw, evaluate."""
    torch.manual_seed(0)
    data = pv.data.load("digits")
    likelihood, start = pv.DiscretisedLogistic(data.levels), starting_pseudo_inputs(data.train, options.pseudo_inputs)

    def networks() -> dict[str, torch.nn.Module]:
        outputs = likelihood.num_outputs(data.x_shape)
        return {
            "encoder": GatedMLP([data.x_shape], 2 * LATENT, (128, 128)),
            "decoder": GatedMLP([(LATENT,)], outputs, (128, 128)),
        }

    vamp = pv.models.VampPriorVAE(start, LATENT, likelihood, **networks())
    plain = pv.models.VAE(data.x_shape, pv.StandardNormal(LATENT), likelihood, **networks())
    for name, pair in (("N(0, I)", plain), ("VampPrior", vamp)):
        pv.fit(pair, data.train, epochs=options.epochs, lr=1e-3, warmup=options.epochs // 4)
        print(f"{name}: {pv.log_likelihood(pair, data.test, num_particles=options.num_particles, seed=0)}")

    with torch.no_grad():
        learned = vamp.pseudo_inputs.detach()[:10]
        decoded = vamp.p_x(vamp.q_z(learned).mean).mean
    rows = {
        "v at first": start[:10],
        "v learned": learned,
        "E[x | z] at v": decoded,
        "VampPrior": pv.generate(vamp, 10, seed=0).mean,
        "N(0, I)": pv.generate(plain, 10, seed=0).mean,
    }
    figure = image_grid(list(rows.values()), list(rows), "Pseudo-inputs, and samples under both priors, digits")
    options.out.mkdir(parents=True, exist_ok=True)
    save_figure(figure, options.out / "vamp_prior.png")
    print(f"figure in {options.out}")


if __name__ == "__main__":
    main(tyro.cli(Options))
