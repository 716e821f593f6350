"""Seeds, and draws that leave the caller's random state as it was."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pyro_vae.runtime.scalars import whole

__all__ = ["derived_seed", "fresh_seed", "own_random_state", "seed_generators"]


def derived_seed(seed: int, *stream: str | int) -> int:
    """Return the seed of a stream of draws, e.g. of one chunk of data, derived from one seed.

    Different names or numbers give independent streams. Sums such as ``seed + 1`` do not: another caller may start from
    that seed.

    Args:
        seed: the seed of the call.
        stream: names and numbers of the stream.

    >>> derived_seed(0, "chunk", 1) == derived_seed(0, "chunk", 1), derived_seed(0, "chunk", 1) == derived_seed(1)
    (True, False)
    """
    digest = hashlib.sha256(repr((seed, *stream)).encode()).digest()
    # 63 bits: manual_seed takes no more.
    return int.from_bytes(digest[:8], "big") >> 1


def fresh_seed() -> int:
    """Return a random seed from the system's entropy."""
    return secrets.randbits(63)


@contextmanager
def own_random_state(seed: int | None, device: torch.device | None = None) -> Iterator[None]:
    """Seed torch's generators inside the block, and restore their states afterwards.

    Args:
        seed: the seed; None takes one from the system's entropy.
        device: a CUDA device whose generator is seeded too.

    >>> with own_random_state(1):
    ...     a = torch.rand(3)
    >>> with own_random_state(1):
    ...     b = torch.rand(3)
    >>> torch.equal(a, b)
    True
    """
    devices = [device] if device is not None and device.type == "cuda" else []
    seed = fresh_seed() if seed is None else whole(seed, "seed")
    with torch.random.fork_rng(devices):
        seed_generators(seed, device)
        yield


def seed_generators(seed: int, device: torch.device | None = None) -> None:
    """Seed torch's generators of the CPU and of one CUDA device; torch.manual_seed would seed all devices."""
    torch.default_generator.manual_seed(seed)
    if device is not None and device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)
