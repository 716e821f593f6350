"""Objectives that training maximises: functions of :class:`~pyro_vae.LogTerms`, per datum, in nats."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from pyro_vae.networks.annealed import Annealed
from pyro_vae.pair.terms import LogTerms

__all__ = ["Objective", "beta_elbo", "capacity_elbo", "elbo", "free_bits", "iwae", "renyi"]

Objective: TypeAlias = Callable[[LogTerms], Tensor]


def elbo(terms: LogTerms) -> Tensor:
    """Average the log-weights over particles: the evidence lower bound, ELBO.

    (1/K) Σ_k [log p(x, z_k) − log q(z_k | x)]

    Args:
        terms: log-densities, each (K, B).

    Returns:
        (B,), in nats.

    >>> elbo(LogTerms(torch.zeros(4, 2), torch.zeros(4, 2), torch.ones(4, 2)))
    tensor([-1., -1.])
    """
    return terms.log_weights.mean(0)


def iwae(terms: LogTerms) -> Tensor:
    """Take the logarithm of the averaged weights: the importance-weighted bound.

    log (1/K) Σ_k p(x, z_k) / q(z_k | x)

    Args:
        terms: log-densities, each (K, B).

    Returns:
        (B,), in nats. Its expectation lies between the ELBO and log p(x).

    Reference:
        Burda, Grosse and Salakhutdinov (2016), Importance weighted autoencoders, ICLR.

    >>> iwae(LogTerms(torch.zeros(4, 2), torch.zeros(4, 2), torch.ones(4, 2)))
    tensor([-1., -1.])
    """
    return torch.logsumexp(terms.log_weights, 0) - math.log(len(terms.log_weights))


def renyi(alpha: float) -> Objective:
    """Return the variational Rényi bound of order α.

    1/(1 − α) · log (1/K) Σ_k [p(x, z_k) / q(z_k | x)]^(1 − α)

    At α = 1 it is the ELBO, at α = 0 the importance-weighted bound. For given draws it never increases with α.

    For α ≥ 0 its expectation is a lower bound on log p(x), for any K. For α < 0 it tends to an upper bound as K grows;
    with few particles it may lie on either side.

    Args:
        alpha: α, any finite number.

    Returns:
        An objective, log-terms (K, B) to (B,), in nats, named ``renyi(α)``.

    Raises:
        ValueError: for α that is not finite.

    Reference:
        Li and Turner (2016), Rényi divergence variational inference, NeurIPS.

    >>> renyi(0.5)(LogTerms(torch.zeros(4, 2), torch.zeros(4, 2), torch.ones(4, 2)))
    tensor([-1., -1.])
    """
    if not math.isfinite(alpha):
        raise ValueError(f"alpha is {alpha}; the order of a Rényi bound must be a finite number")

    def objective(terms: LogTerms) -> Tensor:
        if alpha == 1:
            return elbo(terms)
        return _power_mean(terms.log_weights, 1 - alpha)

    return _named(objective, f"renyi({alpha:g})")


def _power_mean(log_weights: Tensor, order: float) -> Tensor:
    """Return 1/r log (1/K) Σ_k w_k^r, (B,); weights are centred first, since all digits of log w^r may cancel in it."""
    mean, largest = log_weights.detach().mean(0), log_weights.detach().amax(0)
    centre = torch.where(mean.isfinite(), mean, torch.where(largest.isfinite(), largest, 0.0))
    powers = order * (log_weights - centre)
    small = powers.detach().abs().amax(0) < 1
    near = torch.log1p(torch.expm1(torch.where(small, powers, 0.0)).mean(0))
    far = torch.logsumexp(powers, 0) - math.log(len(log_weights))
    return centre + torch.where(small, near, far) / order


def beta_elbo(beta: float | Annealed) -> Objective:
    """Return the ELBO with its divergence weighted by β.

    (1/K) Σ_k [log p(x | z_k) + β (log p(z_k) − log q(z_k | x))]

    In expectation it is the ELBO − (β − 1) KL(q(z | x) ‖ p(z)). For β ≥ 1 that is a lower bound on log p(x). A site
    that the guide fixes to a point mass counts as data, and is not weighted.

    Args:
        beta: β ≥ 0, a number or an :class:`~pyro_vae.Annealed` one. Store the latter as an attribute of the pair:
            :func:`~pyro_vae.fit` then moves it.

    Returns:
        An objective, log-terms (K, B) to (B,), in nats, named ``beta_elbo(β)``.

    Raises:
        ValueError: for β that is negative or not finite.

    Reference:
        Higgins et al. (2017), β-VAE: learning basic visual concepts with a constrained variational framework, ICLR.

    >>> beta_elbo(4.0)(LogTerms(torch.zeros(4, 2), torch.zeros(4, 2), torch.ones(4, 2)))
    tensor([-4., -4.])
    """
    weight, name = _weight(beta)

    def objective(terms: LogTerms) -> Tensor:
        return (terms.log_lik + weight() * (terms.log_prior - terms.log_guide)).mean(0)

    return _named(objective, f"beta_elbo({name})", annealed=beta)


def capacity_elbo(weight: float, capacity: Annealed) -> Objective:
    """Return the objective that holds the divergence near a capacity C, which may rise while training.

    (1/K) Σ_k log p(x | z_k) − γ |KL − C|,      KL = mean over data and particles of log q(z | x) − log p(z)

    It is no bound on log p(x). The divergence is that of the whole batch: one datum may use more capacity than another.
    The sampled divergence is unbiased. Its distance from C is overestimated by at most its standard error.

    Args:
        weight: γ ≥ 0.
        capacity: C, in nats. Store it as an attribute of the pair: :func:`~pyro_vae.fit` then moves it.

    Returns:
        An objective, log-terms (K, B) to (B,), in nats, named after its numbers.

    Raises:
        ValueError: for a weight that is negative or not finite, and a capacity that is negative.

    Reference:
        Burgess et al. (2018), Understanding disentangling in β-VAE, arXiv:1804.03599.

    >>> terms = LogTerms(torch.zeros(4, 2), torch.zeros(4, 2), torch.ones(4, 2))
    >>> capacity_elbo(10.0, Annealed(0.0, 0.8, 0))(terms)
    tensor([-2.0000, -2.0000])
    """
    if not 0 <= weight < math.inf:
        raise ValueError(f"weight is {weight}; it must be finite and at least 0")
    if min(capacity.start, capacity.end) < 0:
        raise ValueError(f"capacity goes from {capacity.start} to {capacity.end}; a divergence is never negative")

    def objective(terms: LogTerms) -> Tensor:
        divergence = (terms.log_guide - terms.log_prior).mean()
        return terms.log_lik.mean(0) - weight * (divergence - capacity()).abs()

    return _named(objective, f"capacity_elbo({weight:g}, {_way(capacity)})", annealed=capacity)


def free_bits(floor: float, beta: float | Annealed = 1.0) -> Objective:
    """Return the ELBO with a floor λ, the free bits, under the divergence of each latent site.

    (1/K) Σ_k log p(x | z_k) − β Σ_sites max(λ, KL_site),   KL_site averaged over draws and over the batch

    A site with a divergence above λ counts as in the ELBO. A site below adds the constant λ, without a gradient: it may
    carry up to λ nats at no cost. The batch mean decides which case applies; a single draw is too noisy.

    For a warm-up, let β rise from 0 to 1:
    ``pair.beta = pv.Annealed(0.0, 1.0, epochs=10); pv.fit(pair, x, loss=free_bits(2.0, pair.beta))``.

    Args:
        floor: λ ≥ 0, nats per datum and site; 0 gives the ELBO, except that negative estimates count as 0.
        beta: β ≥ 0, a number or an :class:`~pyro_vae.Annealed` one, as for :func:`beta_elbo`.

    Returns:
        An objective, log-terms (K, B) to (B,), in nats, named ``free_bits(λ)``. For β = 1 its batch mean is at most the
        ELBO.

    Raises:
        ValueError: for λ or β that is negative or not finite.

    Reference:
        Kingma, Salimans, Jozefowicz, Chen, Sutskever and Welling (2016), Improved variational inference with inverse
        autoregressive flow, NeurIPS, appendix C.8.

    >>> from pyro_vae.pair.terms import SiteTerms
    >>> zero, one = torch.zeros(4, 2), torch.ones(4, 2)
    >>> free_bits(3.0)(LogTerms(zero, zero, one, {"z": SiteTerms(zero, one)}))
    tensor([-3., -3.])
    """
    if not 0 <= floor < math.inf:
        raise ValueError(f"free bits are {floor}; their floor must be finite and at least 0")
    weight, name = _weight(beta)

    def objective(terms: LogTerms) -> Tensor:
        if not terms.latents and bool((terms.log_guide != terms.log_prior).any()):
            raise ValueError("free bits need the divergence of each site: take the terms from pv.log_terms")
        value = terms.log_lik.mean(0)
        for site in terms.latents.values():
            divergence = (site.log_guide - site.log_model).mean(0)
            value = value - weight() * torch.where(divergence.mean() > floor, divergence, float(floor))
        return value

    return _named(objective, f"free_bits({floor:g})" if beta == 1 else f"free_bits({floor:g}, {name})", annealed=beta)


def _weight(beta: float | Annealed) -> tuple[Callable[[], Tensor | float], str]:
    """Return a function that reads β, and a name for it."""
    if isinstance(beta, Annealed):
        _check_weight(min(beta.start, beta.end), _way(beta))
        return beta, _way(beta)
    _check_weight(beta, str(beta))
    return lambda: beta, f"{beta:g}"


def _check_weight(lowest: float, name: str) -> None:
    if not 0 <= lowest < math.inf:
        raise ValueError(f"beta is {name}; the weight of the divergence must be finite and at least 0")


def _way(number: Annealed) -> str:
    return f"{number.start:g} to {number.end:g} in {number.epochs:g} epochs"


def _named(objective: Objective, name: str, annealed: object = None) -> Objective:
    # A run folder stores the loss by this name: resuming with another α or β is refused.
    objective.__name__ = name
    if isinstance(annealed, Annealed):
        # check_loss looks for this number among the pair's modules, which fit moves.
        objective.annealed = annealed  # type: ignore[attr-defined]
    return objective
