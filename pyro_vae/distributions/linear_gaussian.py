"""Exact log-likelihoods and posteriors of linear-Gaussian models, e.g. probabilistic PCA."""

from __future__ import annotations

import math

import pyro.distributions as dist
import torch
from torch import Tensor

__all__ = [
    "condition_gaussian",
    "linear_gaussian_log_likelihood",
    "linear_gaussian_posterior",
    "mixture_log_likelihood",
]


def condition_gaussian(
    mean: Tensor, factor: Tensor, weight: Tensor, noise: Tensor, observed: Tensor
) -> tuple[Tensor, dist.MultivariateNormal]:
    """Return the log-density of o = W v + ε and the posterior of v.

    v ~ N(m, S Sᵀ),   ε ~ N(0, diag n²):   log N(o; W m, W S Sᵀ Wᵀ + diag n²)   and   p(v | o)

    It takes the Cholesky factor of one L × L matrix.

    Args:
        mean: m, (…, L).
        factor: S, any square factor of the prior's covariance, (…, L, L).
        weight: W, (D, L).
        noise: n, (D,).
        observed: o, (…, D).

    Returns:
        log p(o), (…), in nats, and the posterior, batch (…), event (L,).

    Reference:
        Tipping and Bishop (1999), Probabilistic principal component analysis, JRSS B 61.

    >>> one = torch.ones(1)
    >>> log_p, posterior = condition_gaussian(torch.zeros(1), torch.eye(1), torch.eye(1), one, one)
    >>> log_p, posterior.mean
    (tensor(-1.5155), tensor([0.5000]))
    """
    # In units of the prior and of the noise, e ~ N(0, I) and r = A e + N(0, I): the only matrix is I + AᵀA.
    whitened = weight @ factor / noise.unsqueeze(-1)
    residual = (observed - mean @ weight.mT) / noise
    precision = torch.eye(mean.shape[-1], dtype=mean.dtype, device=mean.device) + whitened.mT @ whitened
    cholesky = torch.linalg.cholesky(precision)
    projected = (whitened.mT @ residual.unsqueeze(-1)).contiguous()
    solved = torch.cholesky_solve(projected, cholesky)
    log_det = 2 * (cholesky.diagonal(dim1=-2, dim2=-1).log().sum(-1) + noise.log().sum(-1))
    quadratic = (residual**2).sum(-1) - (projected * solved).sum((-2, -1))
    log_marginal = -0.5 * (observed.shape[-1] * math.log(2 * math.pi) + log_det + quadratic)
    covariance = factor @ torch.cholesky_inverse(cholesky) @ factor.mT
    posterior_mean = mean + (factor @ solved).squeeze(-1)
    scale_tril = torch.linalg.cholesky(covariance).expand(*posterior_mean.shape, mean.shape[-1])
    return log_marginal, dist.MultivariateNormal(posterior_mean, scale_tril=scale_tril)


def linear_gaussian_log_likelihood(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor) -> Tensor:
    """Return log N(x; b, W Wᵀ + γ² I), the marginal log-density of x = W z + b + γ ε, z ~ N(0, I).

    Args:
        x: (…, D).
        weight: W, (D, L).
        bias: b, (D,).
        scale: γ, one number.

    Returns:
        (…), in nats.
    """
    return _standard_prior(x, weight, bias, scale)[0]


def linear_gaussian_posterior(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor) -> dist.MultivariateNormal:
    """Return p(z | x) for x = W z + b + γ ε, z ~ N(0, I): a full-covariance Gaussian.

    N(M⁻¹ Wᵀ (x − b), γ² M⁻¹),   M = Wᵀ W + γ² I

    Args:
        x: (…, D).
        weight: W, (D, L).
        bias: b, (D,).
        scale: γ, one number.

    Returns:
        Batch (…), event (L,).
    """
    return _standard_prior(x, weight, bias, scale)[1]


def mixture_log_likelihood(log_weights: Tensor, log_marginals: Tensor) -> Tensor:
    """Return log Σ_i w_i p_i(o) from log w (C,) and log p_i(o) (…, C)."""
    return torch.logsumexp(log_weights.log_softmax(-1) + log_marginals, -1)


def _standard_prior(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor) -> tuple[Tensor, dist.MultivariateNormal]:
    size = weight.shape[-1]
    zero = torch.zeros(*x.shape[:-1], size, dtype=x.dtype, device=x.device)
    eye = torch.eye(size, dtype=x.dtype, device=x.device)
    return condition_gaussian(zero, eye, weight, scale.expand(x.shape[-1]), x - bias)
