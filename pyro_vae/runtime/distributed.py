"""Data-parallel runs: several processes share each batch, and gradients are averaged over all of it.

    torchrun --nproc-per-node=4 -m pyro_vae train vae --data mnist

Give every process all of the data and run the same program. N processes with batch size B take the steps of one process
with batch size N · B, with different noise. Batch normalisation sees each share alone. Only the first process writes
files and draws progress bars.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch.distributed
from torch import Tensor, nn

__all__ = ["SEEDS", "Averaging", "LostProcessError", "Processes", "join"]

Result = TypeVar("Result")
# Environment variables that torchrun, or another launcher for torch, sets.
LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# Seeds lie below it; torch takes no larger ones.
SEEDS = 2**63


class LostProcessError(RuntimeError):
    """Another process of the run has ended or cannot be reached."""


class Processes(NamedTuple):
    """One process's view of the processes of a run. A run without a launcher is one process and never communicates.

    Args:
        rank: number of this process, from 0.
        size: number of processes.
    """

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes the files and draws the progress bar."""
        return self.rank == 0

    def share(self, rows: Tensor) -> Tensor:
        """Return this process's part of a batch's rows. Parts differ by at most one row, and may be empty.

        >>> [Processes(rank, 2).share(torch.arange(5)).tolist() for rank in range(2)]
        [[0, 1, 2], [3, 4]]
        """
        return rows if self.size == 1 else rows.tensor_split(self.size)[self.rank]

    def seed(self, seed: int, epoch: int = 0) -> int:
        """Return another seed in each process and epoch; one process alone keeps the seed."""
        return seed if self.size == 1 else ((seed * 1_000_003 + epoch) * self.size + self.rank) % SEEDS

    def device(self, device: torch.device) -> torch.device:
        """Return the CUDA device of this process, unless one was named by its index."""
        if self.size == 1 or device.type != "cuda" or device.index is not None:
            return device
        own = torch.device("cuda", int(os.environ.get("LOCAL_RANK", self.rank % torch.cuda.device_count())))
        torch.cuda.set_device(own)
        return own

    def gather(self, value: Result) -> list[Result]:
        """Return the values of all processes, by rank, to all of them."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with _communication():
            torch.distributed.all_gather_object(values, value)
        return values

    def from_first(self, function: Callable[[], Result]) -> Result:
        """Call a function in the first process; return its value, or raise its error, in all processes."""
        if self.size == 1:
            return function()
        answer: list[Any] = [None, None]
        if self.is_first:
            try:
                answer[0] = function()
            except (ValueError, OSError) as error:
                answer[1] = error
        with _communication():
            torch.distributed.broadcast_object_list(answer)
        if answer[1] is not None:
            raise answer[1]
        return answer[0]

    def check_same(self, data: object) -> None:
        """Refuse different data in different processes, by their fingerprints.

        Raises:
            ValueError: in every process.
        """
        if len(set(self.gather(data))) > 1:
            raise ValueError("the processes were given different data: give all of them to each; fit shares them out")


def join(device: torch.device | str = "cpu") -> Processes:
    """Connect to the other processes of the run, if a launcher such as torchrun started several; return all of them.

    Connections are gloo's on a CPU and NCCL's on CUDA devices. They end with the process.

    >>> join()
    Processes(rank=0, size=1)
    """
    if not torch.distributed.is_available():
        return Processes()
    if not torch.distributed.is_initialized():
        if any(name not in os.environ for name in LAUNCHED) or os.environ["WORLD_SIZE"] == "1":
            return Processes()
        backend = "cpu:gloo,cuda:nccl" if torch.device(device).type == "cuda" else "gloo"
        with _communication():
            torch.distributed.init_process_group(backend)
        atexit.register(_leave)
    return Processes(torch.distributed.get_rank(), torch.distributed.get_world_size())


def _leave() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@contextmanager
def _communication() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # torch has no narrower kind for a peer that is gone
        reason = str(error).split("\n")[0].split(". ")[0]
        raise LostProcessError(f"another process of this run has ended or cannot be reached ({reason})") from error


class Averaging:
    """Sum gradients, losses and numbers of data over processes, by a flat all-reduce per device and dtype.

    In double precision on a CPU that is one all-reduce a step. The gradients may come from any backward pass, or from a
    replayed program. Buffers, e.g. those of batch normalisation, are the first process's after each step.

    Args:
        module: has equal parameters and buffers in all processes afterwards, those of the first.
        processes: the processes of the run, two at least.
    """

    def __init__(self, module: nn.Module, processes: Processes) -> None:
        self.is_first = processes.is_first
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.places = [(m._buffers, n) for m in module.modules() for n, b in m._buffers.items() if b is not None]
        self.device = self.parameters[0].device
        tensors = [*module.parameters(), *module.buffers()]
        first = processes.from_first(lambda: [tensor.detach().cpu() for tensor in tensors])
        # Integers travel in double precision, which is exact for them up to 2**53, beside the loss.
        wide = [torch.empty_like(b, dtype=None if b.is_floating_point() else torch.float64) for b in self._buffers()]
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        # The number of data, then for each parameter how many processes have a gradient. On the CPU: they are read.
        tally = torch.zeros(1 + len(self.parameters), dtype=torch.float64)
        self.sum = _FlatSum([*self.parameters, *wide, loss, tally])
        with torch.no_grad():
            for tensor, value in zip(tensors, first, strict=True):
                tensor.copy_(value)

    def __call__(self, total: float | Tensor, size: int) -> tuple[float | Tensor, float | Tensor]:
        """Put sums over processes into ``p.grad``; return those of the loss and of the number of data."""
        gradients = [p.grad for p in self.parameters]
        buffers = self._buffers()
        loss = torch.as_tensor(total, dtype=torch.float64, device=self.device)
        tally = torch.tensor([size, *(gradient is not None for gradient in gradients)], dtype=torch.float64)
        mine = buffers if self.is_first else [None] * len(buffers)
        with torch.no_grad(), _communication():
            *sums, total_sum, tally_sum = self.sum([*gradients, *mine, loss, tally])
            size_sum, *counts = tally_sum.tolist()
            for parameter, gradient, count in zip(self.parameters, sums, counts, strict=False):
                # A parameter without a gradient in every process keeps none, as in one process.
                parameter.grad = _laid_out(gradient, parameter) if count else None
            for buffer, value in zip(buffers, sums[len(gradients) :], strict=True):
                buffer.copy_(value)
        return float(total_sum) if self.device.type == "cpu" else total_sum.clone(), size_sum

    def _buffers(self) -> list[Tensor]:
        buffers: list[Any] = [held[name] for held, name in self.places]
        return buffers


class _FlatSum:
    """Sum tensors over processes: those of one device and dtype lie in one flat tensor.

    Args:
        like: tensors of the shapes, devices and dtypes to sum.
    """

    def __init__(self, like: Sequence[Tensor]) -> None:
        groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        for i, tensor in enumerate(like):
            groups.setdefault((tensor.device, tensor.dtype), []).append(i)
        self.flats: list[Tensor] = []
        found: dict[int, Tensor] = {}
        for (device, dtype), members in groups.items():
            sizes = [like[i].numel() for i in members]
            self.flats.append(torch.zeros(sum(sizes), dtype=dtype, device=device))
            for i, part in zip(members, self.flats[-1].split(sizes), strict=True):
                found[i] = part.view(like[i].shape)
        self.parts = [found[i] for i in range(len(like))]

    def __call__(self, values: Sequence[Tensor | None]) -> list[Tensor]:
        """Return the sums, which the next call overwrites; None stands for zeros."""
        for part, value in zip(self.parts, values, strict=True):
            if value is None:
                part.zero_()
            else:
                part.copy_(value)
        # All of them on their way before the first is waited for.
        for work in [torch.distributed.all_reduce(flat, async_op=True) for flat in self.flats]:
            work.wait()
        return self.parts


def _laid_out(gradient: Tensor, parameter: Tensor) -> Tensor:
    """Return a gradient with the strides of its parameter, which fused optimisers ask for."""
    same = gradient.stride() == parameter.stride()
    return gradient if same else torch.empty_like(parameter).copy_(gradient)
