"""Draws from a pair: new data, reconstructions, posteriors, completions and super-resolutions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_vae.checks import check_batch, check_support, check_tensor, refuse_outside
from pyro_vae.memory import MEBIBYTE, chunk_sizes
from pyro_vae.pair import (
    Pair,
    device_of,
    evaluation,
    particle_dim,
    particle_plate,
    point_masses,
    sample_sites,
    site_log_prob,
    sum_terms,
    to_pair,
    trace_pair,
    x_site,
)
from pyro_vae.randomness import derived_seed, fresh_seed, own_random_state

__all__ = [
    "Generated",
    "Imputation",
    "Posterior",
    "Reconstruction",
    "SuperResolution",
    "generate",
    "impute",
    "posterior",
    "reconstruct",
    "super_resolve",
]


class Generated(NamedTuple):
    """New data: ``x`` (N, …) draws from the likelihood, ``mean`` (N, …) its means, ``latents`` by site (N, …)."""

    x: Tensor
    mean: Tensor
    latents: dict[str, Tensor]


class Reconstruction(NamedTuple):
    """``mean`` (K, B, …): E[x | z_k] for draws z_k of the guide; ``x`` (K, B, …): draws from the likelihood there."""

    mean: Tensor
    x: Tensor


class Posterior(NamedTuple):
    """``latents`` by site (K, B, …) drawn from the guide; ``log_weights`` (K, B) turn them into the posterior's."""

    latents: dict[str, Tensor]
    log_weights: Tensor


class Imputation(NamedTuple):
    """``samples`` (S, B, …) of the whole x, its seen part as given; ``ess`` (B,) of the first importance sampling.

    ``ess`` is out of the number of particles; ``approximate`` tells that the guide fixes a site to a point mass, so
    that the sweeps are pseudo-Gibbs rather than exact.
    """

    samples: Tensor
    ess: Tensor
    approximate: bool


class SuperResolution(NamedTuple):
    """``samples`` and ``means`` (K, B, …): draws from p(x | y), and E[x | y, z_k]; ``spread`` (B, …): the standard
    deviation of the draws, pixel by pixel; ``log_weights`` (K, B): log p(y, u) − log q(u | y)."""

    samples: Tensor
    means: Tensor
    spread: Tensor
    log_weights: Tensor


def generate(
    pair: Pair, num_samples: int, *conditions: Tensor, given: dict[str, Tensor] | None = None, seed: int | None = None
) -> Generated:
    """Draw new data from the model: latents from their priors, then x.

    Args:
        pair: any pair that states ``x_shape``.
        num_samples: N.
        conditions: the model's conditions, N rows each.
        given: latents to fix, by site, (N, …) each.
        seed: of the draws; fresh entropy without one.

    Returns:
        :class:`Generated`.

    Raises:
        ValueError: for N < 1, a pair without ``x_shape``, an unknown site in ``given``.

    >>> import torch, pyro_vae as pv
    >>> generate(pv.models.LinearGaussianVAE(5, 2), 64).x.shape
    torch.Size([64, 5])
    """
    if num_samples < 1:
        raise ValueError(f"num_samples is {num_samples}; it must be at least 1")
    placeholder = _placeholder(pair, num_samples)
    with _drawing(pair, seed):
        conditions = tuple(tensor.to(placeholder.device) for tensor in conditions)
        model = poutine.uncondition(type(pair).model)
        if given:
            model = poutine.condition(model, data={name: value.to(placeholder.device) for name, value in given.items()})
        sites = sample_sites(poutine.trace(model).get_trace(pair, placeholder, *conditions))
        if unknown := sorted(set(given or ()) - set(sites)):
            raise ValueError(f"given names {unknown}; the model's sites are {sorted(sites)}")
        x = x_site(sites, placeholder)
        latents = {name: site["value"] for name, site in sites.items() if site is not x}
        return Generated(x["value"], x["fn"].mean, latents)


def reconstruct(pair: Pair, *batch: Tensor, num_particles: int = 1, seed: int | None = None) -> Reconstruction:
    """Encode data and decode them again.

    Args:
        pair: any pair.
        batch: ``x`` (B, …) and the pair's conditions.
        num_particles: K, draws of the guide per datum.
        seed: of the draws; fresh entropy without one.

    Returns:
        :class:`Reconstruction`.
    """
    batch = _on_device(pair, batch)
    with _drawing(pair, seed):
        _, model = trace_pair(pair, *batch, num_particles=num_particles)
        x = x_site(sample_sites(model), batch[0])["fn"]
        return Reconstruction(x.mean, x.sample())


