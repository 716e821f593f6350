"""Numbers of Python, NumPy or torch as Python's, or one sentence that names the argument."""

from __future__ import annotations

import numbers
import operator
from typing import Any

import numpy
import torch
from torch import Tensor

__all__ = ["real", "whole"]


def whole(value: Any, argument: str) -> int:
    """Return a whole number of Python, NumPy or torch as an int.

    Raises:
        ValueError: naming the argument, for anything else.

    >>> whole(torch.tensor(3), "epochs")
    3
    """
    try:
        # torch takes True for 1.
        if isinstance(value, bool) or getattr(value, "dtype", None) is torch.bool:
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{argument} is {_shown(value)}; it must be a whole number") from None


def real(value: Any, argument: str) -> float:
    """Return a real number of Python, NumPy or torch as one of Python.

    Raises:
        ValueError: naming the argument, for anything else.

    >>> real(torch.tensor(0.5), "beta"), real(1, "beta")
    (0.5, 1)
    """
    if isinstance(value, Tensor | numpy.ndarray) and value.ndim == 0:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError(f"{argument} is {_shown(value)}; it must be a number")
    return value if isinstance(value, int) else float(value)


def _shown(value: object) -> str:
    return repr(value) if isinstance(value, (int, float, str, type(None))) else f"of type {type(value).__name__}"
