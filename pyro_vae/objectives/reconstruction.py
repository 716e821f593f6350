"""Reconstruction terms −log p(x | context), each formula written out.

No formula uses a distribution's ``log_prob``: tests compare the two as independent computations.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Normal
from torch.nn.functional import logsigmoid

from pyro_vae.distributions.batch_optimal import BatchOptimalNormal
from pyro_vae.distributions.discretised_logistic import DiscretisedLogistic
from pyro_vae.pair.site import bare, scored_entries

__all__ = [
    "MASKED_AROUND",
    "documents_mse_reconstruction",
    "gaussian_reconstruction",
    "mse_reconstruction",
    "optimal_scale_reconstruction",
    "reconstruction",
]

LOG_2PI = math.log(2 * math.pi)
MASKED_AROUND = (
    "{} is masked around its batch-optimal scale, which would be taken over entries that are not scored: mask the "
    "entries themselves, before .to_event, e.g. p_x(z).base_dist.mask(seen).to_event(1)"
)


def gaussian_reconstruction(
    x: Tensor, mean: Tensor, scale: Tensor | float, *, include_constant: bool = True, event_dim: int = 1
) -> Tensor:
    """Return −log N(x; x̂, γ² I) summed over the event.

    ‖x − x̂‖² / (2γ²) + k log γ + (k/2) log 2π

    Args:
        x: (…, *event).
        mean: x̂, (…, *event).
        scale: γ, broadcastable with ``mean``.
        include_constant: whether to include (k/2) log 2π, which the documents omit.
        event_dim: number of trailing event dimensions.

    Returns:
        (…), in nats.

    Reference:
        Documents 000 (3), (17), 002 (8), 003.

    >>> gaussian_reconstruction(torch.tensor([1.0, 0]), torch.zeros(2), 0.5)
    tensor(2.4516)
    """
    scale = torch.as_tensor(scale, dtype=mean.dtype, device=mean.device)
    term = (x - mean) ** 2 / (2 * scale**2) + torch.log(scale)
    if include_constant:
        term = term + LOG_2PI / 2
    return _sum_event(term, event_dim)


def mse_reconstruction(x: Tensor, mean: Tensor, scale: Tensor | float, *, event_dim: int = 1) -> Tensor:
    """Return the documents' MSE form, corrected, without its constant.

    k log γ + k/(2γ²) · MSE(x, x̂),   MSE(a, b) = (1/k) Σ_n (a_n − b_n)²

    Args:
        x, mean: (…, *event).
        scale: one γ.
        event_dim: number of trailing event dimensions.

    Returns:
        (…), in nats, (k/2) log 2π below :func:`gaussian_reconstruction`.
    """
    size = math.prod(mean.shape[mean.dim() - event_dim :])
    scale = torch.as_tensor(scale, dtype=mean.dtype)
    return size * torch.log(scale) + size / (2 * scale**2) * _sum_event((x - mean) ** 2, event_dim) / size


def documents_mse_reconstruction(x: Tensor, mean: Tensor, scale: Tensor | float, *, event_dim: int = 1) -> Tensor:
    """Return the MSE form as printed in 000 (20) and (21), which has two errors. Use :func:`mse_reconstruction`.

    k log γ + k/(2γ) · (1/k) Σ_n (x_n − x̂_n)

    The square is missing, and γ stands for γ². ``tests/documents/test_errata.py`` shows both.
    """
    size = math.prod(mean.shape[mean.dim() - event_dim :])
    scale = torch.as_tensor(scale, dtype=mean.dtype)
    return size * torch.log(scale) + size / (2 * scale) * _sum_event(x - mean, event_dim) / size


def optimal_scale_reconstruction(mean_squared_error: Tensor, size: int) -> Tensor:
    """Return the reconstruction term at the optimal γ, γ*² = E‖x − x̂‖² / k.

    (k/2) log MSE + (k/2)(1 + log 2π)

    Reference:
        Rybkin, Daniilidis and Levine (2021), Simple and effective VAE training with calibrated decoders, ICML.

    >>> optimal_scale_reconstruction(torch.tensor(0.25), 2)
    tensor(1.4516)
    """
    return size / 2 * (torch.log(mean_squared_error) + 1 + LOG_2PI)


def reconstruction(distribution: Any, x: Tensor) -> Tensor:
    """Return −log p(x | context) of a likelihood, computed from its parameters.

    Entries that a mask of the likelihood leaves out count as zero.

    Args:
        distribution: Gaussian, Bernoulli, continuous Bernoulli or discretised logistic, factorised over the event.
        x: (B, *event).

    Returns:
        The distribution's batch shape, in nats.

    Raises:
        ValueError: for a distribution without a formula here, and a mask around a batch-optimal one.
    """
    inner, scored = bare(distribution), scored_entries(distribution)
    if scored is not None and isinstance(inner, BatchOptimalNormal):
        raise ValueError(MASKED_AROUND.format("the likelihood"))
    loss = _entry_loss(inner, x)
    return _sum_event(loss if scored is None else torch.where(scored, loss, 0.0), len(distribution.event_shape))


@functools.singledispatch
def _entry_loss(distribution: Any, x: Tensor) -> Tensor:
    raise ValueError(f"no closed-form reconstruction term for {type(distribution).__name__}")


@_entry_loss.register
def _(distribution: Normal, x: Tensor) -> Tensor:
    scale = distribution.scale
    return (x - distribution.loc) ** 2 / (2 * scale**2) + torch.log(scale) + LOG_2PI / 2


@_entry_loss.register
def _(distribution: BatchOptimalNormal, x: Tensor) -> Tensor:
    squares = (x - distribution.loc) ** 2
    variance = distribution.batch_variance(squares)
    loss = (squares / variance + torch.log(variance) + LOG_2PI) / 2
    return loss if distribution.scored is None else torch.where(distribution.scored, loss, 0.0)


@_entry_loss.register
def _(distribution: torch.distributions.Bernoulli, x: Tensor) -> Tensor:
    return -logsigmoid(-distribution.logits) - x * distribution.logits


@_entry_loss.register
def _(distribution: torch.distributions.ContinuousBernoulli, x: Tensor) -> Tensor:
    logits = distribution.logits
    # log C(λ) = log(2 artanh(1 − 2λ) / (1 − 2λ)), with 1 − 2λ = −tanh(l/2): l/tanh(l/2), whose limit at l = 0 is 2.
    small = logits.abs() < 1e-3
    safe = torch.where(small, torch.ones_like(logits), logits)
    log_constant = torch.where(small, math.log(2) + logits**2 / 12, torch.log(safe / torch.tanh(safe / 2)))
    return -logsigmoid(-logits) - x * logits - log_constant


@_entry_loss.register
def _(distribution: DiscretisedLogistic, x: Tensor) -> Tensor:
    top = distribution.levels - 1
    upper = (x + 0.5 / top - distribution.loc) / distribution.scale
    lower = (x - 0.5 / top - distribution.loc) / distribution.scale
    low, high = x < 0.5 / top, x > 1 - 0.5 / top
    # log(σ(b) − σ(a)), the end levels with a = −∞ and b = ∞.
    inner = torch.log1p(-torch.exp(lower - upper))
    log_mass = torch.where(high, 0.0, logsigmoid(upper)) + torch.where(low, 0.0, logsigmoid(-lower))
    return -(log_mass + torch.where(low | high, 0.0, inner))


def _sum_event(term: Tensor, event_dim: int) -> Tensor:
    return term.flatten(term.dim() - event_dim).sum(-1) if event_dim else term
