"""Draw from q(z | x), and what the model makes of the draws."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyro_vae.pair.inspection import inspect
from pyro_vae.pair.modes import drawing, to_pair
from pyro_vae.pair.pair import Pair
from pyro_vae.pair.trace import trace_pair
from pyro_vae.runtime.memory import MEBIBYTE, chunk_sizes

__all__ = ["Posterior", "Reconstruction", "posterior", "reconstruct"]


class Reconstruction(NamedTuple):
    """``mean`` (K, B, …): E[x | z_k] for draws z_k of the guide; ``x`` (K, B, …): draws from the likelihood there."""

    mean: Tensor
    x: Tensor


class Posterior(NamedTuple):
    """``latents`` by site (K, B, …) drawn from the guide; ``log_weights`` (K, B) turn them into the posterior's."""

    latents: dict[str, Tensor]
    log_weights: Tensor


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
    with drawing(pair, seed):
        x = trace_pair(pair, *batch, num_particles=num_particles).x.fn
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
        trace = trace_pair(pair, *chunk, num_particles=size)
        latents = {name: site.value for name, site in trace.guide.items()}
        return Posterior(latents, trace.terms.log_weights)

    columns = []
    with drawing(pair, seed):
        data, particles = chunk_sizes(draw, batch, num_particles, memory)
        for start in range(0, len(batch[0]), data):
            chunk = tuple(tensor[start : start + data] for tensor in batch)
            sizes = (min(particles, num_particles - begin) for begin in range(0, num_particles, particles))
            columns.append(_joined([draw(chunk, size) for size in sizes], 0))
        return _joined(columns, 1)


def _joined(parts: list[Posterior], dim: int) -> Posterior:
    latents = {name: torch.cat([part.latents[name] for part in parts], dim) for name in parts[0].latents}
    return Posterior(latents, torch.cat([part.log_weights for part in parts], dim))


def _on_device(pair: Pair, batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    inspect(pair, batch)
    return to_pair(pair, batch)
