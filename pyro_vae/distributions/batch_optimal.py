"""A Gaussian with the optimal scale for the batch that it scores."""

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
    """Score a batch under a Gaussian at its optimal scale, γ² = mean (x − loc)².

    Use it in training only: each likelihood depends on the other data points, and the ELBO comes out too high.

    Args:
        loc: any shape.
        floor: its square is added to γ²; a perfect fit stays finite.
        record: called with γ² of each batch, e.g. to average it for evaluation.
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
        """Return the mean: there is no scale before a batch is scored."""
        return self.loc.expand(self._extended_shape(torch.Size(sample_shape)))
