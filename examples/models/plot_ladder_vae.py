"""Train ladders of three layers on digits, with a warm-up of β, batch norm and free bits, and see which are used.

The figure: each layer's KL over the epochs, and samples whose upper layers are held fixed. The text: each layer's KL on
test data, and log p(x).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from matplotlib.figure import Figure

import pyro_vae as pv
from pyro_vae.report.figures import image_grid, save_figure

SIZES = (16, 8, 4)


@dataclass(frozen=True)
class Options:
    """Train ladder VAEs on digits."""

    epochs: int = 60
    """Passes over the data."""
    free_bits: float = 2.0
    """Nats that each layer has for free in the last two runs."""
    num_particles: int = 200
    """Draws per datum for the log-likelihood."""
    out: Path = Path("runs/plot_ladder_vae")
    """Folder of the figures."""


def main(options: Options) -> None:
    """Train once in each way, draw, evaluate."""
    data, rise, free_bits = pv.data.load("digits"), options.epochs // 2, pv.objectives.free_bits
    ways: dict[str, Callable[[Any], dict[str, Any]]] = {
        "plain ELBO": lambda pair: {},
        "warm-up": lambda pair: {"warmup": rise},
        "warm-up, batch norm": lambda pair: {"warmup": rise},
        "free bits": lambda pair: {"loss": free_bits(options.free_bits)},
        "free bits and warm-up": lambda pair: {"loss": free_bits(options.free_bits, pair.beta)},
    }
    figure = Figure(figsize=(15, 3.2), layout="constrained")
    for ax, (name, way) in zip(figure.subplots(1, len(ways), sharey=True), ways.items(), strict=True):
        torch.manual_seed(0)
        networks = {"hidden": (128, 64, 32), "batch_norm": "batch norm" in name}
        pair = pv.models.LadderVAE(data.x_shape, SIZES, pv.DiscretisedLogistic(data.levels), **networks)
        # It rises in every run, and weighs the divergences of the last.
        pair.beta = pv.Annealed(0.0, 1.0, rise)
        run = pv.fit(pair, data.train, epochs=options.epochs, validation=data.test, lr=2e-3, **way(pair))
        for layer in range(len(SIZES), 0, -1):
            divergences = [record["terms"][f"z{layer}"] for record in run.metrics]
            ax.plot([record["epoch"] for record in run.metrics], divergences, label=f"z{layer}")
        ax.set(xlabel="epoch", title=name)
        ax.grid(alpha=0.3)
        ll = pv.log_likelihood(pair, data.test, num_particles=options.num_particles, seed=0)
        report = pv.collapse_report(pair, data.test, seed=0)
        print(f"{name}: {ll}; KL " + ", ".join(f"{site} {r.kl:.2f}" for site, r in report.sites.items()) + " nats")
    figure.axes[0].set(ylabel="KL on test data (nats per datum)")
    figure.axes[-1].legend()
    options.out.mkdir(parents=True, exist_ok=True)
    save_figure(figure, options.out / "layers.png")

    top = pv.generate(pair, 4, seed=2).latents
    rows = []
    for fixed in (("z3",), ("z3", "z2"), ("z3", "z2", "z1")):
        given = {site: top[site][:1].expand(10, -1) for site in fixed}
        rows.append(pv.generate(pair, 10, given=given, seed=1).mean)
    labels = ["z3 fixed", "z3, z2 fixed", "all fixed"]
    save_figure(image_grid(rows, labels, f"Samples, digits, {name}"), options.out / "samples.png")
    print(f"figures in {options.out}")


if __name__ == "__main__":
    main(tyro.cli(Options))
