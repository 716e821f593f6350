"""Train VAEs with categorical latents on MNIST in three ways and compare their discrete bounds.

The figure: −ELBO of the discrete model on test data over epochs, for draws relaxed at a falling temperature,
straight-through draws, and the score function; and the effect of single variables of one code on the digit. The text:
log p(x) of each, by importance sampling from the discrete guide.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from matplotlib.figure import Figure

import pyro_vae as pv
from pyro_vae.cli.recipes.categorical_vae import CategoricalVAERecipe
from pyro_vae.networks.mlp import MLP
from pyro_vae.report.figures import save_figure


@dataclass(frozen=True)
class Options:
    """Compare gradients for categorical latents."""

    data_root: str | None = None
    """Folder of the data sets; else $PYRO_VAE_DATA, else the user's cache."""
    epochs: int = 12
    """Passes over the data."""
    size: int = 10_000
    """Number of training data."""
    num_particles: int = 100
    """Draws per datum for the log-likelihood."""
    out: Path = Path("runs/plot_categorical_vae_mnist")
    """Folder of the figure."""


def main(options: Options) -> None:
    """Train, compare, draw."""
    data = pv.data.load("mnist", options.data_root)
    generator = torch.Generator().manual_seed(0)
    train, test = (pv.data.binarise(x[:n], generator) for x, n in ((data.train, options.size), (data.test, 500)))
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.1))
    best = None
    for gradient in ("relaxed", "straight-through", "score-function"):
        torch.manual_seed(0)
        choice = CategoricalVAERecipe(likelihood="bernoulli", gradient=gradient, annealing=options.epochs / 2)
        networks = {"encoder": MLP([(1, 28, 28)], 200, (256,)), "decoder": MLP([(20, 10)], 784, (256,))}
        pair = pv.models.CategoricalVAE(
            data.x_shape, pv.OneHotPrior(20, 10), relaxation=choice.relaxation(), **networks
        )
        run = pv.fit(pair, train, epochs=options.epochs, validation=test, lr=2e-3, loss=choice.loss(pair, len(train)))
        bounds = [record["validation_loss"] for record in run.metrics]
        left.plot(range(1, len(bounds) + 1), bounds, marker="o", markersize=3, label=gradient)
        print(f"{gradient}: {pv.log_likelihood(pair, test, num_particles=options.num_particles, seed=0)}")
        best = min(best or (bounds[-1], pair), (bounds[-1], pair), key=lambda pair_of: pair_of[0])
    left.set(xlabel="epoch", ylabel="−ELBO of the discrete model (nats)", title="Test data, 20 variables of 10 values")
    left.legend()
    # One code, of which one variable after another takes all its values; the four that change the image most are drawn.
    code = pv.posterior(best[1], test[:1], seed=0).latents["z"][0]
    codes = code.repeat(20, 10, 1, 1).reshape(20, 10, 20, 10)
    for i in range(20):
        codes[i, :, i] = torch.eye(10)
    images = pv.generate(best[1], 200, given={"z": codes.flatten(0, 1)}, seed=0).mean.reshape(20, 10, 28, 28)
    chosen = images.var(1).sum((-2, -1)).topk(4).indices
    right.imshow(images[chosen].permute(0, 2, 1, 3).reshape(112, 280).numpy(), cmap="gray", vmin=0, vmax=1)
    right.set(xlabel="value 1 … 10 of that variable", title="E[x | z]: one code, one variable changed")
    right.set(xticks=[], yticks=[14, 42, 70, 98], yticklabels=[f"variable {int(i) + 1}" for i in chosen])
    options.out.mkdir(parents=True, exist_ok=True)
    save_figure(figure, options.out / "categories.png")
    print(f"figure in {options.out}")


if __name__ == "__main__":
    main(tyro.cli(Options))
