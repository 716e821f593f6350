"""Refuse data that a pair cannot take, before anything is computed from them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pyro_vae.pair.failures import name_of_condition
from pyro_vae.pair.pair import Pair
from pyro_vae.pair.site import Site

__all__ = [
    "check_batch",
    "check_conditions",
    "check_finite",
    "check_kind",
    "check_tensor",
    "refuse_outside",
]

# Entries checked together. Marks of all entries could take more memory than the data, e.g. a memory-mapped file.
ENTRIES = 2**20


def check_batch(pair: Pair, batch: tuple[Tensor, ...], argument: str = "x") -> None:
    """Refuse data that are empty, of another shape or dtype, NaN or infinite.

    Raises:
        ValueError: naming the argument, the fault and the way out.
    """
    if not batch:
        raise ValueError(f"{argument} must be a tensor, or a tuple of tensors: the data and the pair's conditions")
    names = [argument, *(f"the condition '{name_of_condition(pair, i)}'" for i in range(1, len(batch)))]
    for name, each in zip(names, batch, strict=True):
        check_kind(each, name)
    x = batch[0]
    shape = getattr(pair, "x_shape", None)
    if shape is not None and tuple(x.shape[1:]) != tuple(shape):
        raise ValueError(
            f"{argument} has shape {tuple(x.shape)}; {type(pair).__name__} expects (N, {', '.join(map(str, shape))})"
        )
    if len(x) == 0:
        raise ValueError(f"{argument} holds no data")
    if any(len(tensor) != len(x) for tensor in batch):
        raise ValueError(f"{argument} and its conditions have {[len(t) for t in batch]} rows; they must be equal")
    check_tensor(x, pair.x_dtype or next((p.dtype for p in pair.parameters()), x.dtype), argument)
    for name, tensor in zip(names[1:], batch[1:], strict=True):
        check_finite(tensor, name)


def check_kind(value: Any, name: str) -> None:
    """Refuse anything but a dense tensor of numbers on a real device, with one row for each datum.

    Raises:
        ValueError: naming the value and the way to pass its numbers.

    >>> import torch
    >>> check_kind(torch.zeros(3, 2), "x")
    """
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} is {_kind_of(value)}: pass {_way_of(value)}")
    if value.layout != torch.strided or value.is_nested:
        raise ValueError(f"{name} is a sparse or nested tensor: pass a dense one, e.g. by to_dense()")
    if value.is_complex() or value.is_meta or value.is_quantized:
        raise ValueError(f"{name} is a tensor of {value.dtype} on {value.device}: pass real numbers on a CPU or GPU")
    if value.dim() == 0:
        raise ValueError(f"{name} is a single number: pass a tensor with one row for each datum")


def _kind_of(value: Any) -> str:
    if value is None:
        return "None"
    package = type(value).__module__.split(".")[0]
    return f"a {type(value).__name__}" + (f" of {package}" if package != "builtins" else "")


def _way_of(value: Any) -> str:
    """Return how to pass the numbers of a value that is no tensor."""
    if isinstance(value, DataLoader):
        return "the tensors behind it, since batches are drawn here (batch_size=)"
    if isinstance(value, Dataset):
        return "its rows as tensors, e.g. torch.stack([row for row, *_ in dataset])"
    if hasattr(value, "toarray"):
        return "a dense array, by toarray()"
    if isinstance(value, (list, tuple)):
        if any(isinstance(each, Tensor) for each in value):
            return "its tensors as arguments of their own, x and then the conditions"
        return "one tensor, by torch.stack or torch.tensor"
    if value is None or isinstance(value, (str, bytes, dict)):
        return "a tensor, or a tuple of tensors: the data and the pair's conditions"
    return "a tensor with one row for each datum"


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


def check_conditions(pair: Pair, model: Mapping[str, Site], few: tuple[Tensor, ...], batch: tuple[Tensor, ...]) -> None:
    """Refuse conditions that the model observes outside their sites' supports, e.g. a fourth of three labels.

    Args:
        pair: the pair.
        model: the model's sites, from a run on ``few``.
        few: some rows of ``batch``; a site's data are known by them.
        batch: ``x`` and the conditions.

    Raises:
        ValueError: naming the condition, the fault and the way out.
    """
    for site in model.values():
        if not site.is_observed or site.is_factor or site.drawn is few[0]:
            continue
        index = next((i for i in range(1, len(few)) if _is_from(site.drawn, few[i])), None)
        if index is None:
            refuse_outside(site, site.drawn, f"the data of site '{site.name}'", advice=OTHER_VALUES)
        else:
            whole = batch[index].to(site.drawn.dtype).reshape(len(batch[0]), *site.drawn.shape[1:])
            refuse_outside(site, whole, name_of_condition(pair, index), advice=OTHER_VALUES)


def _is_from(value: Tensor, condition: Tensor) -> bool:
    """Whether a site observes a condition, as it is or as another dtype or shape."""
    if value is condition:
        return True
    same = value.dim() > 0 and len(value) == len(condition) and value.numel() == condition.numel()
    return same and torch.equal(condition.to(value.dtype).reshape(value.shape), value)


# Likelihoods that would take data outside the support of x's site, and the way out for other sites.
LIKELIHOODS = (
    "use a Bernoulli for data in {0, 1} (pv.data.binarise), a continuous Bernoulli for [0, 1], a discretised logistic "
    "for gray levels (with the data's own number of levels), a Gaussian for real data"
)
OTHER_VALUES = (
    "pass values in that set, also where a mask leaves them out, or give the site a distribution of such values"
)


def refuse_outside(
    site: Site, value: Tensor, argument: str, seen: Tensor | None = None, advice: str = LIKELIHOODS
) -> None:
    """Refuse values outside a site's support, entry by entry, or vector by vector for e.g. a simplex.

    Args:
        site: an observed site.
        value: data, (N, …).
        argument: the argument's name, for messages.
        seen: True at the entries to check; all of them without it.
        advice: the way out.

    Raises:
        ValueError: with their number, the first one, and the way out.
    """
    support = site.entry_support
    entries = value.shape[1 : value.dim() - support.event_dim]
    # A support that depends on a batch's parameters has the batch's shape; Pyro checks it batch by batch.
    if value.dim() <= support.event_dim or support.check(value[:1]).shape != (1, *entries):
        return
    outside = (~support.check(part) for part in _parts(value))
    if seen is not None:
        whole = seen.expand_as(value).reshape(len(value), *entries, -1).all(-1)
        outside = (bad & part for bad, part in zip(outside, whole.split(_rows(value)), strict=True))
    count, first = _marked(outside)
    if not count:
        return
    shown = f" {float(value[first]):.4g}" if support.event_dim == 0 else ""
    raise ValueError(
        f"{argument} has {count} values outside the support of site '{site.name}' ({support}), the first{shown} at "
        f"index {first}: {advice}"
    )


def _parts(x: Tensor) -> tuple[Tensor, ...]:
    """Split data by rows into parts of about ``ENTRIES`` entries."""
    return x.split(_rows(x))


def _rows(x: Tensor) -> int:
    return max(1, ENTRIES * len(x) // max(1, x.numel()))


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
