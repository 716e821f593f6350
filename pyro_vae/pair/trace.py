"""Run a pair's programs, and read their log-densities."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_vae.pair.pair import Pair
from pyro_vae.pair.site import PARTICLES, Site, sites_of
from pyro_vae.pair.terms import LogTerms, SiteTerms

__all__ = [
    "PairTrace",
    "check_measures",
    "check_same_latents",
    "log_terms",
    "particle_dim",
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
        data: the ``x`` that both were given, (B, …).
    """

    guide: Mapping[str, Site]
    model: Mapping[str, Site]
    data: Tensor

    @cached_property
    def x(self) -> Site:
        """The model's site that observes ``x``.

        Raises:
            ValueError: when no site or several sites observe something, and not exactly one of them ``x`` itself.
        """
        return site_of_x(self.model, self.data)

    @property
    def point_masses(self) -> frozenset[str]:
        """Names of the sites that the guide fixes to a point mass."""
        return frozenset(name for name, site in self.guide.items() if site.is_point_mass)

    @property
    def latents(self) -> dict[str, Site]:
        """The guide's sites with a density or mass of their own: all but the point masses."""
        return {name: site for name, site in self.guide.items() if not site.is_point_mass}

    @property
    def data_sites(self) -> dict[str, Site]:
        """The model's sites that count as data: the observed ones, and the guide's point masses."""
        fixed = self.point_masses
        return {name: site for name, site in self.model.items() if site.is_observed or name in fixed}

    @cached_property
    def terms(self) -> LogTerms:
        """The sites' log-densities summed to :class:`LogTerms`, each (K, B), in nats."""
        fixed = self.point_masses
        log_lik: Any = 0.0
        log_prior: Any = 0.0
        log_guide: Any = 0.0
        guided = {name: site.log_prob for name, site in self.guide.items()}
        latents = {}
        for name, site in self.model.items():
            term = site.log_prob
            if site.is_observed or name in fixed:
                log_lik = log_lik + term
            else:
                log_prior = log_prior + term
                latents[name] = SiteTerms(term, guided[name])
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
    return trace_pair(pair, *batch, num_particles=num_particles).terms


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
    return trace_pair(pair, *batch, num_particles=num_particles).site_terms


def trace_pair(pair: Pair, *batch: Tensor, num_particles: int = 1) -> PairTrace:
    """Run the guide, and the model at its draws, under a plate of K particles.

    Raises:
        ValueError: for K < 1, and for latent sites that model and guide do not share.
    """
    return trace_programs(pair, type(pair).model, type(pair).guide, pair, *batch, num_particles=num_particles)


def trace_programs(
    pair: Pair, model: Callable[..., Any], guide: Callable[..., Any], *arguments: Any, num_particles: int
) -> PairTrace:
    """Run two programs as :func:`trace_pair` does, such as the pair's own, whose parameters Pyro then sees.

    Args:
        pair: the pair that they belong to.
        model, guide: called with ``arguments``.
        arguments: the data and their conditions, after the pair itself where the programs are plain methods.
        num_particles: K.
    """
    drawn, replayed = pyro_traces(pair, model, guide, *arguments, num_particles=num_particles)
    data = arguments[1] if arguments[0] is pair else arguments[0]
    return PairTrace(sites_of(drawn), sites_of(replayed), data)


def pyro_traces(
    pair: Pair, model: Callable[..., Any], guide: Callable[..., Any], *arguments: Any, num_particles: int
) -> tuple[Trace, Trace]:
    """Return Pyro's own traces of the guide and of the replayed model, for Pyro's ELBOs."""
    if num_particles < 1:
        raise ValueError(f"num_particles is {num_particles}; it counts draws per datum and must be at least 1")
    with _particle_plate(pair, num_particles):
        drawn = poutine.trace(guide).get_trace(*arguments)
        replayed = poutine.trace(poutine.replay(model, trace=drawn)).get_trace(*arguments)
    check_same_latents(sites_of(drawn), sites_of(replayed))
    return drawn, replayed


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
    return run_program(pair, type(pair).guide, pair, *batch, num_particles=num_particles, values=values)


