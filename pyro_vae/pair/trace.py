"""Run a pair's two programs and read their sites."""

from __future__ import annotations

from typing import Any

import pyro
from pyro import poutine
from pyro.distributions import Delta
from pyro.distributions.util import scale_and_mask
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_vae.pair.pair import Pair

__all__ = [
    "bare",
    "check_measures",
    "check_same_latents",
    "particle_dim",
    "particle_plate",
    "point_masses",
    "sample_sites",
    "site_log_prob",
    "trace_pair",
    "whole_value",
    "x_site",
]


def trace_pair(pair: Pair, *batch: Tensor, num_particles: int = 1) -> tuple[Trace, Trace]:
    """Return the guide's trace and the model's, replayed against it, both under a plate of K particles."""
    if num_particles < 1:
        raise ValueError(f"num_particles is {num_particles}; it counts draws per datum and must be at least 1")
    with particle_plate(pair, num_particles):
        guide = poutine.trace(type(pair).guide).get_trace(pair, *batch)
        model = poutine.trace(poutine.replay(type(pair).model, trace=guide)).get_trace(pair, *batch)
    check_same_latents(guide, model)
    return guide, model


def particle_plate(pair: Pair, num_particles: int) -> pyro.plate:
    """Return the plate of particles, to the left of the pair's own plates."""
    return pyro.plate("particles", num_particles, dim=particle_dim(pair))


def particle_dim(pair: Pair) -> int:
    """Return the batch dimension of the particles, to the left of the pair's own plates."""
    return -1 - pair.max_plate_nesting


def sample_sites(trace: Trace) -> dict[str, Any]:
    """Return a trace's sample sites by name, in order, without ``pyro.deterministic`` ones."""
    sites = {}
    for name, site in trace.nodes.items():
        if site["type"] != "sample" or site["infer"].get("_deterministic", False):
            continue
        if type(site["fn"]).__name__ == "_Subsample":
            if (site["fn"].subsample_size or site["fn"].size) < site["fn"].size:
                raise ValueError(
                    f"plate '{name}' subsamples: write pyro.plate('{name}', len(x)), the batch's own size; "
                    "training scales by itself, and a scale inside a pair breaks every bound with a logsumexp"
                )
            continue
        sites[name] = site
    return sites


def site_log_prob(site: Any, particle_dim: int) -> Tensor:
    """Return a site's unscaled log-density summed to (K, B): plates other than particles and data are summed."""
    plates = {frame.name: frame for frame in site["cond_indep_stack"]}
    if "data" not in plates:
        raise ValueError(
            f"site '{site['name']}' lies outside the data plate: sample it inside pyro.plate('data', len(x)), so that "
            "its log-density belongs to one datum"
        )
    data_dim = plates["data"].dim
    log_prob = scale_and_mask(site["fn"].log_prob(site["value"]), 1.0, site["mask"])
    others = [dim for dim in range(-log_prob.dim(), 0) if dim not in (data_dim, particle_dim)]
    named = {frame.dim for frame in plates.values()}
    if stray := [dim for dim in others if log_prob.shape[dim] != 1 and dim not in named]:
        raise ValueError(
            f"site '{site['name']}' has {log_prob.shape[stray[0]]} entries in dimension {stray[0]} of its batch, which "
            "belongs to no plate: particles and data come left of and in the pair's plates; make that dimension part "
            "of the event (.to_event), or give it a plate"
        )
    return log_prob.sum(others) if others else log_prob


def point_masses(guide: Trace) -> set[str]:
    """Return the names of the sites that a guide's trace fixes to a point mass."""
    return {name for name, site in sample_sites(guide).items() if isinstance(bare(site["fn"]), Delta)}


def x_site(sites: dict[str, Any], x: Tensor) -> Any:
    """Return the site that observes x, also where ``uncondition`` has freed it.

    Raises:
        ValueError: when several sites observe something and none of them x itself.
    """
    observed = [site for site in sites.values() if site["is_observed"] or site["infer"].get("was_observed", False)]
    exact = [site for site in observed if site["value"] is x or site["infer"].get("obs") is x]
    if len(exact or observed) != 1:
        names = [site["name"] for site in observed]
        raise ValueError(f"the model observes {names}: exactly one site must observe x itself, as obs=x")
    return (exact or observed)[0]


def check_measures(guide: Trace, model: Trace) -> None:
    """Refuse a guide whose density at a site is of another kind than the model's: their ratio would mean nothing.

    Raises:
        ValueError: for a continuous guide at a discrete site and the reverse, and for a point mass outside the
            support of the model's site.
    """
    for name, site in sample_sites(guide).items():
        other = sample_sites(model)[name]["fn"]
        if isinstance(bare(site["fn"]), Delta):
            if not bool(other.support.check(site["value"]).all()):
                raise ValueError(
                    f"the guide's point mass at '{name}' lies outside the model's support, {other.support}"
                )
        elif site["fn"].support.is_discrete != other.support.is_discrete:
            raise ValueError(
                f"site '{name}' is {'discrete' if other.support.is_discrete else 'continuous'} in the model but not in "
                "the guide: a mass over a density is no weight; give both the same kind of distribution"
            )


def bare(distribution: Any) -> Any:
    """Return the distribution inside ``Independent``, expanded and masked wrappers."""
    while hasattr(distribution, "base_dist") and type(distribution).__name__ in (
        "Independent",
        "MaskedDistribution",
        "ExpandedDistribution",
    ):
        distribution = distribution.base_dist
    return distribution


def check_same_latents(guide: Trace, model: Trace) -> None:
    """Refuse a guide that samples other sites than the model's latent ones.

    Raises:
        ValueError: naming the sites that one of them lacks.
    """
    latents = {name for name, site in sample_sites(model).items() if not site["is_observed"]}
    guided = set(sample_sites(guide))
    if missing := sorted(latents - guided):
        raise ValueError(
            f"the model samples {missing}, the guide does not: it would be drawn from the prior and never paid for; "
            "sample it in the guide too"
        )
    if extra := sorted(guided - latents):
        raise ValueError(f"the guide samples {extra}, which is no latent site of the model; rename or remove it")


def whole_value(site: Any) -> Tensor:
    """Return a site's value with all its batch axes, which a point mass may lack."""
    plates = [frame for frame in site["cond_indep_stack"] if frame.dim is not None]
    batch_shape = [1] * max(-frame.dim for frame in plates)
    for frame in plates:
        batch_shape[frame.dim] = frame.size
    value: Tensor = site["value"].expand(*batch_shape, *site["fn"].event_shape)
    return value
