"""Heads of p(x | z): they turn network outputs into distributions of data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
from torch import Tensor
from torch.nn.functional import softplus

from pyro_vae import distributions
from pyro_vae.conditionals.conditional import Head, blocks
from pyro_vae.conditionals.scales import LearnedScale, Scale

__all__ = ["Bernoulli", "ContinuousBernoulli", "DiscretisedLogistic", "Gaussian"]


class Bernoulli(Head):
    """Return Π Bernoulli(x; σ(l)) for data in {0, 1}."""

    def num_outputs(self, event_shape: Sequence[int]) -> int:
        return math.prod(event_shape)

    def forward(self, outputs: Tensor, event_shape: Sequence[int]) -> Any:
        (logits,) = blocks(outputs, event_shape, 1)
        return dist.Bernoulli(logits=logits).to_event(len(event_shape))


class ContinuousBernoulli(Head):
    """Return Π ContinuousBernoulli(x; σ(l)) for data in [0, 1].

    Reference:
        Loaiza-Ganem and Cunningham (2019), The continuous Bernoulli, NeurIPS.
    """

    def num_outputs(self, event_shape: Sequence[int]) -> int:
        return math.prod(event_shape)

    def forward(self, outputs: Tensor, event_shape: Sequence[int]) -> Any:
        (logits,) = blocks(outputs, event_shape, 1)
        return distributions.ContinuousBernoulli(logits).to_event(len(event_shape))


class Gaussian(Head):
    """Return N(x; x̂, γ² I), with fixed, learned or batch-optimal decoder noise γ.

    Args:
        scale: a :class:`FixedScale`, :class:`LearnedScale` (the default) or :class:`BatchOptimalScale`.
    """

    def __init__(self, scale: Scale | None = None) -> None:
        super().__init__()
        self.scale = LearnedScale() if scale is None else scale

    def num_outputs(self, event_shape: Sequence[int]) -> int:
        return math.prod(event_shape)

    def forward(self, outputs: Tensor, event_shape: Sequence[int]) -> Any:
        (loc,) = blocks(outputs, event_shape, 1)
        return self.scale.normal(loc).to_event(len(event_shape))


class DiscretisedLogistic(Head):
    """Return a logistic's mass on the data's gray levels, location and scale from the network.

    Args:
        levels: number of equally spaced levels from 0 to 1, e.g. 256 for 8-bit images, 17 for scikit-learn's digits.
    """

    def __init__(self, levels: int) -> None:
        super().__init__()
        if levels < 2:
            raise ValueError(f"levels is {levels}; a discretised likelihood needs at least 2")
        self.levels = levels

    def num_outputs(self, event_shape: Sequence[int]) -> int:
        return 2 * math.prod(event_shape)

    def forward(self, outputs: Tensor, event_shape: Sequence[int]) -> Any:
        loc, raw = blocks(outputs, event_shape, 2)
        # Scales start near a tenth of the gray range and cannot fall below a tenth of a level's width, where the mass
        # on the nearest level is already 0.99.
        scale = 0.15 * softplus(raw) + 0.1 / (self.levels - 1)
        return distributions.DiscretisedLogistic(loc + 0.5, scale, self.levels).to_event(len(event_shape))
