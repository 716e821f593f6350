"""How much data a chunk may hold: the bytes that its tensors take at their peak, measured and kept within a budget."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pyro_vae.runtime.random_state import own_random_state

__all__ = ["CHUNK", "CPU_WORKING_SET", "MEBIBYTE", "CountBytes", "chunk_sizes"]

MEBIBYTE = 2**20
# Data per chunk at most, and the bytes that a chunk on a CPU takes where more are allowed: larger ones run slower, by a
# factor of two at 512 MiB, since every tensor is then fetched from fresh pages of memory. A decoder with 784 outputs
# faults in 9376 pages a chunk at 64 MiB, none at 32.
CHUNK = 128
CPU_WORKING_SET = 32 * MEBIBYTE


def chunk_sizes(
    run: Callable[[tuple[Tensor, ...], int], Any],
    batch: tuple[Tensor, ...],
    num_particles: int,
    memory: int,
    unit: str = "one datum and one particle",
    largest: int | None = None,
) -> tuple[int, int]:
    """Return how many data and particles a chunk may hold so that its tensors stay within ``memory`` bytes.

    The peak is measured, never guessed from a smaller chunk's growth: an encoder may set it at few particles and the
    decoder at many. A chunk of n times the size takes at most n times the bytes, so that no measurement overshoots. On
    a CPU the sizes depend on nothing but the arguments.

    Args:
        run: what a chunk of data and a number of particles are put through.
        batch: the data and their conditions, B rows each.
        num_particles: K.
        memory: bytes.
        unit: what the smallest chunk is, for the error.
        largest: data per chunk at most; 128 without one.

    Returns:
        Data per chunk, and particles per chunk.

    Raises:
        ValueError: when one datum and one particle already take more; it gives the least that works.
    """

    def peak(data: int, particles: int) -> int:
        chunk = tuple(tensor[:data] for tensor in batch)
        return max(1, _peak_memory(partial(run, chunk, particles), chunk[0].device))

    least = peak(1, 1)
    if least > memory:
        raise ValueError(
            f"{unit} take {least} bytes, more than memory, {memory}: raise it to {least} at least "
            f"({-(-least // MEBIBYTE)} MiB)"
        )
    target = memory if batch[0].device.type == "cuda" else max(least, min(memory, CPU_WORKING_SET))
    data = max(1, min(largest or CHUNK, len(batch[0]), target // least))
    particles, measured = 1, peak(data, 1)
    while particles < num_particles:
        # A tenth is left for what an allocation is rounded up to.
        larger = min(num_particles, int(0.9 * target * particles / measured))
        if larger <= particles:
            break
        grown = larger >= 1.5 * particles
        particles, measured = larger, peak(data, larger) if grown else measured
        if not grown:
            break
    return data, particles


def _peak_memory(run: Callable[[], Any], device: torch.device) -> int:
    with own_random_state(0, device):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            run()
            return torch.cuda.max_memory_allocated(device) - before
        # A collection in the middle would free what waits in a cycle, and the count depend on when it came.
        collecting = gc.isenabled()
        gc.disable()
        try:
            with CountBytes() as counter:
                run()
        finally:
            if collecting:
                gc.enable()
        return counter.peak


class CountBytes(TorchDispatchMode):
    """Follow how many bytes of tensors made inside are alive, and the most there were: torch counts none on a CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                # What comes in unseen was made outside, a parameter say; a view of it takes nothing.
                self._count(tensor.untyped_storage(), outside=True)
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage, *, outside: bool = False) -> None:
        key = storage._cdata
        if key in self.seen:
            return
        self.seen.add(key)
        size = 0 if outside else storage.nbytes()
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.alive -= size
