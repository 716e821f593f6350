"""Batches of training data: rows gathered on the device, or streamed to it one batch ahead."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property

import torch
from torch import Tensor

__all__ = ["Batch", "Batches", "Rows", "gathered", "unpacked"]

# Data on a CUDA device may take this share of its free memory; the rest is for parameters and activations.
SHARE_OF_MEMORY = 0.5


def gathered(tensor: Tensor, rows: Tensor) -> Tensor:
    """Return rows of a tensor, contiguous; on a CPU ``index_select`` is faster than indexing."""
    return tensor.index_select(0, rows)


class Batch:
    """The arguments of one training step: ``x`` and the pair's conditions, B rows each, on the device.

    >>> [tensor.tolist() for tensor in Batch((torch.arange(2.0),))]
    [[0.0, 1.0]]
    """

    def __init__(self, tensors: tuple[Tensor, ...]) -> None:
        self._given = tensors

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors, (B, …) each."""
        return self._given

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.tensors)


class Rows(Batch):
    """A batch given by row numbers of data on the device.

    The rows are gathered when a tensor is first asked for. A CUDA graph gathers them itself.

    Args:
        data: (N, …) each, on the device.
        rows: (B,), row numbers on the device.

    >>> rows = Rows((torch.arange(5.0), torch.arange(5)), torch.tensor([4, 0]))
    >>> [tensor.tolist() for tensor in rows]
    [[4.0, 0.0], [4, 0]]
    """

    def __init__(self, data: tuple[Tensor, ...], rows: Tensor) -> None:
        self.data, self.rows = data, rows

    @cached_property
    def tensors(self) -> tuple[Tensor, ...]:
        """The gathered tensors, (B, …) each."""
        return tuple(gathered(tensor, self.rows) for tensor in self.data)


def unpacked(arguments: tuple[Tensor | Batch, ...]) -> tuple[Tensor, ...]:
    """Return the tensors of a step's arguments, which are tensors or one :class:`Batch`.

    >>> unpacked((Batch((torch.zeros(2), torch.ones(2))),))
    (tensor([0., 0.]), tensor([1., 1.]))
    """
    first = arguments[0]
    return first.tensors if isinstance(first, Batch) else arguments  # type: ignore[return-value]


class Batches:
    """Cut training data into batches on a device.

    On a CPU the data are not copied; they may be a memory-mapped file. Data are copied to a CUDA device if they fit in
    half of its free memory, and streamed batch by batch otherwise. A thread then gathers the next batch in pinned
    memory while the device works on the current one. The batches are bitwise the same either way.

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
        """Return the first ``count`` data and their conditions."""
        return tuple(tensor[:count] for tensor in self.data)

    def __call__(self, parts: Sequence[Tensor]) -> Iterator[Batch]:
        """Yield a batch for each part, a tensor of row numbers."""
        if not self.streamed:
            # One copy of all row numbers: a copy per batch would synchronise.
            rows = torch.cat([*parts]).to(self.device).split([len(part) for part in parts])
            return (Rows(self.data, part) for part in rows)
        return self._ahead(parts)

    def _ahead(self, parts: Iterable[Tensor]) -> Iterator[Batch]:
        with ThreadPoolExecutor(1) as thread:
            coming = None
            for part in parts:
                # Submitted before the current batch is yielded: both go on at the same time.
                ready, coming = coming, thread.submit(self._gathered, part)
                if ready is not None:
                    yield self._moved(ready.result())
            if coming is not None:
                yield self._moved(coming.result())

    def _gathered(self, part: Tensor) -> tuple[Tensor, ...]:
        batch = tuple(gathered(tensor, part.to(tensor.device)) for tensor in self.data)
        return tuple(tensor.pin_memory() for tensor in batch) if self.device.type == "cuda" else batch

    def _moved(self, batch: tuple[Tensor, ...]) -> Batch:
        return Batch(tuple(tensor.to(self.device, non_blocking=True) for tensor in batch))
