"""Pairs with exact posteriors, and draws held against exact moments."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import pyro_vae as pv
from pyro_vae.models import SRVAE, LinearGaussianVAE


class OffGuide(LinearGaussianVAE):
    """Probabilistic PCA with a guide off in place and scale."""

    def guide(self, x: Tensor) -> None:
        exact = self.exact_posterior(x)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(exact.mean + 0.2, 1.4 * exact.stddev).to_event(1))


def fixed(pair: Any) -> Any:
    """Return the pair without gradients: exact values are plain numbers."""
    return pair.requires_grad_(False)


def marginal(pair: LinearGaussianVAE) -> tuple[Tensor, Tensor]:
    size = len(pair.bias)
    return pair.bias, pair.weight @ pair.weight.mT + pair.scale() ** 2 * torch.eye(size)


def assert_moments(x: Tensor, mean: Tensor, covariance: Tensor) -> None:
    """Hold the mean and covariance of Gaussian draws (N, D) within 4 of their standard errors."""
    variance = covariance.diagonal()
    assert ((x.mean(0) - mean).abs() <= 4 * (variance / len(x)).sqrt()).all()
    # Wishart: var S_ij = (Σ_ii Σ_jj + Σ_ij²) / (N − 1).
    error = ((variance.unsqueeze(-1) * variance + covariance**2) / (len(x) - 1)).sqrt()
    assert ((torch.cov(x.mT) - covariance).abs() <= 4 * error).all()


def srvae(transition: Any = "delta", prior: Any = None) -> SRVAE:
    return SRVAE((1, 4, 4), 2, prior or pv.StandardNormal(3), transition, levels=17, z_size=2)
