"""One estimate by several processes, each for its share of the data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_vae.likelihood.estimate import LogLikelihood
from pyro_vae.runtime.distributed import Processes

__all__ = ["shared_log_likelihood"]


def shared_log_likelihood(
    processes: Processes, estimate: Callable[..., LogLikelihood], *batch: Tensor, seed: int
) -> LogLikelihood:
    """Estimate each process's share of the data, and return the estimate of all data in every process.

    The result is bitwise that of one process, unless it is compiled.

    Args:
        processes: the processes of the run.
        estimate: called with a share of the batch and ``seed=``.
        batch: ``x`` (B, …) and the pair's conditions, the same in every process.
        seed: of the draws, the same in every process.

    Returns:
        :class:`~pyro_vae.LogLikelihood` of the B data in their order.

    Raises:
        ValueError: for fewer data than processes.

    >>> import pyro_vae as pv
    >>> pair, x = pv.models.LinearGaussianVAE(5, 2), torch.zeros(3, 5)
    >>> ll = shared_log_likelihood(Processes(), lambda x, seed: pv.log_likelihood(pair, x, seed=seed), x, seed=0)
    >>> ll.per_datum.shape
    torch.Size([3])
    """
    if len(batch[0]) < processes.size:
        raise ValueError(f"there are {len(batch[0])} data for {processes.size} processes: start fewer of them")
    share = estimate(*map(processes.share, batch), seed=seed)
    fields = [name for name, value in share._asdict().items() if isinstance(value, Tensor)]
    parts = processes.gather({name: getattr(share, name).cpu() for name in fields})
    whole: dict[str, Any] = {n: torch.cat([part[n] for part in parts], -1).to(batch[0].device) for n in fields}
    return share._replace(**whole)
