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
        scored: True at the entries to score and to take γ² over; all of them without it. :meth:`mask` sets it.
    """

    arg_constraints: ClassVar = {"loc": constraints.real}
    support = constraints.real
    has_rsample = True

    def __init__(
        self,
        loc: Tensor,
        floor: float,
        record: Callable[[Tensor], None],
        validate_args: bool | None = None,
        scored: Tensor | None = None,
    ) -> None:
        self.loc, self.floor, self.record, self.scored = loc, floor, record, scored
        super().__init__(loc.shape, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> BatchOptimalNormal:
        return BatchOptimalNormal(
            self.loc.expand(batch_shape), self.floor, self.record, self._validate_args, self.scored
        )

    def mask(self, mask: bool | Tensor) -> BatchOptimalNormal:
        """Return the distribution that scores the entries of a mask alone, and takes γ² over them."""
        scored = torch.as_tensor(mask, device=self.loc.device)
        shape = torch.broadcast_shapes(scored.shape, self.loc.shape)
        both = scored if self.scored is None else scored & self.scored
        return BatchOptimalNormal(self.loc.expand(shape), self.floor, self.record, self._validate_args, both)

    def batch_variance(self, squares: Tensor) -> Tensor:
        """Return γ² of squared errors, over the entries that are scored, and record it."""
        if self.scored is None:
            mean = squares.mean()
        else:
            # A batch without scored entries has no error: γ² is the floor's square, and nothing is divided by zero.
            count = self.scored.expand_as(squares).sum().clamp(min=1)
            mean = torch.where(self.scored, squares, 0.0).sum() / count
        variance = mean + self.floor**2
        self.record(variance.detach())
        return variance

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        squares = (value - self.loc) ** 2
        variance = self.batch_variance(squares)
        log_prob = -0.5 * (squares / variance + torch.log(2 * math.pi * variance))
        return log_prob if self.scored is None else torch.where(self.scored, log_prob, 0.0)

    @property
    def mean(self) -> Tensor:
        return self.loc

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Return the mean: there is no scale before a batch is scored."""
        return self.loc.expand(self._extended_shape(torch.Size(sample_shape)))
