"""``pyro-vae train beta-vae``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pyro_vae.cli.recipes.common import LikelihoodName, make_likelihood
from pyro_vae.cli.recipes.recipe import ImageRecipe
from pyro_vae.conditionals.priors import StandardNormal
from pyro_vae.data import DataSet
from pyro_vae.models.beta_vae import BetaVAE
from pyro_vae.networks.annealed import Annealed
from pyro_vae.objectives.loss import Loss

__all__ = ["BetaVAERecipe"]


@dataclass(frozen=True)
class BetaVAERecipe(ImageRecipe[BetaVAE], command="beta-vae"):
    """β-VAE: a VAE that disentangles, by β, by a capacity or by the total correlation."""

    latent: int = 10
    """Size of z."""
    likelihood: LikelihoodName = "discretised-logistic"
    """Distribution of x given z."""
    penalty: Literal["divergence", "capacity", "total-correlation"] = "divergence"
    """Quantity under the weight: the KL, its distance from a rising capacity, or its total correlation."""
    weight: float = 4.0
    """β, the weight of the penalty."""
    capacity: float = 25.0
    """Final capacity in nats, for --penalty capacity."""
    rise: float = 10.0
    """Epochs of the capacity's rise from 0."""

    def build(self, data: DataSet) -> BetaVAE:
        """Build the pair for a data set."""
        capacity = Annealed(0.0, self.capacity, self.rise) if self.penalty == "capacity" else None
        likelihood = make_likelihood(self.likelihood, "scalar", data)
        return BetaVAE(data.x_shape, StandardNormal(self.latent), likelihood, beta=self.weight, capacity=capacity)

    def loss(self, pair: BetaVAE, num_data: int) -> Loss:
        """Return the loss of the chosen penalty."""
        return pair.total_correlation_elbo(num_data) if self.penalty == "total-correlation" else pair.objective()
