"""Predict the held-out links of a citation network by a variational graph auto-encoder.

Left: the training loss and the ELBO, two different things. Right: the documents' latents on two axes, coloured by a
class that training never saw. The text: area under the ROC curve and average precision of the held-out links.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from matplotlib.figure import Figure

import pyro_vae as pv
from pyro_vae.diagnostics.link_prediction import link_scores
from pyro_vae.objectives.graph import BalancedGraphLoss
from pyro_vae.report.figures import scatter_classes


@dataclass(frozen=True)
class Options:
    """Predict links."""

    network: str = "cora"
    """cora, citeseer, or pubmed, which has no features and takes longer."""
    data_root: str | None = None
    """Folder of the data sets; else $PYRO_VAE_DATA."""
    epochs: int = 200
    """Steps: the whole graph is one datum."""
    seed: int = 0
    """Of the split, the initial values and the draws."""
    out: Path = Path("runs/plot_vgae")
    """Folder of the figure."""


def main(options: Options) -> None:
    """Split, train, predict, draw."""
    graph = pv.data.load_graph(options.network, options.data_root)
    split = pv.data.split_links(graph, seed=options.seed)
    torch.manual_seed(options.seed)
    pair = pv.models.VGAE(graph.num_nodes, pv.StandardNormal(16), graph.features)
    x = split.train.adjacency().unsqueeze(0)
    # The balanced loss looks for links at each step, which no recording does.
    settings = {"epochs": options.epochs, "batch_size": 1, "lr": 0.01, "seed": options.seed, "capture": False}
    run = pv.fit(pair, x, loss=BalancedGraphLoss(), **settings)
    pair.cpu()
    scores = link_scores(*(pair.link_probability(x, pairs) for pairs in (split.test, split.test_absent)))
    print(f"{options.network}, test links: AUC {scores.auc:.3f}, average precision {scores.average_precision:.3f}")
    options.out.mkdir(parents=True, exist_ok=True)
    draw(pair, graph, x, run.metrics).savefig(options.out / "vgae.png", dpi=120)
    print(f"figure in {options.out}")


def draw(pair: pv.models.VGAE, graph: pv.data.Graph, x: torch.Tensor, metrics: list) -> Figure:
    """Draw the training record, and the latents on their principal axes."""
    figure = Figure(figsize=(9.5, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    epochs = [record["epoch"] for record in metrics]
    left.plot(epochs, [record["loss"] for record in metrics], label="balanced loss (training)")
    left.plot(epochs, [sum(record["terms"].values()) for record in metrics], label="−ELBO on log p(A)")
    left.set(xlabel="step", ylabel="nats per graph (millions)", title=f"VGAE, {graph.name}")
    left.yaxis.set_major_formatter(lambda value, _: f"{value / 1e6:g}")
    left.legend()
    with torch.no_grad():
        means = pair.q_z(x).mean[0]
    points = means - means.mean(0)
    scatter_classes(right, points @ torch.linalg.svd(points, full_matrices=False).Vh[:2].mT, graph.labels, size=4)
    right.set(xlabel="first principal axis of E[z | A, X]", ylabel="second", title="documents by their latents")
    return figure


if __name__ == "__main__":
    main(tyro.cli(Options))
