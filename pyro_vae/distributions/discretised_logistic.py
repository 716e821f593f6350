"""A logistic distribution on equally spaced levels."""

from __future__ import annotations

from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints
from torch.nn.functional import logsigmoid

__all__ = ["DiscretisedLogistic", "on_grid"]


class _Grid(constraints.Constraint):
    """k / (levels − 1) for k = 0 … levels − 1, up to float32 rounding."""

    is_discrete = True

    def __init__(self, levels: int) -> None:
        self.levels = levels
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        steps = value * (self.levels - 1)
        # A float32 image scaled by 255 is off its integer by at most 255 · 2⁻²⁴ · a few roundings.
        near = (steps - steps.round()).abs() < 1e-3
        return near & (steps > -0.5) & (steps < self.levels - 0.5)

    def __repr__(self) -> str:
        return f"the {self.levels} levels 0, 1/{self.levels - 1}, …, 1"


def on_grid(levels: int) -> constraints.Constraint:
    """Return the constraint to ``levels`` equally spaced values from 0 to 1."""
    return _Grid(levels)


class DiscretisedLogistic(dist.TorchDistribution):
    """Put a logistic's mass on equally spaced values from 0 to 1; the end levels take the tails.

    P(x = k/(n−1)) = σ((x + h − m)/s) − σ((x − h − m)/s),   h = 1/(2(n−1))

    Args:
        loc: m, any shape.
        scale: s > 0, broadcastable with ``loc``.
        levels: n ≥ 2, the number of gray levels.

    Raises:
        ValueError: for fewer than two levels.

    Reference:
        Salimans, Karpathy, Chen and Kingma (2017), PixelCNN++, ICLR.

    >>> pmf = DiscretisedLogistic(torch.tensor(0.4), torch.tensor(0.1), levels=17)
    >>> pmf.log_prob(torch.arange(17) / 16).exp().sum()
    tensor(1.)
    """

    arg_constraints: ClassVar = {"loc": constraints.real, "scale": constraints.positive}

    def __init__(self, loc: Tensor, scale: Tensor, levels: int, validate_args: bool | None = None) -> None:
        if levels < 2:
            raise ValueError(f"levels is {levels}; a discretised likelihood needs at least 2")
        self.loc, self.scale = torch.broadcast_tensors(loc, scale)
        self.levels = levels
        super().__init__(self.loc.shape, validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self) -> constraints.Constraint:
        return _Grid(self.levels)

    def expand(self, batch_shape: Any, _instance: Any = None) -> DiscretisedLogistic:
        new = self._get_checked_instance(DiscretisedLogistic, _instance)
        new.loc, new.scale, new.levels = self.loc.expand(batch_shape), self.scale.expand(batch_shape), self.levels
        super(DiscretisedLogistic, new).__init__(new.loc.shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        top = self.levels - 1
        index = (value * top).round()
        upper = ((index + 0.5) / top - self.loc) / self.scale
        lower = ((index - 0.5) / top - self.loc) / self.scale
        # σ(b) − σ(a) = σ(b) σ(−a) (1 − e^{a−b}): without cancellation, even far in the tails.
        below, above = logsigmoid(upper), logsigmoid(-lower)
        inside = below + above + torch.log(-torch.expm1(-1 / (top * self.scale)))
        return torch.where(index <= 0, below, torch.where(index >= top, above, inside))

    def sample(self, sample_shape: Any = ()) -> Tensor:
        with torch.no_grad():
            uniform = torch.rand(
                self._extended_shape(torch.Size(sample_shape)), dtype=self.loc.dtype, device=self.loc.device
            )
            # rand may return 0, whose logit is −∞; clamping takes it to the lowest level.
            draw = self.loc + self.scale * torch.logit(uniform)
            return (draw * (self.levels - 1)).round().clamp(0, self.levels - 1) / (self.levels - 1)

    @property
    def mean(self) -> Tensor:
        """E[x] = Σ_{k ≥ 1} P(x ≥ k/(n−1)) / (n−1)."""
        top = self.levels - 1
        total = torch.zeros_like(self.loc)
        for k in range(1, self.levels):
            total += torch.sigmoid((self.loc - (k - 0.5) / top) / self.scale)
        return total / top
