"""``pyro-vae train vae``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pyro_vae.cli.recipes.common import LikelihoodName, ScaleName, make_likelihood, make_prior
from pyro_vae.cli.recipes.recipe import ImageRecipe
from pyro_vae.conditionals.posteriors import DiagonalGaussian, FullGaussian
from pyro_vae.data import DataSet
from pyro_vae.models.vae import VAE

__all__ = ["VAERecipe"]


@dataclass(frozen=True)
class VAERecipe(ImageRecipe[VAE], command="vae"):
    """One-stage VAE: p(z) p(x | z) with q(z | x)."""

    latent: int = 20
    """Size of z."""
    components: int = 1
    """Number of Gaussians in the prior; 1 for N(0, I)."""
    likelihood: LikelihoodName = "discretised-logistic"
    """Distribution of x given z."""
    scale: ScaleName = "scalar"
    """Noise of a Gaussian likelihood: one γ, one per channel or per pixel, or the optimum of each batch."""
    posterior: Literal["diagonal", "full"] = "diagonal"
    """Covariance of q(z | x)."""

    def build(self, data: DataSet) -> VAE:
        """Build the pair for a data set."""
        posterior = FullGaussian() if self.posterior == "full" else DiagonalGaussian()
        likelihood = make_likelihood(self.likelihood, self.scale, data)
        return VAE(data.x_shape, make_prior(self.latent, self.components), likelihood, posterior)
