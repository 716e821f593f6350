"""Bytes that tensors take at their peak: measured, never guessed, and held within a budget."""

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

__all__ = [
    "CHUNK",
    "CPU_WORKING_SET",
    "MEBIBYTE",
    "CountBytes",
    "block_size",
    "chunk_sizes",
    "counted_bytes",
    "working_set",
]

MEBIBYTE = 2**20
# Data per chunk at most.
CHUNK = 128
# Bytes that a chunk takes on a CPU where more are allowed. Larger chunks fetch every tensor from fresh pages of memory:
# at 512 MiB they are slower by a factor of two. A decoder with 784 outputs faults in 9376 pages a chunk at 64 MiB, none
# at 32.
CPU_WORKING_SET = 32 * MEBIBYTE
# A CUDA device needs larger chunks to be busy.
CUDA_WORKING_SET = 256 * MEBIBYTE


def working_set(device: torch.device) -> int:
    """Return the bytes that work on a device should take at once, whatever its memory."""
    return CUDA_WORKING_SET if device.type == "cuda" else CPU_WORKING_SET


def block_size(run: Callable[[int], Any], num_particles: int, device: torch.device) -> tuple[int, int]:
    """Return the particles of a block, and its bytes.

    A block fills the device's working set, and K particles make blocks of about equal size; the last one has the rest.
    The size depends on ``run``, K and the type of device only, not on a budget. The peak is measured at a few rising
    sizes, since an encoder may set it for few particles and the decoder for many. n times the particles take at most n
    times the bytes, so no measurement exceeds the working set; one particle alone may.

    Args:
        run: called with a number of particles.
        num_particles: K.
        device: device of the tensors.

    Returns:
        Particles per block, and the bytes that such a block takes.

    >>> block_size(lambda size: torch.ones(size, 2**20), 10, torch.device("cpu"))
    (5, 20971520)
    """

    def peak(particles: int) -> int:
        return max(1, counted_bytes(partial(run, particles), device))

    particles, taken = 1, peak(1)
    while (most := min(num_particles, working_set(device) * particles // taken)) > particles:
        even = -(-num_particles // -(-num_particles // most))
        if even < 1.5 * particles:
            break
        particles, taken = even, peak(even)
    return particles, taken


def chunk_sizes(
    run: Callable[[tuple[Tensor, ...], int], Any],
    batch: tuple[Tensor, ...],
    num_particles: int,
    memory: int,
    unit: str = "one datum and one particle",
    largest: int | None = None,
) -> tuple[int, int]:
    """Return the data and particles of the largest chunk whose tensors stay within ``memory`` bytes.

    The peak is measured at rising sizes, since an encoder may set it for few particles and the decoder for many. n
    times the size takes at most n times the bytes, so no measurement exceeds the budget. On a CPU the sizes depend on
    the arguments only.

    Args:
        run: called with a chunk of data and a number of particles.
        batch: the data and their conditions, B rows each.
        num_particles: K.
        memory: budget in bytes.
        unit: name of the smallest chunk, for the error.
        largest: data per chunk at most; 128 by default.

    Returns:
        Data per chunk, and particles per chunk.

    Raises:
        ValueError: for a budget below the smallest chunk's bytes; it gives the least that works.
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
    if device.type != "cuda":
        return counted_bytes(run, device)
    with own_random_state(0, device):
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before


def counted_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """Return the bytes of tensors that ``run`` has alive at its peak, by :class:`CountBytes`.

    The count is the same on every device of a type: it knows no allocator, and no workspace of a library.
    """
    # A collection in the middle would free tensors that wait in a cycle, and make the count depend on its moment.
    collecting = gc.isenabled()
    gc.disable()
    try:
        with own_random_state(0, device), CountBytes() as counter:
            run()
    finally:
        if collecting:
            gc.enable()
    return counter.peak


class CountBytes(TorchDispatchMode):
    """Follow the bytes of tensors made inside that are alive, and their peak: torch counts none on a CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                # An unseen input was made outside, e.g. a parameter; a view of it takes nothing.
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
