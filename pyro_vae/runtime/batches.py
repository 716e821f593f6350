"""Batches by their rows: from data on the device where they fit, else streamed to it one batch ahead."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import TypeAlias

import torch
from torch import Tensor

__all__ = ["Batch", "Batches", "Rows", "gathered"]

# Data on a CUDA device may take this share of its free memory; the rest is for parameters and what a step computes.
SHARE_OF_MEMORY = 0.5


def gathered(tensor: Tensor, rows: Tensor) -> Tensor:
    """Return rows of a tensor, contiguous: whole rows are copied, on a CPU in less time than indexing takes."""
    return tensor.index_select(0, rows)


class Rows:
    """A batch that is rows of data on the device, gathered when a tensor is asked for; a step may gather it itself.

    >>> rows = Rows((torch.arange(5.0), torch.arange(5)), torch.tensor([4, 0]))
    >>> [tensor.tolist() for tensor in rows]
    [[4.0, 0.0], [4, 0]]
    """

    def __init__(self, data: tuple[Tensor, ...], rows: Tensor) -> None:
        self.data, self.rows = data, rows

    @cached_property
    def tensors(self) -> tuple[Tensor, ...]:
        """The gathered batch."""
        return tuple(gathered(tensor, self.rows) for tensor in self.data)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> Tensor:
        return self.tensors[i]


Batch: TypeAlias = tuple[Tensor, ...] | Rows


class Batches:
    """The training data, as batches on a device.

    On a CPU the data stay where they are, a memory-mapped file included. Data for a CUDA device move to it as a whole
    where they take at most half of its free memory. Larger data stay where they are and are streamed: a thread gathers
    the next batch in pinned memory while the device works on this one. The batches are the same, bit for bit.

    >>> batches = Batches((torch.arange(5.0),), torch.device("cpu"))
    >>> [x.tolist() for (x,) in batches([torch.tensor([4, 0]), torch.tensor([2])])]
    [[4.0, 0.0], [2.0]]
    """

    def __init__(self, data: tuple[Tensor, ...], device: torch.device, *, streamed: bool | None = None) -> None:
        self.device = device
        if streamed is None:
            size = sum(tensor.nbytes for tensor in data if tensor.device != device)
            streamed = device.type == "cuda" and size > SHARE_OF_MEMORY * torch.cuda.mem_get_info(device)[0]
        self.streamed = streamed
        self.data = data if streamed else tuple(tensor.to(device) for tensor in data)

    def __len__(self) -> int:
        return len(self.data[0])

    def first(self, count: int) -> tuple[Tensor, ...]:
        """Return the first data."""
        return tuple(tensor[:count] for tensor in self.data)

    def __call__(self, parts: Sequence[Tensor]) -> Iterator[Batch]:
        """Yield a batch for each part, a tensor of row numbers."""
        if not self.streamed:
            # One copy of all row numbers: a copy for each batch would wait for the device.
            rows = torch.cat([*parts]).to(self.device).split([len(part) for part in parts])
            return (Rows(self.data, part) for part in rows)
        return self._ahead(parts)

    def _ahead(self, parts: Iterable[Tensor]) -> Iterator[tuple[Tensor, ...]]:
        with ThreadPoolExecutor(1) as thread:
            coming = None
            for part in parts:
                # Submitted before the batch at hand is handed out, so that it is gathered meanwhile.
                ready, coming = coming, thread.submit(self._gathered, part)
                if ready is not None:
                    yield self._moved(ready.result())
            if coming is not None:
                yield self._moved(coming.result())

    def _gathered(self, part: Tensor) -> tuple[Tensor, ...]:
        batch = tuple(gathered(tensor, part.to(tensor.device)) for tensor in self.data)
        return tuple(tensor.pin_memory() for tensor in batch) if self.device.type == "cuda" else batch

    def _moved(self, batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(tensor.to(self.device, non_blocking=True) for tensor in batch)
