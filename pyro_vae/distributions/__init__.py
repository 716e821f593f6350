"""Distributions and divergences that torch and Pyro lack."""

from pyro_vae.distributions.batch_optimal import BatchOptimalNormal
from pyro_vae.distributions.continuous_bernoulli import ContinuousBernoulli
from pyro_vae.distributions.discretised_logistic import DiscretisedLogistic
from pyro_vae.distributions.flow import FlowDistribution, Reversal, Sylvester
from pyro_vae.distributions.graph import InnerProductGraph
from pyro_vae.distributions.kl import (
    affine_expected_kl,
    affine_expected_squared_error,
    gaussian_entropy,
    kl_diagonal,
    kl_full,
    kl_standard_normal,
)
from pyro_vae.distributions.mixture_kl import convex_kl_bound, kl_to_prior, monte_carlo_kl, variational_kl_bound
from pyro_vae.distributions.mixtures import EqualMixture, GaussianMixture
from pyro_vae.distributions.one_hot import OneHots, RelaxedOneHots

__all__ = [
    "BatchOptimalNormal",
    "ContinuousBernoulli",
    "DiscretisedLogistic",
    "EqualMixture",
    "FlowDistribution",
    "GaussianMixture",
    "InnerProductGraph",
    "OneHots",
    "RelaxedOneHots",
    "Reversal",
    "Sylvester",
    "affine_expected_kl",
    "affine_expected_squared_error",
    "convex_kl_bound",
    "gaussian_entropy",
    "kl_diagonal",
    "kl_full",
    "kl_standard_normal",
    "kl_to_prior",
    "monte_carlo_kl",
    "variational_kl_bound",
]
