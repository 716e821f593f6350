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
    """Ratio of the height of x to that of y, a whole number."""
    components: int = 10
    """Number of Gaussians in the prior on u; 1 for N(0, I)."""
    transition: Transition = "delta"
    """Reading of q(y | x). The bound is on log p(x, y) for delta, on log p(x) for the others."""
    likelihood: LikelihoodName = "gaussian"
    """Distribution of x given y and z."""
    scale: ScaleName = "scalar"
    """Noise of a Gaussian likelihood: one γ, one per channel or per pixel, or the optimum of each batch."""

    def build(self, data: DataSet) -> SRVAE:
        """Build the pair for a data set."""
        levels = levels_of(data) if self.transition == "discretised" else None
        prior = make_prior(self.latent, self.components)
        likelihood = make_likelihood(self.likelihood, self.scale, data)
        y_likelihood = make_likelihood("discretised-logistic" if levels else "gaussian", "scalar", data)
        return SRVAE(data.x_shape, self.factor, prior, self.transition, likelihood, y_likelihood, levels=levels)
