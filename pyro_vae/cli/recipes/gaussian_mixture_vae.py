"""``pyro-vae train gaussian-mixture-vae``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_vae.cli.recipes.common import LikelihoodName, ScaleName, make_likelihood
from pyro_vae.cli.recipes.recipe import ImageRecipe
from pyro_vae.conditionals.priors import MixtureOfGaussians
from pyro_vae.data import DataSet
from pyro_vae.diagnostics.clustering import clustering_accuracy
from pyro_vae.models.gaussian_mixture_vae import BATCH_SIZE, GaussianMixtureVAE
from pyro_vae.pair.modes import evaluation
from pyro_vae.runtime.random_state import own_random_state

__all__ = ["GaussianMixtureVAERecipe"]


@dataclass(frozen=True)
class GaussianMixtureVAERecipe(ImageRecipe[GaussianMixtureVAE], command="gaussian-mixture-vae"):
    """VAE that clusters: p(c) p(z | c) p(x | z)."""

    latent: int = 10
    """Size of z."""
    components: int = 10
    """Number of clusters."""
    likelihood: LikelihoodName = "continuous-bernoulli"
    """Distribution of x given z."""
    scale: ScaleName = "scalar"
    """Noise of a Gaussian likelihood: one γ, one per channel or per pixel, or the optimum of each batch."""
    start_clusters_after: int = 0
    """Epochs before the clusters are fitted to the encoded data; 0 for random clusters. They come before those of
    --epochs, and include the warm-up."""

    def build(self, data: DataSet) -> GaussianMixtureVAE:
        """Build the pair for a data set.

        Raises:
            ValueError: for a negative number of epochs, and for fewer data than clusters.
        """
        if self.start_clusters_after < 0:
            raise ValueError(f"start_clusters_after is {self.start_clusters_after}; it counts epochs, 0 for none")
        if self.start_clusters_after and len(data.train) < self.components:
            raise ValueError(f"{self.components} components cannot start at {len(data.train)} training data")
        likelihood = make_likelihood(self.likelihood, self.scale, data)
        return GaussianMixtureVAE(data.x_shape, MixtureOfGaussians(self.components, self.latent), likelihood)

    @property
    def early_epochs(self) -> int:
        """The number of epochs before :meth:`start`."""
        return self.start_clusters_after

    def start(self, pair: GaussianMixtureVAE, x: Tensor) -> None:
        """Fit the clusters to the encoded training data."""
        pair.start_clusters(x)

    def scores(self, pair: GaussianMixtureVAE, data: DataSet) -> Mapping[str, float]:
        """Return the agreement of clusters and classes on test data; training does not see the classes."""
        if data.test_labels is None:
            return {}
        from sklearn.metrics import normalized_mutual_info_score

        with evaluation(pair), own_random_state(0):
            parts = [pair.responsibilities(x).argmax(-1) for x in data.test.split(BATCH_SIZE)]
        clusters = torch.cat(parts)
        information = normalized_mutual_info_score(data.test_labels.numpy(), clusters.numpy())
        return {
            "clustering accuracy, test data": clustering_accuracy(clusters, data.test_labels),
            "normalised mutual information with the classes": float(information),
        }
