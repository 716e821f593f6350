"""Bend a guide by flows of several kinds: draws for one datum with two latents, and each flow's gain on digits.

The figure: the exact posterior of a two-dimensional latent on a grid, and each trained guide's draws upon it. The text:
−ELBO and log p(x) of test digits with each guide's flow, of the same size otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from matplotlib.figure import Figure

import pyro_vae as pv
from pyro_vae.cli.recipes.flow_vae import FlowVAERecipe
from pyro_vae.report.figures import save_figure

KINDS = ("none", "planar", "sylvester", "autoregressive", "coupling")


@dataclass(frozen=True)
class Options:
    """Train VAEs with two latents and different flows on digits."""

    epochs: int = 40
    """Passes over the data."""
    num_particles: int = 200
    """Draws per datum for the log-likelihood."""
    out: Path = Path("runs/plot_flow_vae")
    """Folder of the figure."""


def main(options: Options) -> None:
    """Train with each flow, draw, evaluate."""
    data = pv.data.load("digits")
    figure = Figure(figsize=(3 * len(KINDS), 3.4), layout="constrained")
    for ax, kind in zip(figure.subplots(1, len(KINDS)), KINDS, strict=True):
        torch.manual_seed(0)
        chosen = {"length": 0} if kind == "none" else {"length": 4, "flow": kind}
        pair = FlowVAERecipe(latent=2, context=16, **chosen).build(data)
        run = pv.fit(pair, data.train, epochs=options.epochs, validation=data.test, lr=2e-3)
        ll = pv.log_likelihood(pair, data.test, num_particles=options.num_particles, seed=0)
        bound = run.metrics[-1]["validation_loss"]
        print(f"{kind}: −ELBO {bound:.2f}, {ll}, gap {bound + ll.mean:.2f} nats")
        draw(ax, pair, data.test[typical(pair, data.test)])
        ax.set(xlabel="z₁", title=f"{kind}, gap {bound + ll.mean:.2f} nats")
    figure.axes[0].set(ylabel="z₂")
    figure.suptitle("p(z | x) of a test digit (blue), its guide's draws (orange); gap: mean of log p(x) − ELBO")
    options.out.mkdir(parents=True, exist_ok=True)
    save_figure(figure, options.out / "posteriors.png")
    print(f"figure in {options.out}")


def typical(pair: pv.Pair, x: torch.Tensor) -> int:
    """Return the datum whose guide is as far from its posterior as that of most, by the spread of its log-weights."""
    spread = pv.posterior(pair, x, num_particles=100, seed=0).log_weights.std(0)
    return int(spread.argsort()[len(x) // 2])


def draw(ax, pair: pv.Pair, x: torch.Tensor) -> None:
    """Draw p(z | x) on a grid around the guide's draws, and the draws."""
    z = pv.posterior(pair, x[None], num_particles=400, seed=0).latents["z"][:, 0]
    centre, half = z.mean(0), 6 * z.std(0).max()
    line = torch.linspace(-1, 1, 120) * half
    points = torch.cartesian_prod(line, line) + centre
    with torch.no_grad():
        log_joint = pair.prior().log_prob(points) + pair.p_x(points).log_prob(x)
    density = (log_joint - log_joint.max()).exp().reshape(120, 120).mT
    sides = [float(centre[i] + sign * half) for i in (0, 1) for sign in (-1, 1)]
    ax.imshow(density.numpy(), origin="lower", extent=sides, cmap="Blues", aspect="auto")
    ax.scatter(z[:, 0].numpy(), z[:, 1].numpy(), s=3, c="tab:orange", alpha=0.6)
    ax.set(xlim=sides[:2], ylim=sides[2:])


if __name__ == "__main__":
    main(tyro.cli(Options))
