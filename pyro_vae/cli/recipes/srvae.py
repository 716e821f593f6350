"""``pyro-vae train srvae``."""

from __future__ import annotations

from dataclasses import dataclass

from pyro_vae.cli.recipes.common import LikelihoodName, ScaleName, levels_of, make_likelihood, make_prior
from pyro_vae.cli.recipes.recipe import ImageRecipe
from pyro_vae.data import DataSet
from pyro_vae.models.srvae import SRVAE, Transition

__all__ = ["SRVAERecipe"]


@dataclass(frozen=True)
class SRVAERecipe(ImageRecipe[SRVAE], command="srvae"):
    """Two-stage VAE: p(u) p(y | u) p(z | y, u) p(x | y, z), y a down-scaled x."""

    latent: int = 16
    """Size of u, and of z."""
    factor: int = 2
    """Whole factor by which y is smaller than x."""
    components: int = 10
    """Gaussians in the prior on u; 1 is N(0, I)."""
    transition: Transition = "delta"
    """Reading of q(y | x); it decides what the bound is a bound on."""
    likelihood: LikelihoodName = "gaussian"
    """Distribution of x given y and z."""
    scale: ScaleName = "scalar"
    """What a Gaussian likelihood's noise is learned for, or that each batch takes its optimum."""

    def build(self, data: DataSet) -> SRVAE:
        """Return the pair for a data set."""
        levels = levels_of(data) if self.transition == "discretised" else None
        prior = make_prior(self.latent, self.components)
        likelihood = make_likelihood(self.likelihood, self.scale, data)
        y_likelihood = make_likelihood("discretised-logistic" if levels else "gaussian", "scalar", data)
        return SRVAE(data.x_shape, self.factor, prior, self.transition, likelihood, y_likelihood, levels=levels)
