"""Train a denoising VAE on bits of MNIST and see its reconstructions of corrupted digits.

The figure: digits, a corruption of each, and the reconstruction from that corruption by a denoising VAE and by a plain
one; their log-likelihoods against the number of corruptions that the guide mixes over. The text: those log-likelihoods.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from matplotlib.figure import Figure

import pyro_vae as pv
from pyro_vae.networks.mlp import MLP
from pyro_vae.report.figures import save_figure


@dataclass(frozen=True)
class Options:
    """Compare a denoising VAE with a plain one."""

    data_root: str | None = None
    """Folder of the data sets; else $PYRO_VAE_DATA, else the user's cache."""
    epochs: int = 20
    """Passes over the data."""
    size: int = 10_000
    """Number of training data."""
    flips: float = 0.1
    """Probability that the corruption flips a pixel."""
    num_particles: int = 100
    """Draws per datum for the log-likelihood."""
    out: Path = Path("runs/plot_denoising_vae_mnist")
    """Folder of the figure."""


def main(options: Options) -> None:
    """Train, corrupt, reconstruct, evaluate."""
    data = pv.data.load("mnist", options.data_root)
    generator = torch.Generator().manual_seed(0)
    train, test = (pv.data.binarise(x[:n], generator) for x, n in ((data.train, options.size), (data.test, 200)))
    noise, prior = pv.BitFlip(options.flips), pv.StandardNormal(20)
    torch.manual_seed(0)
    networks = [{"encoder": MLP([(1, 28, 28)], 40, (256,)), "decoder": MLP([(20,)], 784, (256,))} for _ in range(2)]
    denoising = pv.models.DenoisingVAE(data.x_shape, prior, noise, corruptions=2, **networks[0])
    pairs = {"denoising VAE": denoising, "VAE": pv.models.VAE(data.x_shape, prior, pv.Bernoulli(), **networks[1])}
    for pair in pairs.values():
        pv.fit(pair, train, epochs=options.epochs, lr=2e-3)

    corrupted = noise(test[:8]).sample()
    with torch.no_grad():
        decoded = {name: pair.p_x(pair.q_z(corrupted).mean).mean for name, pair in pairs.items()}
    rows = {"x": test[:8], "corrupted": corrupted, **decoded}
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.6, 1))
    grid = torch.stack(list(rows.values())).squeeze(2).permute(0, 2, 1, 3).reshape(28 * len(rows), 28 * 8)
    left.imshow(grid.numpy(), cmap="gray", vmin=0, vmax=1)
    left.set(title=f"Reconstructions from corruptions (flips {options.flips:g})", xticks=[])
    left.set(yticks=[14 + 28 * i for i in range(len(rows))], yticklabels=list(rows))
    counts, bounds = [1, 2, 5, 10, 20], []
    for count in counts:
        denoising.corruptions = count
        torch.manual_seed(0)
        bounds.append(float(pv.log_terms(denoising, test, num_particles=20).log_weights.detach().mean()))
    right.plot(counts, bounds, marker="o", label="ELBO, denoising VAE")
    for name, pair in pairs.items():
        ll = pv.log_likelihood(pair, test, num_particles=options.num_particles, seed=0)
        right.axhline(ll.mean, linestyle="--", color="C0" if pair is denoising else "C1", label=f"log p(x), {name}")
        print(f"{name}: {ll}")
    right.set(xlabel="corruptions in the guide, M", ylabel="nats per test datum")
    right.legend(fontsize=8)
    options.out.mkdir(parents=True, exist_ok=True)
    save_figure(figure, options.out / "denoising.png")
    print(f"figure in {options.out}")


if __name__ == "__main__":
    main(tyro.cli(Options))
