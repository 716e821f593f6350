"""Fit probabilistic PCA to digits by EM, by Monte Carlo EM and by SVI, and draw their bounds against seconds.

EM alternates the exact posterior and the exact maximiser. Monte Carlo EM keeps the maximiser and draws the posterior by
NUTS. SVI follows the gradient of both, with an amortised guide. The dotted line is the likelihood's closed maximum.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from matplotlib.figure import Figure
from pyro.infer import MCMC, NUTS
from sklearn.decomposition import PCA

import pyro_vae as pv
from pyro_vae.models.linear_gaussian import LatentMoments, LinearGaussianVAE
from pyro_vae.networks.mlp import MLP


@dataclass(frozen=True)
class Options:
    """Compare EM, Monte Carlo EM and SVI."""

    size: int = 300
    """Number of digits."""
    epochs: int = 400
    """Passes of SVI over the data."""
    draws: int = 20
    """Posterior draws in a Monte Carlo E-step."""
    out: Path = Path("runs/plot_em")
    """Folder of the figure."""


def main(options: Options) -> None:
    x = pv.data.load("digits").train[: options.size].flatten(1)
    torch.manual_seed(0)
    run = pv.em(LinearGaussianVAE(64, 2), x, tolerance=1e-6)
    curves = {"EM, after each E-step": (run.seconds, run.after_e)}
    curves["Monte Carlo EM (NUTS), log p(x)"] = monte_carlo_em(x, options.draws)
    networks = {"encoder": MLP([(64,)], 4, hidden=()), "decoder": MLP([(2,)], 64, hidden=())}
    pair = pv.models.VAE((64,), pv.StandardNormal(2), **networks)
    fitted = pv.fit(pair, x, epochs=options.epochs, batch_size=50, lr=1e-2, validation=x, device="cpu")
    seconds = torch.tensor([record["seconds"] for record in fitted.metrics]).cumsum(0).tolist()
    curves["SVI (Adam), ELBO"] = (seconds, [-record["validation_loss"] for record in fitted.metrics])
    maximum = PCA(2).fit(x.double().numpy()).score(x.double().numpy())
    figure = Figure(figsize=(7, 4), layout="constrained")
    ax = figure.subplots()
    for name, (at, bounds) in curves.items():
        ax.plot(at[1:], bounds[1:], ".-", markersize=4, linewidth=1, label=name)
        print(f"{name}: {bounds[-1]:.3f} nats after {at[-1]:.2f} s; maximum {maximum:.3f}")
    ax.axhline(maximum, color="black", linestyle=":", label="maximum of log p(x)")
    ax.set(xscale="log", xlabel="seconds", ylabel="nats per digit", title="Probabilistic PCA of digits, two latents")
    ax.set_ylim(maximum - 12, maximum + 1)
    ax.legend()
    options.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out / "em.png", dpi=120)


def monte_carlo_em(x: torch.Tensor, draws: int, steps: int = 20) -> tuple[list[float], list[float]]:
    """Return seconds and mean log p(x) before each of the steps, and after the last."""
    torch.manual_seed(0)
    pair, start = LinearGaussianVAE(64, 2), time.perf_counter()
    seconds, bounds = [0.0], [float(pair.exact_log_likelihood(x).detach().mean())]
    for _ in range(steps):
        sampler = MCMC(NUTS(pair.model), draws, warmup_steps=20, disable_progbar=True)
        sampler.run(x)
        z = sampler.get_samples()["z"]
        covariance = torch.einsum("kbl,kbm->blm", z - z.mean(0), z - z.mean(0)) / draws
        pair.m_step(x, LatentMoments(z.mean(0), covariance))
        seconds.append(time.perf_counter() - start)
        bounds.append(float(pair.exact_log_likelihood(x).detach().mean()))
    return seconds, bounds


if __name__ == "__main__":
    main(tyro.cli(Options))
