"""The standard deviation γ of a Gaussian likelihood: fixed, learned, or optimal for each batch."""

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
    """The standard deviation γ of a Gaussian likelihood, broadcast against the mean."""

    @abc.abstractmethod
    def forward(self) -> Tensor:
        """Return γ."""

    def normal(self, loc: Tensor) -> Any:
        """Return N(loc, γ²), entry by entry."""
        return dist.Normal(loc, self())

    def monitor(self) -> float:
        """Return γ, averaged over its entries, for the record of an epoch."""
        return float(self().detach().mean())


class FixedScale(Scale):
    """Fix γ.

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
    """Learn γ = (floor² + e^{2r})^½, for all entries, per channel, or per pixel.

    Args:
        initial: γ at the start, e.g. the standard deviation of the data.
        shape: () for one γ, (C, 1, 1) for one per channel, the event's shape for one per pixel.
        floor: smooth lower limit; without it a perfect reconstruction drives the loss to −∞.

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
        """Set γ. A value at or below the floor becomes the floor, up to rounding."""
        above = (value**2 - self.floor**2).clamp(min=torch.finfo(value.dtype).eps * self.floor**2)
        self.raw.copy_(0.5 * torch.log(above))


class BatchOptimalScale(Scale):
    """Train with γ² = mean (x − x̂)² of each batch; evaluate with a running average.

    In evaluation mode γ² is the exponential average of the training batches' values. If γ is recomputed on each batch,
    each likelihood depends on the other data points and the ELBO comes out too high.

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
        # A plain mean of the first batches: the arbitrary starting value has no weight.
        self.seen += 1
        weight = torch.clamp(1 / self.seen, min=self.momentum)
        self.variance += weight * (variance - self.variance)
