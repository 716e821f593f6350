"""Linear Gaussian pairs. The guide is the exact posterior: every log-weight of every draw is log p(x).

    LinearGaussianVAE          z ~ N(0, I),  x ~ N(W z + b, γ² I)                       probabilistic PCA
    LinearGaussianMixtureVAE   c ~ w,  z ~ N(μ_c, diag σ_c²),  x ~ N(W z + b, γ² I)
    LinearTwoStageVAE          c ~ w,  u ~ N(μ_c, diag σ_c²),  y ~ N(W_y u + b_y, γ₂² I),
                               z ~ N(B y + C u + c₀, diag s²),  x ~ N(W_x z + V y + b_x, γ₁² I),  y = d(x)

Use them as the oracle of a likelihood estimator. In the mixtures the component is a site. Their exact posterior is a
mixture of full-covariance Gaussians, which no single Gaussian can match.

Reference: Tipping and Bishop (1999), Probabilistic principal component analysis, JRSS B 61.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_vae.conditionals.scales import LearnedScale
from pyro_vae.distributions.linear_gaussian import linear_gaussian_log_likelihood, linear_gaussian_posterior
from pyro_vae.pair.pair import Pair

__all__ = ["LatentMoments", "LinearGaussianVAE"]


class LatentMoments(NamedTuple):
    """Hold the moments of a Gaussian posterior over z: ``mean`` (B, L) and ``covariance`` (B, L, L)."""

    mean: Tensor
    covariance: Tensor


class LinearGaussianVAE(Pair):
    """Pair probabilistic PCA with its exact posterior.

    Args:
        x_size: D.
        latent_size: L.
        scale: initial γ.

    >>> import pyro_vae as pv
    >>> pair, x = LinearGaussianVAE(5, 2), torch.randn(3, 5)
    >>> weights = pv.log_terms(pair, x, num_particles=4).log_weights
    >>> bool(torch.allclose(weights, pair.exact_log_likelihood(x), rtol=1e-4))
    True
    """

    def __init__(self, x_size: int, latent_size: int, scale: float = 0.5) -> None:
        super().__init__()
        self.x_shape = (x_size,)
        self.weight = nn.Parameter(torch.randn(x_size, latent_size) / latent_size**0.5)
        self.bias = nn.Parameter(torch.zeros(x_size))
        self.scale = LearnedScale(scale)

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            zero = torch.zeros_like(self.weight[0])
            z = pyro.sample("z", dist.Normal(zero, torch.ones_like(zero)).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.weight.mT + self.bias, self.scale()).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.exact_posterior(x))

    def exact_log_likelihood(self, x: Tensor) -> Tensor:
        """Return log p(x), (B,), in nats."""
        return linear_gaussian_log_likelihood(x, self.weight, self.bias, self.scale())

    def exact_posterior(self, x: Tensor) -> dist.MultivariateNormal:
        """Return p(z | x), batch (B,), event (L,)."""
        return linear_gaussian_posterior(x, self.weight, self.bias, self.scale())

    def e_step(self, x: Tensor) -> LatentMoments:
        """Return the moments of p(z | x); they determine this Gaussian."""
        posterior = self.exact_posterior(x)
        return LatentMoments(posterior.mean, posterior.covariance_matrix)

    def elbo(self, x: Tensor, q: LatentMoments) -> Tensor:
        """Return the ELBO of the Gaussian with these moments, (B,), in nats."""
        variance, second = self.scale() ** 2, q.covariance + q.mean.unsqueeze(-1) * q.mean.unsqueeze(-2)
        error = ((x - self.bias - q.mean @ self.weight.mT) ** 2).sum(-1)
        error = error + torch.einsum("blm,dl,dm->b", q.covariance, self.weight, self.weight)
        log_lik = -0.5 * (error / variance + x.shape[-1] * torch.log(2 * math.pi * variance))
        # KL(q ‖ N(0, I)).
        divergence = 0.5 * (second.diagonal(dim1=-2, dim2=-1).sum(-1) - q.mean.shape[-1] - torch.logdet(q.covariance))
        return log_lik - divergence

    @torch.no_grad()
    def m_step(self, x: Tensor, q: LatentMoments) -> None:
        """Set W, b and γ to the regression of x on z under these moments.

        Reference:
            Rubin and Thayer (1982), EM algorithms for ML factor analysis, Psychometrika 47.
        """
        # b is the coefficient of a constant latent.
        one = torch.ones_like(q.mean[..., :1])
        mean = torch.cat([q.mean, one], -1)
        covariance = torch.nn.functional.pad(q.covariance, (0, 1, 0, 1)).sum(0)
        solution = torch.linalg.solve(mean.mT @ mean + covariance, mean.mT @ x)
        self.weight.copy_(solution[:-1].mT)
        self.bias.copy_(solution[-1])
        error = ((x - mean @ solution) ** 2).sum() + torch.einsum("lm,ld,md->", covariance, solution, solution)
        self.scale.set(torch.sqrt(error / x.numel()))
