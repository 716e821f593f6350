"""Objectives that training maximises, sampled or in closed form."""

from pyro_vae.objectives.bounds import Objective, beta_elbo, capacity_elbo, elbo, free_bits, iwae, renyi
from pyro_vae.objectives.graph import BalancedGraphLoss
from pyro_vae.objectives.reconstruction import (
    documents_mse_reconstruction,
    gaussian_reconstruction,
    mse_reconstruction,
    optimal_scale_reconstruction,
)

__all__ = [
    "BalancedGraphLoss",
    "Objective",
    "beta_elbo",
    "capacity_elbo",
    "documents_mse_reconstruction",
    "elbo",
    "free_bits",
    "gaussian_reconstruction",
    "iwae",
    "mse_reconstruction",
    "optimal_scale_reconstruction",
    "renyi",
]
