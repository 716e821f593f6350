"""A Gaussian likelihood's standard deviation γ: fixed, learned, or the optimum of each batch."""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_vae.distributions.batch_optimal import BatchOptimalNormal

__all__ = ["BatchOptimalScale", "FixedScale", "LearnedScale", "Scale"]


class Scale(nn.Module, abc.ABC):
    """A Gaussian likelihood's standard deviation γ, broadcast against the mean."""

    @abc.abstractmethod
    def forward(self) -> Tensor:
        """Return γ."""

    def normal(self, loc: Tensor) -> Any:
        """Return N(loc, γ²), entry by entry."""
        return dist.Normal(loc, self())

    def monitor(self) -> float:
        """Return γ, averaged over its entries, for the training record."""
        return float(self().detach().mean())


class FixedScale(Scale):
    """Keep γ as given.

    >>> FixedScale(0.1)()
    tensor(0.1000)
    """

    value: Tensor

    def __init__(self, value: float | Tensor) -> None:
        super().__init__()
        value = torch.as_tensor(value, dtype=torch.get_default_dtype())
        if not (value > 0).all():
            raise ValueError("a scale must be positive")
        self.register_buffer("value", value)

    def forward(self) -> Tensor:
        return self.value


class LearnedScale(Scale):
    """Learn γ = (floor² + e^{2r})^½, one for all entries, per channel, or per pixel.

    Args:
        initial: γ at the start; the data's own standard deviation is a good one.
        shape: () for one γ, (C, 1, 1) for one per channel, the event's shape for one per pixel.
        floor: the smooth lower limit that keeps a perfect reconstruction from driving the loss to −∞.

    Raises:
        ValueError: for an initial value that is not above the floor.

    Reference:
        Rybkin, Daniilidis and Levine (2021), Simple and effective VAE training with calibrated decoders, ICML.

    >>> round(float(LearnedScale(0.5)().detach()), 6)
    0.5
    """

    def __init__(self, initial: float = 0.5, shape: Sequence[int] = (), floor: float = 1e-3) -> None:
        super().__init__()
        if not initial > floor >= 0:
            raise ValueError(f"initial is {initial}, floor {floor}: the scale must start above its floor")
        self.floor = floor
        self.raw = nn.Parameter(torch.full(tuple(shape), 0.5 * math.log(initial**2 - floor**2)))

    def forward(self) -> Tensor:
        return torch.sqrt(self.floor**2 + torch.exp(2 * self.raw))

    @torch.no_grad()
    def set(self, value: Tensor) -> None:
        """Set γ to a value; one at the floor or below becomes the floor, up to rounding."""
        above = (value**2 - self.floor**2).clamp(min=torch.finfo(value.dtype).eps * self.floor**2)
        self.raw.copy_(0.5 * torch.log(above))


class BatchOptimalScale(Scale):
    """Train with γ² = mean (x − x̂)² of the batch at hand; evaluate with one frozen running average.

    The batch's own optimum couples its data and flatters the bound, so evaluation never uses it: in evaluation mode γ²
    is the exponential average of the training batches' values.

    Args:
        momentum: weight of the newest batch in the average.
        floor: as in :class:`LearnedScale`.

    Reference:
        Rybkin, Daniilidis and Levine (2021), Simple and effective VAE training with calibrated decoders, ICML.
    """

    variance: Tensor
    seen: Tensor

    def __init__(self, momentum: float = 0.01, floor: float = 1e-3) -> None:
        super().__init__()
        self.momentum, self.floor = momentum, floor
        self.register_buffer("variance", torch.ones(()))
        self.register_buffer("seen", torch.zeros(()))

    def forward(self) -> Tensor:
        return self.variance.sqrt()

    def normal(self, loc: Tensor) -> Any:
        return BatchOptimalNormal(loc, self.floor, self._record) if self.training else dist.Normal(loc, self())

    def _record(self, variance: Tensor) -> None:
        # A plain mean of the first batches, so that the arbitrary starting value is forgotten at once.
        self.seen += 1
        weight = torch.clamp(1 / self.seen, min=self.momentum)
        self.variance += weight * (variance - self.variance)
