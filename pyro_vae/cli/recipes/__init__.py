"""Recipes: the models that the command line trains, one a file.

To add a model, write its recipe (see :class:`~pyro_vae.cli.recipes.recipe.Recipe`) and import the file below.
"""

from pyro_vae.cli.recipes import (  # noqa: F401
    beta_vae,
    categorical_vae,
    denoising_vae,
    flow_vae,
    gaussian_mixture_vae,
    ladder_vae,
    srvae,
    vae,
    vamp_prior_vae,
    vgae,
)
from pyro_vae.cli.recipes.recipe import RECIPES

__all__ = ["RECIPES"]
