"""Measure the variance of two estimates of the same gradient: reparameterisation and score function.

The ELBO of a VAE on digits is differentiated by its guide's parameters many times, at one and the same place.
Both estimates have one mean; the score function's scatters orders of magnitude more.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from matplotlib.figure import Figure
from pyro.distributions.testing.fakes import NonreparameterizedNormal
from pyro.infer import Trace_ELBO

import pyro_vae as pv

LATENTS = (1, 2, 5, 10, 20, 40)


@dataclass(frozen=True)
class Options:
    """Compare gradient estimates."""

    draws: int = 300
    """Gradients per estimate and size."""
    epochs: int = 15
    """Passes over the data before the gradient is looked at."""
    out: Path = Path("runs/plot_gradient_variance")
    """Folder of the figure."""


class ScoreGaussian(pv.DiagonalGaussian):
    """The same Gaussian, whose draws are not differentiated: Pyro adds the score function's term instead."""

    def forward(self, outputs: torch.Tensor, event_shape: Any) -> Any:
        normal = super().forward(outputs, event_shape).base_dist
        return NonreparameterizedNormal(normal.loc, normal.scale).to_event(1)


def main(options: Options) -> None:
    """Train, measure, draw."""
    data = pv.data.load("digits")
    total: dict[str, list[float]] = {"score function": [], "reparameterisation": []}
    for size in LATENTS:
        torch.manual_seed(0)
        pair = pv.models.VAE(data.x_shape, pv.StandardNormal(size), pv.DiscretisedLogistic(data.levels))
        pv.fit(pair, data.train, epochs=options.epochs, lr=2e-3, progress=False)
        score = pv.models.VAE(data.x_shape, pv.StandardNormal(size), pv.DiscretisedLogistic(17), ScoreGaussian())
        score.load_state_dict(pair.state_dict())
        for name, p in (("score function", score), ("reparameterisation", pair)):
            total[name].append(variance(p, data.train[:64], options.draws))
        ratio = total["score function"][-1] / total["reparameterisation"][-1]
        print(f"{size:2d} latents: " + ", ".join(f"{n} {v[-1]:.3g}" for n, v in total.items()) + f", ratio {ratio:.0f}")
    ax = (figure := Figure(figsize=(6, 4), layout="constrained")).subplots()
    for name, values in total.items():
        ax.plot(LATENTS, values, "o-", label=name)
    ax.set(xscale="log", yscale="log", xlabel="latents", ylabel="total variance (nats² per datum²)")
    ax.set(xticks=LATENTS, xticklabels=[str(size) for size in LATENTS], title="Gradient of the ELBO, digits")
    ax.minorticks_off()
    ax.legend()
    options.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out / "gradient_variance.png", dpi=120)


def variance(pair: pv.Pair, x: torch.Tensor, draws: int) -> float:
    """Return the sum of the variances of the gradient's entries, of the mean ELBO by the encoder's last layer."""
    last = pair.q_z.network.layers[-1].weight
    gradients = []
    for _ in range(draws):
        loss = Trace_ELBO().differentiable_loss(pair.model, pair.guide, x) / len(x)
        gradients.append(torch.autograd.grad(loss, last)[0].flatten())
    return float(torch.stack(gradients).var(0).sum())


if __name__ == "__main__":
    main(tyro.cli(Options))
