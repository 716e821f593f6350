"""One file per published model: the generative model in the docstring, then the pair.

``OPTIONS`` names the models that the command line trains; each builds its pair from typed options and a data set, by a
method ``build(data)``. An options class may also have

* ``loss(pair, num_data)``: the loss that trains the pair where the user asks for no other, or None;
* ``scores(pair, data)``: what the trained pair is scored by besides its likelihood, numbers by name for the report;
* ``early_epochs`` and ``start(pair, x)``: how many epochs come first, and what is done to the pair after them;
* ``load(name, root)`` and ``training``: a data set that is no images, and the options of training that go with it.
"""

from pyro_vae.models.beta_vae import BetaVAE, BetaVAEOptions
from pyro_vae.models.categorical_vae import CategoricalVAE, CategoricalVAEOptions
from pyro_vae.models.denoising_vae import DenoisingVAE, DenoisingVAEOptions
from pyro_vae.models.flow_vae import FlowVAE, FlowVAEOptions
from pyro_vae.models.gaussian_mixture import GaussianMixture
from pyro_vae.models.gaussian_mixture_vae import GaussianMixtureVAE, GaussianMixtureVAEOptions
from pyro_vae.models.ladder_vae import LadderVAE, LadderVAEOptions
from pyro_vae.models.linear_gaussian import LinearGaussianMixtureVAE, LinearGaussianVAE, LinearTwoStageVAE
from pyro_vae.models.srvae import SRVAE, SRVAELoss, SRVAEOptions
from pyro_vae.models.vae import VAE, VAELoss, VAEOptions
from pyro_vae.models.vamp_prior_vae import VampPriorVAE, VampPriorVAEOptions
from pyro_vae.models.vgae import VGAE, VGAEOptions

__all__ = [
    "OPTIONS",
    "SRVAE",
    "VAE",
    "VGAE",
    "BetaVAE",
    "BetaVAEOptions",
    "CategoricalVAE",
    "CategoricalVAEOptions",
    "DenoisingVAE",
    "DenoisingVAEOptions",
    "FlowVAE",
    "FlowVAEOptions",
    "GaussianMixture",
    "GaussianMixtureVAE",
    "GaussianMixtureVAEOptions",
    "LadderVAE",
    "LadderVAEOptions",
    "LinearGaussianMixtureVAE",
    "LinearGaussianVAE",
    "LinearTwoStageVAE",
    "SRVAELoss",
    "SRVAEOptions",
    "VAELoss",
    "VAEOptions",
    "VGAEOptions",
    "VampPriorVAE",
    "VampPriorVAEOptions",
]

OPTIONS = {
    "vae": VAEOptions,
    "srvae": SRVAEOptions,
    "beta-vae": BetaVAEOptions,
    "categorical-vae": CategoricalVAEOptions,
    "denoising-vae": DenoisingVAEOptions,
    "gaussian-mixture-vae": GaussianMixtureVAEOptions,
    "flow-vae": FlowVAEOptions,
    "ladder-vae": LadderVAEOptions,
    "vamp-prior-vae": VampPriorVAEOptions,
    "vgae": VGAEOptions,
}
