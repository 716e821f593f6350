"""Refuse data that a pair cannot take, before anything is computed from them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from pyro_vae.pair.pair import Pair
from pyro_vae.pair.site import Site

__all__ = ["check_batch", "check_finite", "check_tensor", "refuse_outside"]

# Entries checked together. Marks of all entries could take more memory than the data, e.g. a memory-mapped file.
ENTRIES = 2**20


def check_batch(pair: Pair, batch: tuple[Tensor, ...], argument: str = "x") -> None:
    """Refuse data that are empty, of another shape or dtype, NaN or infinite.

    Raises:
        ValueError: naming the argument, the fault and the way out.
    """
    if not batch or not all(isinstance(tensor, Tensor) for tensor in batch):
        raise ValueError(f"{argument} must be a tensor, or a tuple of tensors: the data and the pair's conditions")
    x = batch[0]
    shape = getattr(pair, "x_shape", None)
    if shape is not None and tuple(x.shape[1:]) != tuple(shape):
        raise ValueError(
            f"{argument} has shape {tuple(x.shape)}; {type(pair).__name__} expects (N, {', '.join(map(str, shape))})"
        )
    if x.dim() == 0 or len(x) == 0:
        raise ValueError(f"{argument} holds no data")
    if any(len(tensor) != len(x) for tensor in batch):
        raise ValueError(f"{argument} and its conditions have {[len(t) for t in batch]} rows; they must be equal")
    check_tensor(x, pair.x_dtype or next((p.dtype for p in pair.parameters()), x.dtype), argument)
    for tensor in batch[1:]:
        check_finite(tensor, argument)


def check_tensor(x: Tensor, dtype: torch.dtype, argument: str) -> None:
    """Refuse a tensor of another dtype, or with NaN or infinite values.

    Raises:
        ValueError: naming the argument, the fault and the way out.
    """
    if x.dtype != dtype:
        raise ValueError(f"{argument} is {x.dtype}, the pair computes with {dtype}: use {argument}.to({dtype})")
    check_finite(x, argument)


def check_finite(x: Tensor, argument: str) -> None:
    """Refuse NaN or infinite values; integers have none.

    Raises:
        ValueError: naming the argument, the number of such values and the first.
    """
    if not x.is_floating_point():
        return
    count, first = _marked(~torch.isfinite(part) for part in _parts(x))
    if count:
        raise ValueError(
            f"{argument} has {count} NaN or infinite value{'s' if count > 1 else ''}, the first at index {first}"
        )


def refuse_outside(site: Site, value: Tensor, argument: str, seen: Tensor | None = None) -> None:
    """Refuse values outside a site's support, entry by entry.

    Args:
        site: an observed site.
        value: data, (N, …).
        argument: the argument's name, for messages.
        seen: True at the entries to check; all of them without it.

    Raises:
        ValueError: with their number, the first one, and likelihoods that would take it.
    """
    support = site.entry_support
    # A support that depends on a batch's parameters has the batch's shape; Pyro checks it batch by batch.
    if support.check(value[:1]).shape != value[:1].shape:
        return
    outside = (~support.check(part) for part in _parts(value))
    if seen is not None:
        outside = (bad & part for bad, part in zip(outside, _parts(seen.expand_as(value)), strict=True))
    count, first = _marked(outside)
    if not count:
        return
    raise ValueError(
        f"{argument} has {count} values outside the support of site '{site.name}' ({support}), the first "
        f"{float(value[first]):.4g} at index {first}: use a Bernoulli for data in {{0, 1}} (pv.data.binarise), a "
        "continuous Bernoulli for [0, 1], a discretised logistic for gray levels (with the data's own number of "
        "levels), a Gaussian for real data"
    )


def _parts(x: Tensor) -> tuple[Tensor, ...]:
    """Split data by rows into parts of about ``ENTRIES`` entries."""
    return x.split(max(1, ENTRIES * len(x) // max(1, x.numel())))


def _marked(parts: Iterable[Tensor]) -> tuple[int, tuple[int, ...]]:
    """Count the true entries of consecutive parts by rows, and find the index of the first."""
    count, first, start = 0, (), 0
    for marks in parts:
        found = int(marks.sum())
        if found and not count:
            row, *others = marks.nonzero()[0].tolist()
            first = (start + row, *others)
        count, start = count + found, start + len(marks)
    return count, first
