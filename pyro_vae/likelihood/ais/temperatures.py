"""Inverse temperatures of an annealing run, by their number."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

__all__ = ["Schedule", "geometric_schedule", "sigmoidal_schedule"]

Schedule: TypeAlias = Callable[[int], Tensor]


def geometric_schedule(num_temperatures: int) -> Tensor:
    """Return inverse temperatures 0 = β_0 < … < β_T = 1 whose ratios are equal from β_1 = 1e-4 on.

    Args:
        num_temperatures: T.

    Returns:
        (T + 1,), float64.

    >>> geometric_schedule(3)
    tensor([0.0000e+00, 1.0000e-04, 1.0000e-02, 1.0000e+00], dtype=torch.float64)
    """
    steps = torch.arange(num_temperatures, dtype=torch.float64)
    rising = 10 ** (-4 * (1 - (steps + (num_temperatures == 1)) / max(num_temperatures - 1, 1)))
    return torch.cat([torch.zeros(1, dtype=torch.float64), rising])


def sigmoidal_schedule(num_temperatures: int) -> Tensor:
    """Return inverse temperatures from 0 to 1, densest at both ends, β_t ∝ σ(8t/T − 4) − σ(−4).

    Args:
        num_temperatures: T.

    Returns:
        (T + 1,), float64.

    Reference:
        Wu, Burda, Salakhutdinov and Grosse (2017), On the quantitative analysis of decoder-based generative models,
        ICLR.

    >>> sigmoidal_schedule(2)
    tensor([0.0000, 0.5000, 1.0000], dtype=torch.float64)
    """
    rising = torch.sigmoid(torch.linspace(-4, 4, num_temperatures + 1, dtype=torch.float64))
    return (rising - rising[0]) / (rising[-1] - rising[0])
