"""``pyro-vae train categorical-vae``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pyro.infer import Trace_ELBO, TraceMeanField_ELBO

from pyro_vae.cli.recipes.common import LikelihoodName, make_likelihood
from pyro_vae.cli.recipes.recipe import ImageRecipe
from pyro_vae.conditionals.categorical import GumbelSoftmax, OneHotPrior
from pyro_vae.data import DataSet
from pyro_vae.models.categorical_vae import CategoricalVAE
from pyro_vae.networks.annealed import Annealed

__all__ = ["CategoricalVAERecipe"]


@dataclass(frozen=True)
class CategoricalVAERecipe(ImageRecipe[CategoricalVAE], command="categorical-vae"):
    """VAE with categorical latents: relaxed, straight-through or score-function gradients."""

    latent: int = 20
    """Number of categorical variables."""
    categories: int = 10
    """Number of values of each variable."""
    likelihood: LikelihoodName = "discretised-logistic"
    """Distribution of x given z."""
    gradient: Literal["relaxed", "straight-through", "score-function"] = "relaxed"
    """Gradient estimator of the guide."""
    temperature: float = 1.0
    """Initial temperature τ of the relaxation."""
    final_temperature: float = 0.5
    """Final temperature."""
    annealing: float = 20.0
    """Epochs of the geometric annealing from one to the other."""

    def build(self, data: DataSet) -> CategoricalVAE:
        """Build the pair for a data set."""
        prior = OneHotPrior(self.latent, self.categories)
        return CategoricalVAE(data.x_shape, prior, make_likelihood(self.likelihood, "scalar", data), self.relaxation())

    def relaxation(self) -> GumbelSoftmax | None:
        """Return the relaxation of training draws; None for the score function."""
        if self.gradient == "score-function":
            return None
        temperature = Annealed(self.temperature, self.final_temperature, self.annealing, geometric=True)
        return GumbelSoftmax(temperature, straight_through=self.gradient == "straight-through")

    def loss(self, pair: CategoricalVAE, num_data: int) -> Any:
        """Return the ELBO that suits the gradient estimator."""
        return Trace_ELBO() if self.gradient == "score-function" else TraceMeanField_ELBO()
