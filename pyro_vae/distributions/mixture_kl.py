"""The divergence of a Gaussian from a mixture, which has no closed form: one estimate and two bounds.

Every function sums over the event and returns nats, one per batch entry.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias, cast

import torch
from pyro.distributions import MaskedDistribution
from torch import Tensor
from torch.distributions import Independent, MultivariateNormal, Normal

from pyro_vae.distributions.kl import kl_diagonal, kl_full
from pyro_vae.distributions.mixtures import GaussianMixture

__all__ = ["MixtureKL", "convex_kl_bound", "kl_to_prior", "monte_carlo_kl", "variational_kl_bound"]

MixtureKL: TypeAlias = Callable[[Any, GaussianMixture], Tensor]


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
    for distribution, whose in ((q, "guide"), (mixture, "prior")):
        _check_unmasked(distribution, whose)
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
    _check_unmasked(distribution, whose)
    base = distribution.base_dist if isinstance(distribution, Independent) else distribution
    if not isinstance(base, (Normal, MultivariateNormal)):
        raise ValueError(
            f"the {whose}'s distribution of a latent is {type(base).__name__}: the divergence is closed here for "
            "diagonal and full Gaussians (Normal, MultivariateNormal); sample it instead, by Trace_ELBO or by "
            "pv.log_terms and pv.objectives.elbo"
        )


def _check_unmasked(distribution: Any, whose: str) -> None:
    while isinstance(distribution, (Independent, MaskedDistribution)):
        if isinstance(distribution, MaskedDistribution):
            raise ValueError(
                f"the {whose}'s distribution of a latent is masked, and its divergence would count what is not scored: "
                "sample it instead, by Trace_ELBO or by pv.log_terms and pv.objectives.elbo"
            )
        distribution = distribution.base_dist


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
