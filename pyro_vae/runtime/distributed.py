"""Several processes, one run: each takes its share of every batch, and gradients are averaged by torch's DDP.

    torchrun --nproc-per-node=4 -m pyro_vae train vae --data mnist

Every process is given all of the data and runs the same program. N processes with batch size B take the steps of one
process with batch size N · B, on noise of their own; batch normalisation sees each share by itself. Only the first
process writes files and draws progress bars.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch.distributed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pyro_vae.likelihood.estimate import LogLikelihood
from pyro_vae.pair.pair import Pair

__all__ = ["Averaging", "LostProcessError", "Processes", "join"]

Result = TypeVar("Result")
# What torchrun, and any other launcher for torch, tells each process.
LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# Seeds lie below it; torch takes no larger ones.
SEEDS = 2**63


class LostProcessError(RuntimeError):
    """Another process of a run has ended, so that this one cannot go on."""


class Processes(NamedTuple):
    """The processes of a run, as one of them sees them; alone, a run is one process and nothing here communicates."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes the files and draws the progress bar."""
        return self.rank == 0

    def share(self, rows: Tensor) -> Tensor:
        """Return this process's part of a batch's rows: parts differ by at most one row, and may be empty.

        >>> [Processes(rank, 2).share(torch.arange(5)).tolist() for rank in range(2)]
        [[0, 1, 2], [3, 4]]
        """
        return rows if self.size == 1 else rows.tensor_split(self.size)[self.rank]

    def seed(self, seed: int, epoch: int = 0) -> int:
        """Return a seed of this process's own; alone, the seed itself."""
        return seed if self.size == 1 else ((seed * 1_000_003 + epoch) * self.size + self.rank) % SEEDS

    def device(self, device: torch.device) -> torch.device:
        """Return this process's own CUDA device of its machine, where none was named."""
        if self.size == 1 or device.type != "cuda" or device.index is not None:
            return device
        own = torch.device("cuda", int(os.environ.get("LOCAL_RANK", self.rank % torch.cuda.device_count())))
        torch.cuda.set_device(own)
        return own

    def gather(self, value: Result) -> list[Result]:
        """Return every process's value, by rank, in all of them."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with _communication():
            torch.distributed.all_gather_object(values, value)
        return values

    def from_first(self, function: Callable[[], Result]) -> Result:
        """Call a function in the first process only, and return its value, or raise its ValueError, in all of them."""
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
        """Refuse processes that were given different data, by their fingerprints.

        Raises:
            ValueError: in every process.
        """
        if len(set(self.gather(data))) > 1:
            raise ValueError("the processes were given different data: give all of them to each; fit shares them out")

    def log_likelihood(self, estimate: Callable[..., LogLikelihood], *batch: Tensor, seed: int) -> LogLikelihood:
        """Estimate the log-likelihood of each process's part of the data, and return that of all of them.

        Args:
            estimate: called with a part of the batch and ``seed=``.
            batch: ``x`` (B, …) and the pair's conditions, the same in every process.
            seed: of the draws.

        Returns:
            :class:`~pyro_vae.evaluate.LogLikelihood` of the B data in their order.

        Raises:
            ValueError: for fewer data than processes.
        """
        if len(batch[0]) < self.size:
            raise ValueError(f"there are {len(batch[0])} data for {self.size} processes: start fewer of them")
        own = estimate(*map(self.share, batch), seed=self.seed(seed))
        fields = [name for name, value in own._asdict().items() if isinstance(value, Tensor)]
        parts = self.gather({name: getattr(own, name).cpu() for name in fields})
        whole: dict[str, Any] = {n: torch.cat([part[n] for part in parts], -1).to(batch[0].device) for n in fields}
        return own._replace(**whole)


def join(device: torch.device | str = "cpu") -> Processes:
    """Return the processes of the run that this one belongs to, and connect with them where a launcher started several.

    Connections go through gloo on a CPU and NCCL on CUDA devices, and end with the process.

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
    """Average gradients that are in place already, whatever computed them, by the reducer of torch's DDP.

    DDP reduces what flows through autograd. A Pyro loss calls ``backward`` itself, perhaps once per particle, and a
    replayed recording holds its gradients ready; so they are handed to DDP as those of a function of the parameters.
    The summed loss and the number of data travel with them, as the gradient of a parameter that is no one's.
    """

    def __init__(self, pair: Pair) -> None:
        self.module = _Handed(pair)
        with _communication():
            # A parameter without a gradient in every process keeps none, as in one process.
            self.reducer = DistributedDataParallel(self.module, find_unused_parameters=True)

    def __call__(self, total: float | Tensor, size: int) -> tuple[float | Tensor, float | Tensor]:
        """Put means over processes in the place of ``p.grad``, and return those of the summed loss and the data."""
        tally = self.module.tally
        own = torch.stack([torch.as_tensor(value, dtype=tally.dtype, device=tally.device) for value in (total, size)])
        with torch.enable_grad(), _communication():
            self.reducer(own).backward()
        assert tally.grad is not None
        mean, tally.grad = tally.grad, None
        if mean.device.type == "cpu":
            return float(mean[0]), float(mean[1])
        return mean[0], mean[1]


class _Handed(nn.Module):
    """Return a number whose gradients are those that the pair's parameters have."""

    def __init__(self, pair: Pair) -> None:
        super().__init__()
        self.pair = pair
        device = next(pair.parameters()).device
        # Double precision, which counts data exactly and does not round the loss.
        self.tally = nn.Parameter(torch.zeros(2, dtype=torch.float64, device=device))
        # DDP, told to look for parameters without a gradient, would warn where it finds none.
        self.without_gradient = nn.Parameter(torch.zeros((), device=device))

    def forward(self, tally: Tensor) -> Tensor:
        parameters = [p for p in self.pair.parameters() if p.grad is not None]
        gradients: list[Any] = [p.grad for p in parameters]
        for parameter in parameters:
            parameter.grad = None
        return _Hand.apply((tally, *gradients), self.tally, *parameters)


class _Hand(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradients: Sequence[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return gradients[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *ctx.gradients)
