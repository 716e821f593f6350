"""``pyro-vae train vamp-prior-vae``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pyro_vae.cli.recipes.common import LikelihoodName, make_likelihood
from pyro_vae.cli.recipes.recipe import ImageRecipe
from pyro_vae.data import DataSet
from pyro_vae.models.vamp_prior_vae import VampPriorVAE, starting_pseudo_inputs
from pyro_vae.networks.mlp import GatedMLP

__all__ = ["VampPriorVAERecipe"]


@dataclass(frozen=True)
class VampPriorVAERecipe(ImageRecipe[VampPriorVAE], command="vamp-prior-vae"):
    """VAE with a VampPrior: p(z) is a mixture of the guide's posteriors at learned pseudo-inputs."""

    latent: int = 20
    """Size of z."""
    pseudo_inputs: int = 50
    """Number of pseudo-inputs; they start at random training data."""
    hidden: int = 100
    """Width of the two gated layers of encoder and decoder."""
    likelihood: LikelihoodName = "discretised-logistic"
    """Distribution of x given z."""

    def build(self, data: DataSet) -> VampPriorVAE:
        """Build the pair for a data set."""
        start = starting_pseudo_inputs(data.train, self.pseudo_inputs)
        likelihood = make_likelihood(self.likelihood, "scalar", data)
        hidden: Sequence[int] = (self.hidden, self.hidden)
        encoder = GatedMLP([data.x_shape], 2 * self.latent, hidden)
        decoder = GatedMLP([(self.latent,)], likelihood.num_outputs(data.x_shape), hidden)
        return VampPriorVAE(start, self.latent, likelihood, encoder=encoder, decoder=decoder)
