"""``pyro-vae train vgae``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from pyro_vae.cli.recipes.common import make_prior
from pyro_vae.cli.recipes.recipe import Recipe
from pyro_vae.cli.training import GraphTraining, Training
from pyro_vae.data import GraphData, load_links
from pyro_vae.diagnostics.link_prediction import link_scores
from pyro_vae.models.vgae import VGAE
from pyro_vae.objectives.graph import BalancedGraphLoss

__all__ = ["VGAERecipe"]


@dataclass(frozen=True)
class VGAERecipe(Recipe[VGAE, GraphData], command="vgae"):
    """VGAE: a citation network as one datum, with links predicted from latents at the nodes."""

    training: ClassVar[type[Training]] = GraphTraining

    latent: int = 16
    """Size of z at each node."""
    components: int = 1
    """Number of Gaussians in the prior of a node; 1 for N(0, I)."""
    hidden: int = 32
    """Width of the encoder's first graph convolution."""
    features: bool = True
    """Give the encoder the words of each document, if the network has them."""
    held_out_validation: float = 0.05
    """Share of links to hold out for validation."""
    held_out_test: float = 0.1
    """Share of links to hold out for testing."""
    split_seed: int = 0
    """Seed of the held-out links, and of as many unlinked pairs."""

    def load_data(self, name: str, root: str | None, *, download: bool = False) -> GraphData:
        """Load a network and split its links; nothing is fetched."""
        shares = {"validation": self.held_out_validation, "test": self.held_out_test}
        return load_links(name, root, **shares, seed=self.split_seed)

    def build(self, data: GraphData) -> VGAE:
        """Build the pair for a network.

        Raises:
            ValueError: for a data set of images, and for options that the model cannot take.
        """
        if not isinstance(data, GraphData):
            raise ValueError(f"{data.name} is no graph: pv.data.load_links loads those there are")
        graph = data.links.train
        features = graph.features if self.features else None
        return VGAE(graph.num_nodes, make_prior(self.latent, self.components), features, hidden=self.hidden)

    def loss(self, pair: VGAE, num_data: int) -> BalancedGraphLoss:
        """Return the loss that weighs links and their absence alike."""
        return BalancedGraphLoss()

    def scores(self, pair: VGAE, data: GraphData) -> Mapping[str, float]:
        """Return the area under the ROC curve and the average precision of held-out links."""
        links = data.links
        parts = {"validation": (links.validation, links.validation_absent), "test": (links.test, links.test_absent)}
        named: dict[str, float] = {}
        for part, pairs in parts.items():
            linked, unlinked = (pair.link_probability(data.train, each) for each in pairs)
            if len(linked):
                found = link_scores(linked, unlinked)
                named |= {f"AUC, {part} links": found.auc, f"average precision, {part} links": found.average_precision}
        return named
