"""Run a pair's programs, and read their log-densities."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_vae.pair.agreement import check_same_latents
from pyro_vae.pair.failures import COARSE, TOO_COARSE, explained
from pyro_vae.pair.handlers import DrawObserved, EnoughError, HoldLatents, StopAfter
from pyro_vae.pair.pair import Pair
from pyro_vae.pair.site import PARTICLES, Site, sites_of
from pyro_vae.pair.terms import LogTerms, SiteTerms
from pyro_vae.runtime.scalars import whole
from pyro_vae.runtime.threads import one_at_a_time

__all__ = [
    "PairTrace",
    "log_terms",
    "pyro_traces",
    "run_guide",
    "run_model",
    "run_program",
    "site_of_x",
    "site_terms",
    "trace_pair",
    "trace_programs",
]


@dataclass(frozen=True)
class PairTrace:
    """One run of a pair's guide, and of its model at the guide's draws.

    Args:
        guide: the guide's sites by name, in its order.
        model: the model's sites by name, in its order.
        data: the ``x`` that both programs took, (B, …).
    """

    guide: Mapping[str, Site]
    model: Mapping[str, Site]
    data: Tensor

    @cached_property
    def x(self) -> Site:
        """The model's site that observes ``x``.

        Raises:
            ValueError: as :func:`site_of_x`.
        """
        return site_of_x(self.model, self.data)

    @property
    def point_masses(self) -> frozenset[str]:
        """Names of the sites that the guide fixes to a point mass."""
        return frozenset(name for name, site in self.guide.items() if site.is_point_mass)

    @property
    def latents(self) -> dict[str, Site]:
        """The guide's sites except point masses."""
        return {name: site for name, site in self.guide.items() if not site.is_point_mass}

    @property
    def data_sites(self) -> dict[str, Site]:
        """The model's sites that count as data: the observed ones, and the guide's point masses."""
        fixed = self.point_masses
        return {name: site for name, site in self.model.items() if site.is_observed or name in fixed}

    @cached_property
    def terms(self) -> LogTerms:
        """The sites' log-densities, summed to :class:`LogTerms`, each (K, B), in nats."""
        data = self.data_sites
        log_lik: Any = 0.0
        log_prior: Any = 0.0
        log_guide: Any = 0.0
        guided = {name: site.log_prob for name, site in self.guide.items()}
        latents = {}
        for name, site in self.model.items():
            if name in data:
                log_lik = log_lik + site.log_prob
            else:
                log_prior = log_prior + site.log_prob
                latents[name] = SiteTerms(site.log_prob, guided[name])
        for term in guided.values():
            log_guide = log_guide + term
        zero = torch.zeros_like(log_lik + log_prior)
        return LogTerms(zero + log_lik, zero + log_prior, zero + log_guide, latents)

    @property
    def site_terms(self) -> dict[str, SiteTerms]:
        """Each model site's log-densities by name, in the model's order."""
        terms = {}
        for name, site in self.model.items():
            log_model = site.log_prob
            log_guide = torch.zeros_like(log_model) if site.is_observed else self.guide[name].log_prob
            terms[name] = SiteTerms(log_model, log_guide)
        return terms


@one_at_a_time
def log_terms(pair: Pair, *batch: Tensor, num_particles: int = 1) -> LogTerms:
    """Run the guide and the replayed model once and sum their unscaled log-densities.

    log w_kb = log p(x_b, z_kb) − log q(z_kb | x_b),   z_kb ~ q(z | x_b)

    Args:
        pair: any pair.
        batch: ``x`` (B, …) and the pair's conditions, each with B rows.
        num_particles: K, draws per datum.

    Returns:
        :class:`LogTerms`, each field (K, B), in nats.

    Raises:
        ValueError: for latent sites that model and guide do not share, sites outside the data plate, and subsampling
            plates.
    """
    return trace_pair(pair, *batch, num_particles=num_particles).terms


@one_at_a_time
def site_terms(pair: Pair, *batch: Tensor, num_particles: int = 1) -> dict[str, SiteTerms]:
    """Run the guide and the replayed model once and return each site's log-densities.

    Args:
        pair: any pair.
        batch: ``x`` (B, …) and the pair's conditions.
        num_particles: K, draws per datum.

    Returns:
        :class:`SiteTerms` (K, B), in nats, by name, in the model's order.

    Raises:
        ValueError: as :func:`log_terms`.
    """
    return trace_pair(pair, *batch, num_particles=num_particles).site_terms


def trace_pair(pair: Pair, *batch: Tensor, num_particles: int = 1) -> PairTrace:
    """Run the guide, and the model at its draws, with K particles.

    Args:
        pair: any pair.
        batch: ``x`` (B, …) and the pair's conditions.
        num_particles: K, draws per datum.

    Raises:
        ValueError: for K < 1, parameters of half precision, and latent sites that model and guide do not share.

    >>> import pyro_vae as pv
    >>> trace = trace_pair(pv.models.LinearGaussianVAE(5, 2), torch.zeros(3, 5), num_particles=4)
    >>> trace.guide["z"].value.shape, trace.x.log_prob.shape
    (torch.Size([4, 3, 2]), torch.Size([4, 3]))
    """
    # The first parameter tells for all but odd mixtures, at the cost of a microsecond.
    name, first = next(pair.named_parameters(), ("", None))
    if first is not None and first.dtype in COARSE:
        raise ValueError(TOO_COARSE.format(name, first.dtype))
    return trace_programs(pair, *_programs(pair), *batch, num_particles=num_particles)


