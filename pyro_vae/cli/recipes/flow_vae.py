"""``pyro-vae train flow-vae``."""

from __future__ import annotations

from dataclasses import dataclass

from pyro.distributions import ConditionalTransformModule

from pyro_vae.cli.recipes.common import LikelihoodName, make_likelihood
from pyro_vae.cli.recipes.recipe import ImageRecipe
from pyro_vae.conditionals.flows import FlowPosterior, FlowPrior
from pyro_vae.conditionals.priors import StandardNormal
from pyro_vae.data import DataSet
from pyro_vae.models.flow_vae import FlowName, FlowVAE, PriorName, posterior_layers, prior_layers

__all__ = ["FlowVAERecipe"]


@dataclass(frozen=True)
class FlowVAERecipe(ImageRecipe[FlowVAE], command="flow-vae"):
    """VAE with normalising flows in its guide, its prior, or both."""

    latent: int = 20
    """Size of z."""
    flow: FlowName = "planar"
    """Kind of the guide's flow."""
    length: int = 2
    """Number of layers of the guide's flow; 0 leaves a Gaussian."""
    prior: PriorName = "normal"
    """Kind of the prior's flow."""
    prior_length: int = 2
    """Number of layers of the prior's flow."""
    context: int = 32
    """Outputs of the encoder that the guide's flow sees, where its layers can."""
    likelihood: LikelihoodName = "discretised-logistic"
    """Distribution of x given z."""

    def build(self, data: DataSet) -> FlowVAE:
        """Return the pair for a data set."""
        layers = posterior_layers(self.flow, self.length, self.latent, self.context)
        seen = any(isinstance(layer, ConditionalTransformModule) for layer in layers)
        posterior = FlowPosterior(layers, self.context if seen else 0)
        bent = prior_layers(self.prior, self.prior_length, self.latent)
        prior = FlowPrior(self.latent, bent) if bent else StandardNormal(self.latent)
        return FlowVAE(data.x_shape, prior, posterior, make_likelihood(self.likelihood, "scalar", data))