def posterior(
    pair: Pair, *batch: Tensor, num_particles: int = 100, memory: int = 512 * MEBIBYTE, seed: int | None = None
) -> Posterior:
    """Draw latents from the guide, with the importance weights that make them draws from the posterior.

    Args:
        pair: any pair.
        batch: ``x`` (B, …) and the pair's conditions.
        num_particles: K.
        memory: bytes that a chunk of data and particles may take beside what is returned, as in
            :func:`~pyro_vae.log_likelihood`; seeded draws depend on it.
        seed: of the draws; fresh entropy without one.

    Returns:
        :class:`Posterior`; every latent has its K and B axes, a point mass too.

    Raises:
        ValueError: for bad data, K < 1, and a budget too small for one datum and one particle.
    """
    if num_particles < 1:
        raise ValueError(f"num_particles is {num_particles}; it counts draws per datum and must be at least 1")
    batch = _on_device(pair, batch)

    def draw(chunk: tuple[Tensor, ...], size: int) -> Posterior:
        guide, model = trace_pair(pair, *chunk, num_particles=size)
        latents = {name: whole_value(site) for name, site in sample_sites(guide).items()}
        return Posterior(latents, sum_terms(guide, model, particle_dim(pair)).log_weights)

    columns = []
    with _drawing(pair, seed):
        data, particles = chunk_sizes(draw, batch, num_particles, memory)
        for start in range(0, len(batch[0]), data):
            chunk = tuple(tensor[start : start + data] for tensor in batch)
            sizes = (min(particles, num_particles - begin) for begin in range(0, num_particles, particles))
            columns.append(_joined([draw(chunk, size) for size in sizes], 0))
        return _joined(columns, 1)


def _joined(parts: list[Posterior], dim: int) -> Posterior:
    latents = {name: torch.cat([part.latents[name] for part in parts], dim) for name in parts[0].latents}
    return Posterior(latents, torch.cat([part.log_weights for part in parts], dim))


def super_resolve(pair: Pair, y: Tensor, *, num_samples: int = 16, seed: int | None = None) -> SuperResolution:
    """Draw many high-resolution images for each low-resolution one.

    u ~ q(u | y),   z ~ p(z | y, u),   x ~ p(x | y, z)

    Args:
        pair: a pair with a ``low_resolution_guide`` and a site ``y``, such as SRVAE.
        y: (B, C, h, w).
        num_samples: K, draws for each y.
        seed: of the draws; fresh entropy without one.

    Returns:
        :class:`SuperResolution`.

    Raises:
        ValueError: for a pair that has no low-resolution stage, and for images of another shape.
    """
    if not hasattr(pair, "low_resolution_guide"):
        raise ValueError(f"{type(pair).__name__} has no low-resolution stage: super_resolve needs a pair such as SRVAE")
    y_shape: Any = pair.y_shape
    if tuple(y.shape[1:]) != tuple(y_shape):
        raise ValueError(f"y has shape {tuple(y.shape)}; the pair's low resolution is {tuple(y_shape)}")
    if num_samples < 1:
        raise ValueError(f"num_samples is {num_samples}; it must be at least 1")
    if len(y) == 0:
        raise ValueError("y holds no image")
    placeholder = _placeholder(pair, len(y))
    check_tensor(y, placeholder.dtype, "y")
    y = y.to(placeholder.device)
    with _drawing(pair, seed), particle_plate(pair, num_samples):
        guide = poutine.trace(type(pair).low_resolution_guide).get_trace(pair, y)  # type: ignore[attr-defined]
        model = poutine.condition(poutine.uncondition(type(pair).model), data={"y": y})
        sites = sample_sites(poutine.trace(poutine.replay(model, trace=guide)).get_trace(pair, placeholder))
        refuse_outside(sites["y"], y, "y")
        x = x_site(sites, placeholder)
        log_weights = -sum(site["fn"].log_prob(site["value"]) for site in sample_sites(guide).values())
        for name in [*sample_sites(guide), "y"]:
            log_weights = log_weights + sites[name]["fn"].log_prob(sites[name]["value"])
        return SuperResolution(x["value"], x["fn"].mean, x["value"].std(0, correction=0), log_weights)


