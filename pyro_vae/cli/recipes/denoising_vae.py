"""``pyro-vae train denoising-vae``."""

from __future__ import annotations

from dataclasses import dataclass

from pyro_vae.cli.recipes.common import LikelihoodName, make_likelihood, make_prior
from pyro_vae.cli.recipes.recipe import ImageRecipe
from pyro_vae.conditionals.corruptions import BitFlip, GaussianNoise
from pyro_vae.data import DataSet
from pyro_vae.models.denoising_vae import DenoisingVAE

__all__ = ["DenoisingVAERecipe"]


@dataclass(frozen=True)
class DenoisingVAERecipe(ImageRecipe[DenoisingVAE], command="denoising-vae"):
    """Denoising VAE: a guide that mixes over corruptions of the data."""

    latent: int = 20
    """Size of z."""
    components: int = 1
    """Number of Gaussians in the prior; 1 for N(0, I)."""
    likelihood: LikelihoodName = "gaussian"
    """Distribution of x given z. The corruption is GaussianNoise for a Gaussian, else BitFlip."""
    noise: float = 0.1
    """Standard deviation of the noise, or probability of a flip."""
    corruptions: int = 5
    """Number of corruptions in the guide's mixture."""

    def build(self, data: DataSet) -> DenoisingVAE:
        """Build the pair for a data set."""
        corruption = GaussianNoise(self.noise) if self.likelihood == "gaussian" else BitFlip(self.noise)
        prior, likelihood = make_prior(self.latent, self.components), make_likelihood(self.likelihood, "scalar", data)
        return DenoisingVAE(data.x_shape, prior, corruption, likelihood, corruptions=self.corruptions)
