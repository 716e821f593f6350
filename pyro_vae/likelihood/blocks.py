"""Blocks of particles, the unit in which an estimate draws: one datum, a fixed number of particles, one seed.

Matmuls over another number of rows round differently, and noise for a batch depends on the batch. Blocks of fixed shape
with a seed from the datum make an estimate independent of the memory budget and of the other data.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_vae.runtime.random_state import derived_seed

__all__ = ["Blocks", "data_hashes", "single"]


@dataclass(frozen=True)
class Blocks:
    """The blocks of a datum's K particles.

    Args:
        seed: of the estimate.
        num_particles: K.
        size: P, particles per block; the last block has the rest.
        nbytes: bytes that a block of P particles takes.

    >>> Blocks(seed=0, num_particles=5, size=2, nbytes=80).sizes
    [2, 2, 1]
    """

    seed: int
    num_particles: int
    size: int
    nbytes: int

    @property
    def sizes(self) -> list[int]:
        """Particles of each block."""
        return [min(self.size, self.num_particles - start) for start in range(0, self.num_particles, self.size)]

    def seeds(self, datum_hash: str) -> Iterator[tuple[int, int]]:
        """Yield the size and the seed of each block of a datum."""
        for index, size in enumerate(self.sizes):
            yield size, derived_seed(self.seed, "log-likelihood", datum_hash, index)


def data_hashes(batch: tuple[Tensor, ...]) -> list[str]:
    """Return a hash of each datum with its conditions: of their bytes, dtypes and shapes.

    >>> first, second, third = data_hashes((torch.tensor([[1.0], [2.0], [1.0]]),))
    >>> first == third, first == second
    (True, False)
    """
    kinds = repr([(str(tensor.dtype), tuple(tensor.shape[1:])) for tensor in batch]).encode()
    parts = [_rows(tensor) for tensor in batch]
    return [hashlib.sha256(b"".join((kinds, *row))).hexdigest() for row in zip(*parts, strict=True)]


def _rows(tensor: Tensor) -> list[bytes]:
    size = math.prod(tensor.shape[1:])
    if tensor.is_floating_point():
        # −0 equals 0, and its bytes then too.
        tensor = tensor + 0.0
    rows = tensor.detach().cpu().contiguous().reshape(len(tensor), size).view(torch.uint8)
    return [row.tobytes() for row in rows.numpy()]


def single(batch: tuple[Tensor, ...], row: int) -> tuple[Tensor, ...]:
    """Return one datum and its conditions as a batch of one.

    A copy, since a matmul may choose its kernel by the alignment of its operands.
    """
    return tuple(tensor[row : row + 1].clone(memory_format=torch.contiguous_format) for tensor in batch)
