"""Divergences of Gaussians in closed form, and bounds for mixtures.

Every function sums over the event and returns nats, one per batch entry. Only exact divergences are registered with
torch's ``kl_divergence``. Other code that asks for the exact KL would silently get an upper bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor
from torch.distributions import Independent, MultivariateNormal, Normal
from torch.distributions.kl import register_kl

from pyro_vae.distributions.mixtures import GaussianMixture

__all__ = [
    "MixtureKL",
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

MixtureKL: TypeAlias = Callable[[Any, GaussianMixture], Tensor]


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


def monte_carlo_kl(q: Any, mixture: GaussianMixture, num_particles: int = 1) -> Tensor:
    """Estimate the divergence of a Gaussian from a mixture by draws from q, without bias.

    KL(q ‖ Σ_i w_i p_i) = E_q[log q(u) − log Σ_i w_i p_i(u)]

    Args:
        q: a diagonal Gaussian over (L,), batch (…).
        mixture: a mixture of diagonal Gaussians over (L,).
        num_particles: K, number of draws.

    Returns:
        (…), in nats.
    """
    u = q.rsample((num_particles,))
    return (q.log_prob(u) - mixture.log_prob(u)).mean(0)


def variational_kl_bound(q: Any, mixture: GaussianMixture) -> Tensor:
    """Bound the divergence of a Gaussian from a mixture without draws, tighter than by convexity.

    KL(q ‖ Σ_i w_i p_i) ≤ −log Σ_i w_i exp(−KL(q ‖ p_i)) ≤ Σ_i w_i KL(q ‖ p_i)

    Args:
        q: a diagonal Gaussian over (L,), batch (…).
        mixture: a mixture of C diagonal Gaussians over (L,).

    Returns:
        (…), an upper bound, in nats.

    Reference:
        Hershey and Olsen (2007), Approximating the Kullback Leibler divergence between Gaussian mixture models,
        ICASSP; here with a single Gaussian as first argument.
    """
    return -torch.logsumexp(torch.log(_mixture_weights(mixture)) - _component_kls(q, mixture), -1)


def convex_kl_bound(q: Any, mixture: GaussianMixture) -> Tensor:
    """Bound the divergence of a Gaussian from a mixture by convexity: the documents' bound.

    KL(q ‖ Σ_i w_i p_i) ≤ Σ_i w_i KL(q ‖ p_i)

    Args:
        q: a diagonal Gaussian over (L,), batch (…).
        mixture: a mixture of C diagonal Gaussians over (L,).

    Returns:
        (…), an upper bound, in nats.

    >>> import pyro.distributions as dist
    >>> q = dist.Normal(torch.zeros(2), torch.ones(2)).to_event(1)
    >>> components = dist.Normal(torch.tensor([[1.0, 0], [-1, 0]]), torch.ones(2, 2)).to_event(1)
    >>> convex_kl_bound(q, GaussianMixture(dist.Categorical(logits=torch.zeros(2)), components))
    tensor(0.5000)
    """
    return (_mixture_weights(mixture) * _component_kls(q, mixture)).sum(-1)


def kl_to_prior(q: Any, prior: Any, mixture_kl: MixtureKL) -> Tensor:
    """Return KL(q ‖ prior): closed for a Gaussian prior, by ``mixture_kl`` for a mixture.

    Args:
        q: a Gaussian over (L,), batch (…).
        prior: a diagonal Gaussian or a mixture of such, over (L,).
        mixture_kl: e.g. :func:`convex_kl_bound`.

    Returns:
        (…), in nats.

    Raises:
        ValueError: for another guide or prior, e.g. one under a flow.
    """
    if isinstance(prior, GaussianMixture):
        return mixture_kl(q, prior)
    _check_gaussian(q, "guide")
    _check_gaussian(prior, "prior")
    other = prior.base_dist
    if isinstance(q, MultivariateNormal):
        return kl_full(q.loc, q.scale_tril, other.loc, torch.diag_embed(other.scale))
    return kl_diagonal(q.base_dist.loc, q.base_dist.scale, other.loc, other.scale)


def _check_gaussian(distribution: Any, whose: str) -> None:
    base = distribution.base_dist if isinstance(distribution, Independent) else distribution
    if not isinstance(base, (Normal, MultivariateNormal)):
        raise ValueError(
            f"the {whose}'s distribution of a latent is {type(base).__name__}, and no Gaussian: the divergence has no "
            "closed form; sample it instead, by Trace_ELBO or by pv.log_terms and pv.objectives.elbo"
        )


def _mixture_weights(mixture: GaussianMixture) -> Tensor:
    return cast(Tensor, mixture.mixture_distribution.probs)


def _component_kls(q: Any, mixture: GaussianMixture) -> Tensor:
    _check_gaussian(q, "guide")
    components = mixture.component_distribution.base_dist
    if isinstance(q, MultivariateNormal):
        factors = torch.diag_embed(components.scale)
        return kl_full(q.loc.unsqueeze(-2), q.scale_tril.unsqueeze(-3), components.loc, factors)
    loc, scale = q.base_dist.loc.unsqueeze(-2), q.base_dist.scale.unsqueeze(-2)
    return kl_diagonal(loc, scale, components.loc, components.scale)


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
