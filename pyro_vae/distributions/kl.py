"""Divergences of Gaussians in closed form.

Every function sums over the event and returns nats, one per batch entry. :func:`kl_full` is registered with torch's
``kl_divergence``. The bounds of ``mixture_kl.py`` are not: other code that asks for the exact KL would silently get an
upper bound.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributions import Independent, MultivariateNormal, Normal
from torch.distributions.kl import register_kl

__all__ = [
    "affine_expected_kl",
    "affine_expected_squared_error",
    "gaussian_entropy",
    "kl_diagonal",
    "kl_full",
    "kl_standard_normal",
]


def kl_standard_normal(mean: Tensor, scale: Tensor) -> Tensor:
    """Return the divergence of a diagonal Gaussian from N(0, I).

    KL(N(μ, diag σ²) ‖ N(0, I)) = ½ Σ_j (σ_j² + μ_j² − 1 − log σ_j²)

    Args:
        mean, scale: (…, L).

    Returns:
        (…), in nats.

    Reference:
        Documents 001, 002 (16), 004; Kingma and Welling (2014), appendix B.

    >>> kl_standard_normal(torch.ones(3), torch.ones(3))
    tensor(1.5000)
    """
    return 0.5 * (scale**2 + mean**2 - 1 - 2 * torch.log(scale)).sum(-1)


def kl_diagonal(mean: Tensor, scale: Tensor, other_mean: Tensor, other_scale: Tensor) -> Tensor:
    """Return the divergence of two diagonal Gaussians.

    KL(N(μ₀, diag σ₀²) ‖ N(μ₁, diag σ₁²)) = Σ_j [log σ₁/σ₀ + (σ₀² + (μ₀ − μ₁)²)/(2σ₁²) − ½]

    Args:
        mean, scale, other_mean, other_scale: (…, L).

    Returns:
        (…), in nats.

    >>> kl_diagonal(torch.ones(3), torch.ones(3), torch.zeros(3), torch.ones(3))
    tensor(1.5000)
    """
    ratio = (scale**2 + (mean - other_mean) ** 2) / (2 * other_scale**2)
    return (torch.log(other_scale / scale) + ratio - 0.5).sum(-1)


def kl_full(mean: Tensor, factor: Tensor, other_mean: Tensor, other_factor: Tensor) -> Tensor:
    """Return the divergence of two full-covariance Gaussians from their Cholesky factors.

    KL = ½( ‖L₁⁻¹L₀‖²_F − d + ‖L₁⁻¹(μ₁ − μ₀)‖² ) + Σ log diag L₁ − Σ log diag L₀

    Args:
        mean, other_mean: (…, d).
        factor, other_factor: lower triangular, (…, d, d).

    Returns:
        (…), in nats.

    Reference:
        Document 003.

    >>> eye = torch.eye(3)
    >>> kl_full(torch.ones(3), eye, torch.zeros(3), eye)
    tensor(1.5000)
    """
    batch = torch.broadcast_shapes(factor.shape[:-2], other_factor.shape[:-2], mean.shape[:-1], other_mean.shape[:-1])
    size = mean.shape[-1]
    right = torch.cat([factor.expand(*batch, size, size), (other_mean - mean).expand(*batch, size).unsqueeze(-1)], -1)
    solved = torch.linalg.solve_triangular(other_factor.expand(*batch, size, size), right, upper=False)
    log_dets = other_factor.diagonal(dim1=-2, dim2=-1).log().sum(-1) - factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return 0.5 * ((solved**2).sum((-2, -1)) - size) + log_dets


@register_kl(MultivariateNormal, Independent)
def _kl_full_independent(p: MultivariateNormal, q: Independent) -> Tensor:
    if not isinstance(q.base_dist, Normal) or q.reinterpreted_batch_ndims != 1:
        raise NotImplementedError
    return kl_full(p.loc, p.scale_tril, q.base_dist.loc, torch.diag_embed(q.base_dist.scale))


def gaussian_entropy(scale: Tensor, size: int) -> Tensor:
    """Return the entropy of N(·, s² I) over k = ``size`` entries: (k/2)(1 + log 2π s²), s one number.

    >>> gaussian_entropy(torch.tensor(1.0), 2)
    tensor(2.8379)
    """
    return size / 2 * (1 + math.log(2 * math.pi) + 2 * torch.log(scale))


def affine_expected_squared_error(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """Return an expected squared error under z ~ N(μ, diag σ²).

    E‖x − Wz − b‖² = ‖x − Wμ − b‖² + tr(W diag(σ²) Wᵀ)

    Args:
        x: (…, D).
        weight: W, (D, L).
        bias: b, (D,).
        mean, scale: (…, L).

    Returns:
        (…).
    """
    return ((x - mean @ weight.mT - bias) ** 2).sum(-1) + (weight**2 @ scale.unsqueeze(-1) ** 2).sum((-2, -1))


def affine_expected_kl(kl_at_mean: Tensor, weight: Tensor, scale: Tensor, other_scale: Tensor) -> Tensor:
    """Return an expected divergence under u ~ N(μ, diag σ²).

    E_u KL(q(z|x) ‖ N(By + Cu + c, diag s²)) = KL at u = μ  +  ½ Σ_j s_j⁻² Σ_l C_jl² σ_l²

    Args:
        kl_at_mean: the divergence at u = μ, (…).
        weight: C, (L_z, L_u).
        scale: σ, (…, L_u).
        other_scale: s, (L_z,).

    Returns:
        (…), in nats.
    """
    return kl_at_mean + 0.5 * ((scale**2 @ (weight**2).mT) / other_scale**2).sum(-1)
