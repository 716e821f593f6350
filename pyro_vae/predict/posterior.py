"""Draw from q(z | x), weight the draws, and decode them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyro_vae.inspection import inspect
from pyro_vae.inspection.arrays import takes_arrays
from pyro_vae.pair.modes import drawing, to_pair
from pyro_vae.pair.pair import Pair
from pyro_vae.pair.trace import trace_pair
from pyro_vae.runtime.memory import MEBIBYTE, chunk_sizes
from pyro_vae.runtime.scalars import whole
from pyro_vae.runtime.threads import one_at_a_time

__all__ = ["Posterior", "Reconstruction", "posterior", "reconstruct"]


class Reconstruction(NamedTuple):
    """Decoded draws z_k of the guide: ``mean`` E[x | z_k] and ``x`` ~ p(x | z_k), each (K, B, …)."""

    mean: Tensor
    x: Tensor


class Posterior(NamedTuple):
    """Draws of the guide: ``latents`` by site (K, B, …), and their ``log_weights`` (K, B) under p(z | x), in nats."""

    latents: dict[str, Tensor]
    log_weights: Tensor


@one_at_a_time
@takes_arrays
def reconstruct(pair: Pair, *batch: Tensor, num_particles: int = 1, seed: int | None = None) -> Reconstruction:
    """Encode data and decode them again.

    Args:
        pair: any pair.
        batch: ``x`` (B, …) and the pair's conditions.
        num_particles: K, draws of the guide per datum.
        seed: of the draws; fresh entropy without one.

    Returns:
        :class:`Reconstruction`.

    Raises:
        ValueError: for bad data, and K < 1.

    >>> import pyro_vae as pv
    >>> reconstruct(pv.models.LinearGaussianVAE(5, 2), torch.zeros(3, 5), num_particles=4).mean.shape
    torch.Size([4, 3, 5])
    """
    inspect(pair, batch)
    batch = to_pair(pair, batch)
    with drawing(pair, seed):
        x = trace_pair(pair, *batch, num_particles=num_particles).x.fn
        return Reconstruction(x.mean, x.sample())


@one_at_a_time
@takes_arrays
def posterior(
    pair: Pair, *batch: Tensor, num_particles: int = 100, memory: int = 512 * MEBIBYTE, seed: int | None = None
) -> Posterior:
    """Draw latents from the guide, with their importance weights for p(z | x).

    w_k = p(x, z_k) / q(z_k | x),   z_k ~ q(z | x)

    Args:
        pair: any pair.
        batch: ``x`` (B, …) and the pair's conditions.
        num_particles: K.
        memory: bytes for a chunk of data and particles, beside the result. Seeded draws depend on it.
        seed: of the draws; fresh entropy without one.

    Returns:
        :class:`Posterior`; every latent has both axes K and B, point masses too.

    Raises:
        ValueError: for bad data, K < 1, and a ``memory`` too small for one datum and one particle.

    >>> import pyro_vae as pv
    >>> posterior(pv.models.LinearGaussianVAE(5, 2), torch.zeros(3, 5), num_particles=4).latents["z"].shape
    torch.Size([4, 3, 2])
    """
    num_particles = whole(num_particles, "num_particles")
    if num_particles < 1:
        raise ValueError(f"num_particles is {num_particles}; it counts draws per datum and must be at least 1")
    inspect(pair, batch)
    batch = to_pair(pair, batch)

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
