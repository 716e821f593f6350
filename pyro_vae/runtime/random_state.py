"""Draws from a generator state of their own: the caller's is left as it was."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["derived_seed", "fresh_seed", "own_random_state", "seed_generators"]


def derived_seed(seed: int, *stream: str | int) -> int:
    """Return the seed of one of many streams of draws, such as a chunk's, that begin from one seed.

    Streams of other names or numbers are independent of each other and of the seed's own, which sums such as
    ``seed + 1`` are not: they are the next caller's seed.

    >>> derived_seed(0, "chunk", 1) == derived_seed(0, "chunk", 1), derived_seed(0, "chunk", 1) == derived_seed(1)
    (True, False)
    """
    digest = hashlib.sha256(repr((seed, *stream)).encode()).digest()
    # 63 bits: manual_seed takes no more.
    return int.from_bytes(digest[:8], "big") >> 1


def fresh_seed() -> int:
    """Return a seed from the system's entropy."""
    return secrets.randbits(63)


@contextmanager
def own_random_state(seed: int | None, device: torch.device | None = None) -> Iterator[None]:
    """Seed torch's generators inside, with fresh entropy for None, and put their states back afterwards.

    >>> with own_random_state(1):
    ...     a = torch.rand(3)
    >>> with own_random_state(1):
    ...     b = torch.rand(3)
    >>> torch.equal(a, b)
    True
    """
    devices = [device] if device is not None and device.type == "cuda" else []
    seed = fresh_seed() if seed is None else seed
    with torch.random.fork_rng(devices):
        seed_generators(seed, device)
        yield


def seed_generators(seed: int, device: torch.device | None = None) -> None:
    """Seed torch's generators of the CPU and of a CUDA device; torch.manual_seed would seed every other device too."""
    torch.default_generator.manual_seed(seed)
    if device is not None and device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)
