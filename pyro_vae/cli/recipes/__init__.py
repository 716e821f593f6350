"""Recipes that the command line trains, one model a file.

``OPTIONS`` names the models that the command line trains; each builds its pair from typed options and a data set, by a
method ``build(data)``. An options class may also have

* ``loss(pair, num_data)``: the loss that trains the pair where the user asks for no other, or None;
* ``scores(pair, data)``: what the trained pair is scored by besides its likelihood, numbers by name for the report;
* ``early_epochs`` and ``start(pair, x)``: how many epochs come first, and what is done to the pair after them;
* ``load(name, root)`` and ``training``: a data set that is no images, and the options of training that go with it.
"""

from pyro_vae.cli.recipes.beta_vae import BetaVAEOptions
from pyro_vae.cli.recipes.categorical_vae import CategoricalVAEOptions
from pyro_vae.cli.recipes.denoising_vae import DenoisingVAEOptions
from pyro_vae.cli.recipes.flow_vae import FlowVAEOptions
from pyro_vae.cli.recipes.gaussian_mixture_vae import GaussianMixtureVAEOptions
from pyro_vae.cli.recipes.ladder_vae import LadderVAEOptions
from pyro_vae.cli.recipes.srvae import SRVAEOptions
from pyro_vae.cli.recipes.vae import VAEOptions
from pyro_vae.cli.recipes.vamp_prior_vae import VampPriorVAEOptions
from pyro_vae.cli.recipes.vgae import VGAEOptions

__all__ = ["OPTIONS"]

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
