"""Draws from a generator state of their own: the caller's is left as it was."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["own_random_state"]


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
    # 63 bits: manual_seed takes no more.
    seed = secrets.randbits(63) if seed is None else seed
    with torch.random.fork_rng(devices):
        # Only what is forked is seeded: torch.manual_seed would reseed every other CUDA device for good.
        torch.default_generator.manual_seed(seed)
        for cuda in devices:
            torch.cuda.default_generators[cuda.index or 0].manual_seed(seed)
        yield
