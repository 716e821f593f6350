"""How the command line builds and trains this model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from pyro_vae.cli.recipes.common import make_prior
from pyro_vae.cli.training import GraphTraining
from pyro_vae.data import DataSet, load_links
from pyro_vae.diagnostics.link_prediction import link_scores
from pyro_vae.models.vgae import VGAE
from pyro_vae.objectives.graph import BalancedGraphLoss

__all__ = ["VGAEOptions"]


@dataclass(frozen=True)
class VGAEOptions:
    """VGAE: a citation network as one datum, its links predicted from latents at its nodes."""

    training: ClassVar = GraphTraining

    latent: int = 16
    """Size of z at each node."""
    components: int = 1
    """Gaussians in the prior of a node; 1 is N(0, I)."""
    hidden: int = 32
    """Width of the encoder's first graph convolution."""
    features: bool = True
    """Show the encoder the words of each document, where the network comes with them."""
    held_out_validation: float = 0.05
    """Share of the links held out to choose settings by."""
    held_out_test: float = 0.1
    """Share of the links held out to test."""
    split_seed: int = 0
    """Of the draw of held-out links, and of as many unlinked pairs."""

    def load(self, name: str, root: str | None) -> DataSet:
        """Return the network, its links split."""
        shares = {"validation": self.held_out_validation, "test": self.held_out_test}
        return load_links(name, root, **shares, seed=self.split_seed)

    def build(self, data: DataSet) -> VGAE:
        """Return the pair for a network.

        Raises:
            ValueError: for a data set that is no graph.
        """
        if data.links is None:
            raise ValueError(f"{data.name} is no graph: pv.data.load_links loads those there are")
        graph = data.links.train
        features = graph.features if self.features else None
        return VGAE(graph.num_nodes, make_prior(self.latent, self.components), features, hidden=self.hidden)

    def loss(self, pair: VGAE, num_data: int) -> BalancedGraphLoss:
        """Return the loss that trains the pair."""
        return BalancedGraphLoss()

    def scores(self, pair: VGAE, data: DataSet) -> Mapping[str, float]:
        """Return the area under the ROC curve and the average precision of held-out links."""
        assert data.links is not None
        parts = {
            "validation": (data.links.validation, data.links.validation_absent),
            "test": (data.links.test, data.links.test_absent),
        }
        named: dict[str, float] = {}
        for part, pairs in parts.items():
            linked, unlinked = (pair.link_probability(data.train, each) for each in pairs)
            if len(linked):
                found = link_scores(linked, unlinked)
                named |= {f"AUC, {part} links": found.auc, f"average precision, {part} links": found.average_precision}
        return named
