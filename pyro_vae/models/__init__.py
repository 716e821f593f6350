"""Published models, one a file: the factorisation in the docstring, then the pair."""

from pyro_vae.models.beta_vae import BetaVAE
from pyro_vae.models.categorical_vae import CategoricalVAE
from pyro_vae.models.denoising_vae import DenoisingVAE
from pyro_vae.models.flow_vae import FlowVAE
from pyro_vae.models.gaussian_mixture import GaussianMixture
from pyro_vae.models.gaussian_mixture_vae import GaussianMixtureVAE
from pyro_vae.models.ladder_vae import LadderVAE
from pyro_vae.models.linear_gaussian import LinearGaussianVAE
from pyro_vae.models.linear_gaussian_mixture import LinearGaussianMixtureVAE
from pyro_vae.models.linear_two_stage import LinearTwoStageVAE
from pyro_vae.models.srvae import SRVAE, SRVAELoss
from pyro_vae.models.vae import VAE, VAELoss
from pyro_vae.models.vamp_prior_vae import VampPriorVAE
from pyro_vae.models.vgae import VGAE

__all__ = [
    "SRVAE",
    "VAE",
    "VGAE",
    "BetaVAE",
    "CategoricalVAE",
    "DenoisingVAE",
    "FlowVAE",
    "GaussianMixture",
    "GaussianMixtureVAE",
    "LadderVAE",
    "LinearGaussianMixtureVAE",
    "LinearGaussianVAE",
    "LinearTwoStageVAE",
    "SRVAELoss",
    "VAELoss",
    "VampPriorVAE",
]
