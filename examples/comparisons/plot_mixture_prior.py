"""Compare the three divergences of a Gaussian from a mixture, and cluster digits by a mixture prior's responsibilities.

Left: KL ≤ variational ≤ convex bound, as a Gaussian moves between two components. Right: how the components of a
trained SRVAE's prior divide the classes, which training never saw.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pyro.distributions as dist
import torch
import tyro
from matplotlib.figure import Figure

import pyro_vae as pv
from pyro_vae.distributions.mixtures import GaussianMixture


@dataclass(frozen=True)
class Options:
    """Draw divergences from a mixture, and clusters."""

    epochs: int = 150
    """Passes over the data."""
    out: Path = Path("runs/plot_mixture_prior")
    """Folder of the figure."""


def main(options: Options) -> None:
    """Draw both panels."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    divergences(left)
    clusters(right, options.epochs)
    options.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out / "mixture_prior.png", dpi=120)
    print(f"figure in {options.out}")


def divergences(ax) -> None:
    """Draw the three divergences of N(m, 0.5²) from ½ N(−2, 1) + ½ N(2, 1)."""
    means = torch.linspace(-5, 5, 201)
    q = dist.Normal(means[:, None], 0.5).to_event(1)
    components = dist.Normal(torch.tensor([[-2.0], [2.0]]), torch.ones(2, 1)).to_event(1)
    mixture = GaussianMixture(dist.Categorical(logits=torch.zeros(2)), components)
    ax.plot(means.numpy(), pv.convex_kl_bound(q, mixture).numpy(), label="convex bound")
    ax.plot(means.numpy(), pv.variational_kl_bound(q, mixture).numpy(), label="variational bound")
    ax.plot(means.numpy(), pv.monte_carlo_kl(q, mixture, num_particles=10_000).numpy(), "k:", label="KL, 10 000 draws")
    ax.set(xlabel="mean of q = N(m, 0.5²)", ylabel="divergence from ½N(−2, 1) + ½N(2, 1) (nats)")
    ax.legend()


def clusters(ax, epochs: int) -> None:
    """Train SRVAE on digits and draw how its components divide the classes."""
    torch.manual_seed(0)
    data = pv.data.load("digits")
    pair = pv.models.SRVAE(data.x_shape, scale=2, prior=pv.MixtureOfGaussians(10, 8), transition="delta")
    pv.fit(pair, data.train, epochs=epochs, lr=3e-3)
    u = pv.posterior(pair, data.test, num_particles=20).latents["u"]
    responsibilities = pair.prior.responsibilities(u).mean(0).detach().cpu()
    share = torch.stack([responsibilities[data.test_labels == digit].mean(0) for digit in range(10)])
    image = ax.imshow(share.numpy(), cmap="viridis", vmin=0, vmax=1)
    ax.figure.colorbar(image, ax=ax, label="mean responsibility")
    ax.set(xlabel="component of the prior on u", ylabel="class", xticks=range(10), yticks=range(10))


if __name__ == "__main__":
    main(tyro.cli(Options))
