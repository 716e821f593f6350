"""Hand three VAEs of digits to ArviZ: posteriors of the latents, a posterior-predictive check, and which predicts best.

Left: where ten test digits' latents lie. Middle: how much ink replicated digits have, beside the data. Right: log p(x)
of held-out digits by size of z and prior, with the paired error of each difference from the best.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from matplotlib.figure import Figure

import pyro_vae as pv

# ArviZ 0.23 announces its successor when it is imported, and calls functions that pandas will remove.
warnings.filterwarnings("ignore", category=FutureWarning, module="arviz")
warnings.filterwarnings("ignore", category=DeprecationWarning, message="The inplace keyword")
import arviz as az  # noqa: E402


@dataclass(frozen=True)
class Options:
    """Compare VAEs on digits through ArviZ."""

    epochs: int = 60
    """Passes over the data."""
    size: int = 360
    """Test digits to compare on."""
    out: Path = Path("runs/plot_arviz")
    """Folder of the figure."""


def main(options: Options) -> None:
    """Train, export, draw, compare."""
    torch.manual_seed(0)
    data = pv.data.load("digits")
    priors = {"2": pv.StandardNormal(2), "8": pv.StandardNormal(8), "8, mixture": pv.MixtureOfGaussians(10, 8)}
    pairs = {name: pv.models.VAE(data.x_shape, p, pv.DiscretisedLogistic(data.levels)) for name, p in priors.items()}
    for pair in pairs.values():
        pv.fit(pair, data.train, epochs=options.epochs, lr=2e-3)
    held_out = {name: pv.log_likelihood(pair, data.test[: options.size], seed=0) for name, pair in pairs.items()}
    comparison = az.compare({name: pv.to_elpd(ll) for name, ll in held_out.items()})
    print(comparison[["elpd_diff", "dse"]])
    exported = pv.to_arviz(pairs["2"], data.test[:100], num_draws=200, seed=0)
    left, middle, right = (figure := Figure(figsize=(12, 3.8), layout="constrained")).subplots(1, 3)
    posteriors(left, exported["posterior"], data.test_labels)
    ink(middle, exported)
    behind, error = (comparison[column].abs() / options.size for column in ("elpd_diff", "dse"))
    right.errorbar(behind, comparison.index, xerr=error, fmt="o", capsize=4)
    right.set(xlabel="nats per digit behind the best (± paired error)", ylabel="latents", title="held-out log p(x)")
    options.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out / "arviz.png", dpi=120)
    print(f"figure in {options.out}")


def posteriors(ax, posterior, labels) -> None:
    """Draw the posterior of the two latents for ten digits."""
    for datum in range(10):
        z = posterior["z"].sel(chain=0, datum=datum).values.T
        ax.scatter(*z, s=3, alpha=0.4, color=f"C{datum}")
        ax.text(*z.mean(1), int(labels[datum]), weight="bold", ha="center", va="center")
    ax.set(xlabel="z₀", ylabel="z₁", title="posterior of z, ten test digits")


def ink(ax, exported) -> None:
    """Draw how the mean pixel varies over digits, observed and replicated."""
    pixels = ("x_channel", "x_row", "x_column")
    replicated = exported["posterior_predictive"]["x"].mean(pixels).sel(chain=0)
    for draw in replicated.isel(draw=slice(None, None, 4)):
        ax.ecdf(draw, color="C0", alpha=0.2)
    ax.ecdf(exported["observed_data"]["x"].mean(pixels), color="k")
    ax.set(xlabel="mean pixel of a digit (black: observed)", ylabel="share of digits below", title="predictive check")


if __name__ == "__main__":
    main(tyro.cli(Options))