def trace_programs(
    pair: Pair, model: Callable[..., Any], guide: Callable[..., Any], *batch: Tensor, num_particles: int
) -> PairTrace:
    """Run two programs as :func:`trace_pair` does.

    Pass ``pair.model`` and ``pair.guide`` where Pyro must see their parameters.

    Args:
        pair: the pair that they belong to.
        model, guide: called with ``batch``.
        batch: the data and their conditions.
        num_particles: K.
    """
    drawn, replayed = pyro_traces(pair, model, guide, *batch, num_particles=num_particles)
    trace = PairTrace(sites_of(drawn), sites_of(replayed), batch[0])
    check_same_latents(trace.guide, trace.model)
    return trace


def pyro_traces(
    pair: Pair, model: Callable[..., Any], guide: Callable[..., Any], *batch: Tensor, num_particles: int
) -> tuple[Trace, Trace]:
    """Return Pyro's traces of the guide and of the replayed model, for Pyro's ELBOs."""
    num_particles = whole(num_particles, "num_particles")
    if num_particles < 1:
        raise ValueError(f"num_particles is {num_particles}; it counts draws per datum and must be at least 1")
    try:
        with _particle_plate(pair, num_particles):
            drawn = poutine.trace(guide).get_trace(*batch)
            return drawn, poutine.trace(poutine.replay(model, trace=drawn)).get_trace(*batch)
    except Exception as failure:
        if (told := explained(pair, failure, batch)) is not None:
            raise told from failure
        raise


def run_guide(
    pair: Pair, *batch: Tensor, num_particles: int | None = None, values: Mapping[str, Tensor] | None = None
) -> dict[str, Site]:
    """Run the guide alone and return its sites.

    Args:
        pair: any pair.
        batch: ``x`` and the pair's conditions.
        num_particles: K, or None for no plate of particles.
        values: values to hold sites at, by name, in the program's order (:attr:`Site.drawn`).
    """
    _, guide = _programs(pair)
    return run_program(pair, guide, *batch, num_particles=num_particles, values=values)


def run_model(
    pair: Pair,
    *batch: Tensor,
    num_particles: int | None = None,
    values: Mapping[str, Tensor] | None = None,
    draw: Collection[str] = (),
    until: Collection[str] = (),
) -> dict[str, Site]:
    """Run the model alone and return its sites. Latents without a value are drawn from their priors.

    Args:
        pair, batch, num_particles, values: as for :func:`run_guide`.
        draw: names of observed sites to draw, or to hold at ``values``, in place of their data.
        until: names of sites after which the model is left; all sites by default.
    """
    model, _ = _programs(pair)
    model = DrawObserved(draw)(model) if draw else model
    return run_program(pair, model, *batch, num_particles=num_particles, values=values, until=until)


def run_program(
    pair: Pair,
    program: Callable[..., Any],
    *arguments: Tensor,
    num_particles: int | None = None,
    values: Mapping[str, Tensor] | None = None,
    until: Collection[str] = (),
) -> dict[str, Site]:
    """Run one program of a pair and return its sites.

    Args:
        pair: the pair, which knows the dimension of the particles.
        program: called with ``arguments``.
        arguments: data and conditions.
        num_particles: K, or None for no plate of particles.
        values: values to hold latent sites at, by name, in the program's order.
        until: names of sites after which the program is left; all sites by default.
    """
    held = program if values is None else HoldLatents(values)(program)
    tracing = poutine.trace(StopAfter(until)(held) if until else held)
    try:
        with nullcontext() if num_particles is None else _particle_plate(pair, num_particles), suppress(EnoughError):
            tracing(*arguments)
    except Exception as failure:
        if (told := explained(pair, failure, arguments)) is not None:
            raise told from failure
        raise
    return sites_of(tracing.msngr.trace)


def site_of_x(model: Mapping[str, Site], data: Tensor) -> Site:
    """Return the site that observes ``data``, also in a run of the model that drew it.

    Raises:
        ValueError: unless exactly one site observes ``data``, or one site observes anything.
    """
    observed = [site for site in model.values() if site.observation is not None and not site.is_factor]
    exact = [site for site in observed if site.observation is data]
    if not observed:
        raise ValueError("the model observes nothing: pass obs=x at the data's site")
    if len(exact or observed) != 1:
        names = [site.name for site in observed]
        raise ValueError(
            f"the model observes {names}: exactly one site must observe x itself, as obs=x; pass other data as "
            "conditions and observe them whole, e.g. model(self, x, labels) with obs=labels"
        )
    return (exact or observed)[0]


def _programs(pair: Pair) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return model and guide as plain functions, which announce no parameters to Pyro."""
    return partial(type(pair).model, pair), partial(type(pair).guide, pair)


def _particle_plate(pair: Pair, num_particles: int) -> pyro.plate:
    # To the left of the pair's plates.
    return pyro.plate(PARTICLES, num_particles, dim=-1 - pair.max_plate_nesting)
