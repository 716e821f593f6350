"""Cluster digits without their labels by a VAE whose latent belongs to one of ten clusters.

The pair is trained briefly, its clusters are started on the encoded data, and it is trained on. The figure: samples of
each cluster, and how the clusters divide the classes, which training never saw.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from matplotlib.figure import Figure
from sklearn.metrics import normalized_mutual_info_score

import pyro_vae as pv
from pyro_vae.diagnostics.clustering import clustering_accuracy, contingency


@dataclass(frozen=True)
class Options:
    """Cluster digits."""

    epochs: int = 120
    """Passes over the data; a third of them come before the clusters are started."""
    out: Path = Path("runs/plot_gaussian_mixture_vae")
    """Folder of the figure."""


def main(options: Options) -> None:
    """Train, cluster, draw."""
    torch.manual_seed(0)
    data = pv.data.load("digits")
    prior = pv.MixtureOfGaussians(10, 10)
    pair = pv.models.GaussianMixtureVAE(data.x_shape, prior, pv.ContinuousBernoulli())
    early = max(1, options.epochs // 3)
    # A light divergence at first: the latents may spread, and clusters show that N(0, I) would press together.
    pv.fit(pair, data.train, epochs=early, lr=2e-3, beta=0.1)
    pair.start_clusters(data.train)
    pv.fit(pair, data.train, epochs=max(1, options.epochs - early), lr=2e-3, seed=1)

    clusters = pair.responsibilities(data.test).argmax(-1)
    accuracy = clustering_accuracy(clusters, data.test_labels)
    nmi = normalized_mutual_info_score(data.test_labels.numpy(), clusters.numpy())
    options.out.mkdir(parents=True, exist_ok=True)
    draw(pair, contingency(clusters, data.test_labels), accuracy).savefig(options.out / "clusters.png", dpi=120)
    print(f"test digits: clustering accuracy {accuracy:.3f}, normalised mutual information {nmi:.3f}")
    print(pv.log_likelihood(pair, data.test, num_particles=200, seed=0))
    print(f"figure in {options.out}")


def draw(pair: pv.models.GaussianMixtureVAE, counts: torch.Tensor, accuracy: float) -> Figure:
    """Draw samples by cluster beside the table of clusters and classes, both in the order of the clusters' class."""
    counts = torch.cat([counts, counts.new_zeros(10 - len(counts), counts.shape[1])])
    order = counts.argmax(1).argsort(stable=True)
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    given = {"c": order.repeat_interleave(10)}
    images = pv.generate(pair, 100, given=given, seed=0).mean.reshape(10, 10, 8, 8)
    # Cells a pixel apart: neighbours stay separate.
    cells = torch.nn.functional.pad(images, (1, 1, 1, 1), value=1.0)
    left.imshow(cells.permute(0, 2, 1, 3).reshape(100, 100).numpy(), cmap="gray", vmin=0, vmax=1)
    left.set(title="E[x | z], z from each cluster", ylabel="cluster", xticks=[], yticks=[10 * k + 5 for k in range(10)])
    left.set_yticklabels([str(int(k)) for k in order])
    image = right.imshow(counts[order].numpy(), cmap="viridis")
    right.set(title=f"test digits, clustering accuracy {accuracy:.2f}", xlabel="class", ylabel="cluster")
    right.set(xticks=range(10), yticks=range(10), yticklabels=[str(int(k)) for k in order])
    figure.colorbar(image, ax=right, label="test digits")
    return figure


if __name__ == "__main__":
    main(tyro.cli(Options))
