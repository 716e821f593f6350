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
from pyro_vae.pair.annealed import Annealed

__all__ = ["CategoricalVAERecipe"]


@dataclass(frozen=True)
class CategoricalVAERecipe(ImageRecipe[CategoricalVAE], command="categorical-vae"):
    """VAE with categorical latents: trained relaxed, straight-through or by the score function."""

    latent: int = 20
    """Number of categorical variables."""
    categories: int = 10
    """Values of each."""
    likelihood: LikelihoodName = "discretised-logistic"
    """Distribution of x given z."""
    gradient: Literal["relaxed", "straight-through", "score-function"] = "relaxed"
    """Where the guide's gradient comes from."""
    temperature: float = 1.0
    """τ of the relaxation at the start."""
    final_temperature: float = 0.5
    """τ at the end of its way."""
    annealing: float = 20.0
    """Epochs that τ takes to get there, by equal factors."""

    def build(self, data: DataSet) -> CategoricalVAE:
        """Return the pair for a data set."""
        prior = OneHotPrior(self.latent, self.categories)
        return CategoricalVAE(data.x_shape, prior, make_likelihood(self.likelihood, "scalar", data), self.relaxation())

    def relaxation(self) -> GumbelSoftmax | None:
        """Return what draws are relaxed by, None for the score function."""
        if self.gradient == "score-function":
            return None
        temperature = Annealed(self.temperature, self.final_temperature, self.annealing, geometric=True)
        return GumbelSoftmax(temperature, straight_through=self.gradient == "straight-through")

    def loss(self, pair: CategoricalVAE, num_data: int) -> Any:
        """Return the loss that trains the pair."""
        return Trace_ELBO() if self.gradient == "score-function" else TraceMeanField_ELBO()
