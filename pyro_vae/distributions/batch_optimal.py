"""A Gaussian whose scale is the batch's own optimum."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

__all__ = ["BatchOptimalNormal"]


class BatchOptimalNormal(dist.TorchDistribution):
    """Score a Gaussian at the scale that fits the scored batch best: γ² = mean (x − loc)² over all of it.

    It couples the data of the batch and its bound is optimistic: for training only.

    Args:
        loc: any shape.
        floor: added to γ² as its square, so that a perfect fit stays finite.
        record: called with the batch's γ², so that evaluation can use one frozen value.
    """

    arg_constraints: ClassVar = {"loc": constraints.real}
    support = constraints.real
    has_rsample = True

    def __init__(
        self, loc: Tensor, floor: float, record: Callable[[Tensor], None], validate_args: bool | None = None
    ) -> None:
        self.loc, self.floor, self.record = loc, floor, record
        super().__init__(loc.shape, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> BatchOptimalNormal:
        return BatchOptimalNormal(self.loc.expand(batch_shape), self.floor, self.record, self._validate_args)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        squares = (value - self.loc) ** 2
        variance = squares.mean() + self.floor**2
        self.record(variance.detach())
        return -0.5 * (squares / variance + torch.log(2 * math.pi * variance))

    @property
    def mean(self) -> Tensor:
        return self.loc

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Return the mean: a scale exists only once a batch has been scored."""
        return self.loc.expand(self._extended_shape(torch.Size(sample_shape)))