def impute(
    pair: Pair,
    x: Tensor,
    mask: Tensor,
    *conditions: Tensor,
    num_samples: int = 16,
    num_particles: int = 64,
    sweeps: int = 10,
    memory: int = 512 * MEBIBYTE,
    seed: int | None = None,
) -> Imputation:
    """Draw the missing part of x given the seen part.

    The first latents come from the guide run on a filled-in x, resampled with weights p(x_seen, z) / q(z | x filled).
    Each sweep then draws x_missing ~ p(x | z), and z among the current one and new draws of the guide at the completed
    x, with weights p(x, z) / q(z | x): both leave p(z, x_missing | x_seen) as it is.

    Args:
        pair: any pair whose likelihood factorises over the entries of x.
        x: (B, …); its missing entries are not read.
        mask: True where x is seen, the shape of x or of one datum.
        conditions: the pair's conditions.
        num_samples: S, independent chains per datum, one draw from each.
        num_particles: K, candidates in each draw of z.
        sweeps: number of Gibbs sweeps.
        memory: bytes that a chunk of chains may take beside what is returned, as in :func:`~pyro_vae.log_likelihood`;
            seeded draws depend on it.
        seed: of the draws; fresh entropy without one.

    Returns:
        :class:`Imputation`.

    Raises:
        ValueError: for a mask that is not boolean or of another shape, bad seen data, a likelihood that does not
            factorise, and a budget too small for one chain.

    Reference:
        Rezende, Mohamed and Wierstra (2014), Stochastic backpropagation, ICML; Andrieu, Doucet and Holenstein (2010),
        Particle Markov chain Monte Carlo methods, JRSS B 72, for the draw of z.
    """
    if mask.dtype != torch.bool or tuple(mask.shape) not in (tuple(x.shape), tuple(x.shape[1:])):
        raise ValueError(
            f"mask is {mask.dtype} of shape {tuple(mask.shape)}; it must be boolean, shaped as x or one datum"
        )
    if min(num_samples, num_particles) < 1 or sweeps < 0:
        raise ValueError("num_samples and num_particles must be at least 1, sweeps at least 0")
    if pair.max_plate_nesting > 1:
        raise ValueError(f"{type(pair).__name__} has plates of its own; impute knows the data plate only")
    mask = mask.expand_as(x)
    batch = (torch.where(mask, x, torch.zeros_like(x)), *conditions)
    check_batch(pair, batch)
    check_support(pair, batch, "x", mask)
    seen, mask, *others = to_pair(pair, (batch[0], mask, *conditions))
    # Chains are data of their own: S copies of each datum, S × B in all, each begun at a draw of its own.
    rows = torch.arange(len(x), device=seen.device).repeat(num_samples)
    chains = (seen[rows], mask[rows], *(tensor[rows] for tensor in others))
    seed = fresh_seed() if seed is None else seed

    def run(chunk: tuple[Tensor, ...], sweeps: int, start: int = 0) -> tuple[Tensor, Tensor, bool]:
        seen, mask, *conditions = chunk
        # A stream of its own: the chains' would give each the very noise that its x was begun with.
        begun = generate(pair, len(seen), *conditions, seed=derived_seed(seed, "imputation", start))
        chain = _Chain(pair, torch.where(mask, seen, begun.x), mask, tuple(conditions), num_particles)
        weights = chain.start()
        for _ in range(sweeps):
            chain.sweep()
        return chain.x, weights, chain.approximate

    with _drawing(pair, seed):
        unit = f"one chain and its {num_particles} candidates"
        size, _ = chunk_sizes(lambda chunk, _: run(chunk, min(sweeps, 1)), chains, 1, memory, unit, len(rows))
        starts = range(0, len(rows), size)
        parts = [run(tuple(tensor[i : i + size] for tensor in chains), sweeps, i) for i in starts]
    weights = torch.cat([part[1] for part in parts], 1)
    ess = torch.exp(2 * torch.logsumexp(weights, 0) - torch.logsumexp(2 * weights, 0))
    samples = torch.cat([part[0] for part in parts]).unflatten(0, (num_samples, len(x)))
    return Imputation(samples, ess.view(num_samples, -1).mean(0), parts[0][2])


