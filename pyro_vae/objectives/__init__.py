"""Objectives that training maximises, sampled or in closed form."""

from pyro_vae.objectives.bounds import Objective, beta_elbo, capacity_elbo, elbo, free_bits, iwae, renyi
from pyro_vae.objectives.closed_form import (
    documents_mse_reconstruction,
    gaussian_reconstruction,
    mse_reconstruction,
    optimal_scale_reconstruction,
)
from pyro_vae.objectives.graph import BalancedGraphLoss

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
