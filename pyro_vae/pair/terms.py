"""Log-densities of a pair per particle and datum."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_vae.pair.pair import Pair
from pyro_vae.pair.trace import particle_dim, point_masses, sample_sites, site_log_prob, trace_pair

__all__ = ["LogTerms", "SiteTerms", "log_terms", "site_terms", "sum_terms"]


class SiteTerms(NamedTuple):
    """One site's log-densities, each ``(K, B)``, in nats; ``log_guide`` is zero at an observed site."""

    log_model: Tensor
    log_guide: Tensor


class _Sums(NamedTuple):
    log_lik: Tensor
    log_prior: Tensor
    log_guide: Tensor


class LogTerms(_Sums):
    """Log-densities per particle and datum, a tuple of three, each ``(K, B)``, in nats.

    ``log_lik`` sums the data terms: the observed sites, and the latent sites that the guide fixes to a point mass.
    ``log_prior`` sums the model's other latent sites, ``log_guide`` the guide's sites. The attribute ``latents`` has
    those other latent sites one by one, for objectives that treat them apart; it is no part of the tuple.
    """

    latents: Mapping[str, SiteTerms]

    def __new__(
        cls, log_lik: Tensor, log_prior: Tensor, log_guide: Tensor, latents: Mapping[str, SiteTerms] | None = None
    ) -> LogTerms:
        terms = super().__new__(cls, log_lik, log_prior, log_guide)
        terms.latents = {} if latents is None else latents
        return terms

    @property
    def log_weights(self) -> Tensor:
        """log p(x, z) − log q(z | x), ``(K, B)``."""
        return self.log_lik + self.log_prior - self.log_guide


def log_terms(pair: Pair, *batch: Tensor, num_particles: int = 1) -> LogTerms:
    """Run the guide and the replayed model once and sum their unscaled site log-densities.

    log w_kb = log p(x_b, z_kb) − log q(z_kb | x_b),   z_kb ~ q(z | x_b)

    Args:
        pair: any pair.
        batch: ``x`` (B, …) and the pair's conditions, each with B rows.
        num_particles: K, draws per datum.

    Returns:
        :class:`LogTerms`, each field (K, B), in nats.

    Raises:
        ValueError: for sites that model and guide do not share, sites outside the data plate, subsampling plates.
    """
    guide, model = trace_pair(pair, *batch, num_particles=num_particles)
    return sum_terms(guide, model, particle_dim(pair))


def site_terms(pair: Pair, *batch: Tensor, num_particles: int = 1) -> dict[str, SiteTerms]:
    """Run the guide and the replayed model once and return each site's log-densities by name.

    Args:
        pair: any pair.
        batch: ``x`` (B, …) and the pair's conditions.
        num_particles: K, draws per datum.

    Returns:
        For each site of the model, in its order, :class:`SiteTerms` of shape (K, B), in nats.

    Raises:
        ValueError: as :func:`log_terms`.
    """
    guide, model = trace_pair(pair, *batch, num_particles=num_particles)
    dim = particle_dim(pair)
    terms = {}
    for name, site in sample_sites(model).items():
        log_model = site_log_prob(site, dim)
        log_guide = torch.zeros_like(log_model) if site["is_observed"] else site_log_prob(guide.nodes[name], dim)
        terms[name] = SiteTerms(log_model, log_guide)
    return terms


def sum_terms(guide: Trace, model: Trace, particle_dim: int) -> LogTerms:
    """Sum two traces' site log-densities into :class:`LogTerms`, each (K, B)."""
    fixed = point_masses(guide)
    log_lik: Any = 0.0
    log_prior: Any = 0.0
    log_guide: Any = 0.0
    guided = {name: site_log_prob(site, particle_dim) for name, site in sample_sites(guide).items()}
    latents = {}
    for name, site in sample_sites(model).items():
        term = site_log_prob(site, particle_dim)
        if site["is_observed"] or name in fixed:
            log_lik = log_lik + term
        else:
            log_prior = log_prior + term
            latents[name] = SiteTerms(term, guided[name])
    for term in guided.values():
        log_guide = log_guide + term
    zero = torch.zeros_like(log_lik + log_prior)
    return LogTerms(zero + log_lik, zero + log_prior, zero + log_guide, latents)
