"""NumPy arrays, frames and torch's data sets as tensors, at the door of every function that takes data."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset, TensorDataset

from pyro_vae.pair.failures import name_of_condition
from pyro_vae.pair.pair import Pair

__all__ = ["takes_arrays"]

P = ParamSpec("P")
R = TypeVar("R")


def takes_arrays(function: Callable[P, R]) -> Callable[P, R]:
    """Let a function of a pair and its data take NumPy arrays, data frames, and data sets of tensors.

    Arrays of real numbers become tensors of the pair's dtype, other arrays keep their kind. A ``TensorDataset`` or a
    ``Subset`` of one stands for its tensors. Tensors, and whatever else is passed, go through as they are.

    Raises:
        ValueError: for entries that are no numbers, masked entries, and numbers beyond the pair's dtype.

    >>> import numpy, pyro_vae as pv
    >>> pair = pv.models.LinearGaussianVAE(3, 1)
    >>> pv.posterior(pair, numpy.zeros((6, 3)), num_particles=4).log_weights.shape
    torch.Size([4, 6])
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def converted(*args: P.args, **kwargs: P.kwargs) -> R:
        if not any(map(_may_convert, (*args, *kwargs.values()))):
            return function(*args, **kwargs)
        pair = args[0] if args else kwargs.get("pair")
        dtype = next((p.dtype for p in pair.parameters()), None) if isinstance(pair, Pair) else None
        several = next((p.name for p in signature.parameters.values() if p.kind is p.VAR_POSITIONAL), None)
        names = [p.name for p in signature.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
        new: list[Any] = []
        for i, value in enumerate(args):
            named = several is None or i < len(names)
            name = (
                names[min(i, len(names) - 1)]
                if several is None or i < len(names)
                else _argument(pair, several, i - len(names))
            )
            value = _convert(value, dtype, name)
            # Data sets of several tensors are as many arguments where a function takes them so.
            new += value if not named and isinstance(value, tuple) and _is_data_set(args[i]) else [value]
        return function(*new, **{name: _convert(value, dtype, name) for name, value in kwargs.items()})

    return converted


def _argument(pair: Any, several: str, index: int) -> str:
    """Return the name of one of a function's ``*batch``, which begins with x, or of its ``*conditions``."""
    place = index + (several == "conditions")
    return f"the condition '{name_of_condition(pair, place)}'" if place else "x"


def _may_convert(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return any(map(_is_array, value))
    return _is_array(value) or _is_data_set(value)


def _is_array(value: Any) -> bool:
    return not isinstance(value, Tensor | np.generic) and (hasattr(value, "to_numpy") or hasattr(value, "__array__"))


def _is_data_set(value: Any) -> bool:
    while isinstance(value, Subset):
        value = value.dataset
    return isinstance(value, TensorDataset)


def _convert(value: Any, dtype: torch.dtype | None, name: str) -> Any:
    if _is_data_set(value):
        return tuple(_tensors(value))
    if _is_array(value):
        return _as_tensor(value, dtype, name)
    if isinstance(value, tuple | list) and any(map(_is_array, value)):
        return tuple(_as_tensor(each, dtype, name) if _is_array(each) else each for each in value)
    return value


def _tensors(data: Any) -> Iterator[Tensor]:
    if isinstance(data, TensorDataset):
        yield from data.tensors
    else:
        yield from (tensor[torch.as_tensor(data.indices)] for tensor in _tensors(data.dataset))


def _as_tensor(value: Any, dtype: torch.dtype | None, name: str) -> Tensor:
    array: Any = np.asarray(value.to_numpy() if hasattr(value, "to_numpy") else value)
    if np.ma.is_masked(value):
        raise ValueError(
            f"{name} has masked entries: fill them, x.filled(0), and pass the mask as a condition of the pair"
        )
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{name} has entries of type {array.dtype}{_columns(value)}, no numbers: encode them")
    if array.dtype.kind == "f":
        tensor = _shared(array.astype(np.float64) if array.dtype.itemsize > 8 else array)
        return tensor if dtype is None else _rounded(tensor, dtype, name)
    if array.dtype.kind == "u":
        # torch has few operations for them, and takes an index of uint8 for a mask.
        if array.size and int(array.max()) > np.iinfo(np.int64).max:
            raise ValueError(f"{name} holds whole numbers beyond int64: pass smaller ones")
        array = array.astype(np.int64)
    return _shared(array)


def _columns(frame: Any) -> str:
    """Return a clause on the columns of a frame that hold no numbers."""
    types = getattr(frame, "dtypes", None)
    if types is None or not hasattr(types, "items"):
        return ""
    columns = [str(column) for column, kind in types.items() if getattr(kind, "kind", "O") not in "biuf"]
    return f" in the columns {columns[:5]}" if columns else ""


def _shared(array: Any) -> Tensor:
    """Return a tensor on an array's memory where its layout allows; nothing here writes to it."""
    if array.ndim:
        array = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("="))
    with warnings.catch_warnings():
        # torch warns of memory that may not be written, e.g. of a file mapped for reading.
        warnings.simplefilter("ignore")
        return torch.as_tensor(array)


def _rounded(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    rounded = tensor.to(dtype)
    if rounded is not tensor and tensor.isfinite().sum() != rounded.isfinite().sum():
        raise ValueError(f"{name} holds numbers beyond {dtype}, at most {torch.finfo(dtype).max:.3g}: scale the data")
    return rounded
