"""Corruptions: modules that map x to the distribution of a noisy x̃.

``domain`` is the constraint on data that a corruption takes.
"""

from __future__ import annotations

from typing import Any, ClassVar

import pyro.distributions as dist
from torch import Tensor, nn
from torch.distributions import constraints

__all__ = ["BitFlip", "GaussianNoise"]


class BitFlip(nn.Module):
    """Flip every bit with a probability. Gray values are first drawn as bits.

    It is salt-and-pepper noise of twice this density.

    Args:
        probability: 0 to 1; 0 changes no bit, and 0.5 makes x̃ independent of x.

    Raises:
        ValueError: for a number outside [0, 1].

    >>> import torch
    >>> BitFlip(0.1)(torch.tensor([0.0, 1.0])).mean
    tensor([0.1000, 0.9000])
    """

    domain: ClassVar = constraints.unit_interval

    def __init__(self, probability: float) -> None:
        super().__init__()
        if not 0 <= probability <= 1:
            raise ValueError(f"probability is {probability}; it must lie between 0 and 1")
        self.probability = probability

    def forward(self, x: Tensor) -> Any:
        return dist.Bernoulli(probs=self.probability + (1 - 2 * self.probability) * x, validate_args=False)


class GaussianNoise(nn.Module):
    """Add N(0, s² I) to real data.

    Args:
        scale: s ≥ 0; 0 adds nothing.

    Raises:
        ValueError: for a negative or infinite scale.

    >>> import torch
    >>> GaussianNoise(0.0)(torch.tensor([0.0, 1.0])).sample()
    tensor([0., 1.])
    """

    domain: ClassVar = constraints.real

    def __init__(self, scale: float) -> None:
        super().__init__()
        if not 0 <= scale < float("inf"):
            raise ValueError(f"scale is {scale}; it must be finite and at least 0")
        self.scale = scale

    def forward(self, x: Tensor) -> Any:
        return dist.Normal(x, self.scale) if self.scale else dist.Delta(x)
