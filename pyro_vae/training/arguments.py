"""What ``fit`` accepts: devices, data and settings, refused in words before a step is taken."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from pyro_vae.data import AnyDataSet, DataSet, GraphData

__all__ = ["Data", "as_batch", "check_data", "check_settings", "fingerprint", "split"]

Data: TypeAlias = Tensor | Sequence[Tensor] | AnyDataSet


def as_batch(data: Data) -> tuple[Tensor, ...]:
    """Return ``x`` and the conditions as a tuple; of a data set, its training images."""
    if isinstance(data, DataSet | GraphData):
        return (data.train,)
    return (data,) if isinstance(data, Tensor) else tuple(data)


def split(
    data: tuple[Tensor, ...], validation: Data | float | None, seed: int
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...] | None]:
    """Return training and held-out data; a share of the data is drawn by the seed.

    Raises:
        ValueError: for a share that is not between 0 and 1.
    """
    if validation is None:
        return data, None
    if not isinstance(validation, (int, float)):
        return data, as_batch(validation)
    if not 0 < validation < 1:
        raise ValueError(f"validation is {validation}; as a share of the data it must lie between 0 and 1")
    order = torch.randperm(len(data[0]), generator=torch.Generator().manual_seed(seed))
    held = max(1, round(validation * len(order)))
    return tuple(t[order[held:]] for t in data), tuple(t[order[:held]] for t in data)


def fingerprint(batch: tuple[Tensor, ...] | None) -> str:
    """Return the number of data and a hash of their bytes, by which a resumed run knows them."""
    if batch is None:
        return "none"
    digest = hashlib.sha256()
    for tensor in batch:
        digest.update(tensor.detach().cpu().contiguous().numpy().data)
    return f"{len(batch[0])} data, sha256 {digest.hexdigest()[:16]}"


def check_data(
    train: tuple[Tensor, ...],
    *,
    batch_size: int,
    epochs: int,
    num_particles: int,
    processes: int = 1,
) -> None:
    """Refuse counts that do not fit the data.

    Raises:
        ValueError: naming the argument, what is wrong and how to mend it.
    """
    if epochs < 1:
        raise ValueError(f"epochs is {epochs}; it must be at least 1")
    if not 1 <= batch_size <= len(train[0]):
        raise ValueError(f"batch_size is {batch_size}; there are {len(train[0])} training data")
    if batch_size * processes > len(train[0]):
        raise ValueError(
            f"batch_size is {batch_size} in {processes} processes; there are {len(train[0])} training data"
        )
    if num_particles < 1:
        raise ValueError(f"num_particles is {num_particles}; it must be at least 1")


def check_settings(
    held_out: tuple[Tensor, ...] | None,
    *,
    lr: float,
    beta: float,
    warmup: int,
    clip_norm: float | None,
    patience: int | None,
) -> None:
    """Refuse settings that no training could use.

    Raises:
        ValueError: naming the setting and its limits.
    """
    if not 0 <= beta < math.inf or warmup < 0:
        raise ValueError(f"beta is {beta}, warmup {warmup}; both must be finite, and neither may be negative")
    if not 0 < lr < math.inf:
        raise ValueError(f"lr is {lr}; it must be positive and finite")
    if clip_norm is not None and not clip_norm > 0:
        raise ValueError(f"clip_norm is {clip_norm}; it must be positive, or None for no clipping")
    if patience is not None and patience < 1:
        raise ValueError(f"patience is {patience}; it must be at least 1, or None for no early stopping")
    if patience is not None and held_out is None:
        raise ValueError("patience needs validation data: pass validation=0.1, or a set of its own")