class _Chain:
    """One Markov chain per row of x over (z, x_missing)."""

    def __init__(self, pair: Pair, x: Tensor, mask: Tensor, conditions: tuple[Tensor, ...], num_particles: int) -> None:
        self.pair, self.x, self.mask, self.conditions, self.num_particles = pair, x, mask, conditions, num_particles
        self.current: dict[str, Tensor] = {}
        self.approximate = False

    def start(self) -> Tensor:
        """Draw the first z from weights that see x's seen part only, then complete x; return the weights (K, B)."""
        guide, model = self._propose(self.num_particles)
        terms = sum_terms(guide, model, self._dim)
        site = x_site(sample_sites(model), self.x)
        seen = torch.where(self.mask, _entrywise(site), 0.0).flatten(2).sum(-1)
        weights = terms.log_weights - site_log_prob(site, self._dim) + seen
        self._choose(guide, model, weights)
        return weights

    def sweep(self) -> None:
        """Draw z given the completed x among the current one and K proposals, then the missing part of x."""
        guide, _ = self._propose(self.num_particles + 1)
        for name, value in self.current.items():
            node = guide.nodes[name]
            node["value"] = torch.cat([value.unsqueeze(0), whole_value(node)[1:]])
        # Scored again as a whole: the guide's later sites may depend on the current values of earlier ones.
        with particle_plate(self.pair, self.num_particles + 1):
            scored = poutine.trace(poutine.replay(type(self.pair).guide, trace=guide))
            guide = scored.get_trace(self.pair, self.x, *self.conditions)
            model = poutine.trace(poutine.replay(type(self.pair).model, trace=guide))
            model = model.get_trace(self.pair, self.x, *self.conditions)
        self._choose(guide, model, sum_terms(guide, model, self._dim).log_weights)

    @property
    def _dim(self) -> int:
        return particle_dim(self.pair)

    def _propose(self, size: int) -> tuple[Trace, Trace]:
        return trace_pair(self.pair, self.x, *self.conditions, num_particles=size)

    def _choose(self, guide: Trace, model: Trace, log_weights: Tensor) -> None:
        chosen = torch.distributions.Categorical(logits=log_weights.mT).sample()
        rows = torch.arange(len(self.x), device=self.x.device)
        fixed = point_masses(guide)
        self.approximate = bool(fixed)
        self.current = {
            name: whole_value(site)[chosen, rows] for name, site in sample_sites(guide).items() if name not in fixed
        }
        drawn = x_site(sample_sites(model), self.x)["fn"].sample()[chosen, rows]
        self.x = torch.where(self.mask, self.x, drawn)


def _entrywise(site: Any) -> Tensor:
    """Return log p of each entry of x, (K, B, …)."""
    distribution = site["fn"]
    if not isinstance(distribution, torch.distributions.Independent) or distribution.base_dist.event_shape:
        raise ValueError(
            f"site '{site['name']}' has a {type(distribution).__name__} likelihood: impute needs one that factorises "
            "over the entries of x, a .to_event() of univariate distributions"
        )
    return distribution.base_dist.log_prob(site["value"])


def whole_value(site: Any) -> Tensor:
    """Return a site's value with all its batch axes, which a point mass may lack."""
    plates = [frame for frame in site["cond_indep_stack"] if frame.dim is not None]
    batch_shape = [1] * max(-frame.dim for frame in plates)
    for frame in plates:
        batch_shape[frame.dim] = frame.size
    value: Tensor = site["value"].expand(*batch_shape, *site["fn"].event_shape)
    return value


def _placeholder(pair: Pair, size: int) -> Tensor:
    """Return an x that only tells the model how many data there are."""
    if not hasattr(pair, "x_shape"):
        raise ValueError(f"{type(pair).__name__} states no x_shape, the shape of one datum: set it in __init__")
    dtype = pair.x_dtype or next((p.dtype for p in pair.parameters()), torch.get_default_dtype())
    return torch.zeros(size, *pair.x_shape, dtype=dtype, device=device_of(pair))


def _on_device(pair: Pair, batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    check_batch(pair, batch)
    check_support(pair, batch, "x")
    return to_pair(pair, batch)


@contextmanager
def _drawing(pair: Pair, seed: int | None) -> Iterator[None]:
    """Evaluate the pair with draws from a seed of their own; ordinary tensors come out."""
    with evaluation(pair), torch.inference_mode(False), torch.no_grad(), own_random_state(seed, device_of(pair)):
        yield
