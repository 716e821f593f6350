"""Encode data, and decode them again."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from pyro_vae.inspection import inspect
from pyro_vae.inspection.arrays import takes_arrays
from pyro_vae.pair.modes import drawing, to_pair
from pyro_vae.pair.pair import Pair
from pyro_vae.pair.trace import trace_pair
from pyro_vae.runtime.threads import one_at_a_time

__all__ = ["Reconstruction", "reconstruct"]


class Reconstruction(NamedTuple):
    """Decoded draws z_k of the guide: ``mean`` E[x | z_k] and ``x`` ~ p(x | z_k), each (K, B, …)."""

    mean: Tensor
    x: Tensor


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

    >>> import torch, pyro_vae as pv
    >>> reconstruct(pv.models.LinearGaussianVAE(5, 2), torch.zeros(3, 5), num_particles=4).mean.shape
    torch.Size([4, 3, 5])
    """
    inspect(pair, batch)
    batch = to_pair(pair, batch)
    with drawing(pair, seed):
        x = trace_pair(pair, *batch, num_particles=num_particles).x.fn
        return Reconstruction(x.mean, x.sample())