def run_model(
    pair: Pair,
    *batch: Tensor,
    num_particles: int | None = None,
    values: Mapping[str, Tensor] | None = None,
    observe: bool = True,
) -> dict[str, Site]:
    """Run the model alone, with latents from their priors where they are not held, and return its sites.

    Args:
        pair, batch, num_particles, values: as for :func:`run_guide`.
        observe: whether observed sites keep their data; else they are drawn.
    """
    model = type(pair).model if observe else poutine.uncondition(type(pair).model)
    return run_program(pair, model, pair, *batch, num_particles=num_particles, values=values)


def run_program(
    pair: Pair,
    program: Callable[..., Any],
    *arguments: Any,
    num_particles: int | None = None,
    values: Mapping[str, Tensor] | None = None,
) -> dict[str, Site]:
    """Run one program of a pair, with some latent sites held at values, and return its sites.

    Args:
        pair: the pair, which knows where the particles' dimension is.
        program: called with ``arguments``.
        arguments: the pair where the program is a plain method, then data and conditions.
        num_particles: K, or None for no plate of particles.
        values: values by site, in the program's order.
    """
    held = program if values is None else _Hold(values)(program)
    if num_particles is None:
        return sites_of(poutine.trace(held).get_trace(*arguments))
    with _particle_plate(pair, num_particles):
        return sites_of(poutine.trace(held).get_trace(*arguments))


class _Hold(Messenger):
    """Give latent sites values, and leave them latent: they are scored, not observed."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.values and not msg["is_observed"]:
            msg["value"], msg["done"] = self.values[msg["name"]], True


def _particle_plate(pair: Pair, num_particles: int) -> pyro.plate:
    return pyro.plate(PARTICLES, num_particles, dim=particle_dim(pair))


def particle_dim(pair: Pair) -> int:
    """Return the batch dimension of the particles, to the left of the pair's own plates."""
    return -1 - pair.max_plate_nesting


def site_of_x(model: Mapping[str, Site], data: Tensor) -> Site:
    """Return the site that observes ``data``, also in a run that drew it anew.

    Raises:
        ValueError: when no site or several sites observe something, and not exactly one of them ``data`` itself.
    """
    observed = [site for site in model.values() if site.observation is not None]
    exact = [site for site in observed if site.observation is data]
    if len(exact or observed) != 1:
        names = [site.name for site in observed]
        raise ValueError(f"the model observes {names}: exactly one site must observe x itself, as obs=x")
    return (exact or observed)[0]


def check_same_latents(guide: Mapping[str, Site], model: Mapping[str, Site]) -> None:
    """Refuse a guide that samples other sites than the model's latent ones.

    Raises:
        ValueError: naming the sites that one of them lacks.
    """
    latents = {name for name, site in model.items() if not site.is_observed}
    if missing := sorted(latents - set(guide)):
        raise ValueError(
            f"the model samples {missing}, the guide does not: their KL term would be missing from the ELBO; sample "
            "them in the guide too"
        )
    if extra := sorted(set(guide) - latents):
        raise ValueError(f"the guide samples {extra}, which is no latent site of the model; rename or remove it")


def check_measures(trace: PairTrace) -> None:
    """Refuse a guide whose density at a site is of another kind than the model's: their ratio would mean nothing.

    Raises:
        ValueError: for a continuous guide at a discrete site and the reverse, and for a point mass outside the support
            of the model's site.
    """
    for name, site in trace.guide.items():
        other = trace.model[name]
        if site.is_point_mass:
            if not bool(other.fn.support.check(site.drawn).all()):
                raise ValueError(
                    f"the guide's point mass at '{name}' lies outside the model's support, {other.fn.support}"
                )
        elif site.is_discrete != other.is_discrete:
            raise ValueError(
                f"site '{name}' is {'discrete' if other.is_discrete else 'continuous'} in the model but not in "
                "the guide: a mass over a density is no weight; give both the same kind of distribution"
            )
