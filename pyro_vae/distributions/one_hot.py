"""Independent one-hot rows, exact and relaxed."""

from __future__ import annotations

import itertools
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.kl import register_kl

__all__ = ["OneHots", "RelaxedOneHots"]

# Limit of a sum over configurations: each takes 0.4 MB for 128 data of 784 float32 pixels.
MOST_CONFIGURATIONS = 2**14


class OneHots(dist.Independent):
    """Draw G independent one-hot rows of C categories; enumerate all C^G if they are few.

    p(z) = Π_g Π_c π_gc^{z_gc}

    Args:
        logits: log π up to a constant per row, (…, G, C).

    >>> pmf = OneHots(torch.zeros(2, 3))
    >>> pmf.log_prob(pmf.enumerate_support()).exp().sum()
    tensor(1.0000)
    """

    has_enumerate_support: ClassVar[bool] = True

    def __init__(self, logits: Tensor, validate_args: bool | None = None) -> None:
        super().__init__(dist.OneHotCategorical(logits=logits, validate_args=validate_args), 1, validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> OneHots:
        return OneHots(self.base_dist.logits.expand(*batch_shape, *self.event_shape), self._validate_args)

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """Return every configuration, (C^G, *batch, G, C), or (C^G, 1, …, G, C) without ``expand``.

        Raises:
            ValueError: for more than 2^14 configurations.
        """
        groups, categories = self.event_shape
        if (count := categories**groups) > MOST_CONFIGURATIONS:
            raise ValueError(
                f"{categories}^{groups} configurations are too many to sum over (at most {MOST_CONFIGURATIONS}): take "
                "fewer groups or categories, relax them (GumbelSoftmax), or train by the score function (Trace_ELBO)"
            )
        rows = torch.eye(categories, dtype=self.base_dist.logits.dtype, device=self.base_dist.logits.device)
        index = torch.tensor(list(itertools.product(range(categories), repeat=groups)), device=rows.device)
        values = rows[index].reshape(count, *(1 for _ in self.batch_shape), groups, categories)
        return values.expand(count, *self.batch_shape, groups, categories) if expand else values


class RelaxedOneHots(dist.TorchDistribution):
    """Draw relaxed one-hot rows, with gradients, and score them by a linear extension of the categorical mass.

    z_g = softmax((log π_g + Gumbel noise) / τ)          score Σ_g Σ_c z_gc log π_gc

    The score is no density: use it in a training loss, not in a bound. It is the log-mass at one-hot z, e.g. at
    straight-through draws, and tends to it as τ → 0. ``kl_divergence`` is the closed divergence of the masses;
    :class:`pyro.infer.TraceMeanField_ELBO` uses it.

    Args:
        logits: log π up to a constant per row, (…, G, C).
        temperature: τ > 0, a scalar tensor.
        straight_through: round draws to one-hot rows, with the relaxed draws' gradients.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    # The linear score is defined everywhere; rounded draws lie off the simplex by more than torch's check allows.
    support = constraints.independent(constraints.real_vector, 1)
    has_rsample = True

    def __init__(self, logits: Tensor, temperature: Tensor, straight_through: bool = False) -> None:
        self.temperature, self.straight_through = temperature, straight_through
        self.logits = logits.log_softmax(-1)
        super().__init__(logits.shape[:-2], logits.shape[-2:], validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> RelaxedOneHots:
        logits = self.logits.expand(*batch_shape, *self.event_shape)
        return RelaxedOneHots(logits, self.temperature, self.straight_through)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        relaxed = dist.RelaxedOneHotCategorical(self.temperature, logits=self.logits, validate_args=False)
        soft = relaxed.rsample(torch.Size(sample_shape))
        if not self.straight_through:
            return soft
        hard = torch.zeros_like(soft).scatter(-1, soft.argmax(-1, keepdim=True), 1.0)
        # The second term is zero in value; its gradient is that of the relaxed draw.
        return hard + (soft - soft.detach())

    def log_prob(self, value: Tensor) -> Tensor:
        return (value * self.logits).sum((-2, -1))

    @property
    def mean(self) -> Tensor:
        """The probabilities: the mean of the one-hot rows before relaxation."""
        return self.logits.exp()


@register_kl(RelaxedOneHots, RelaxedOneHots)
def _kl_relaxed(p: RelaxedOneHots, q: RelaxedOneHots) -> Tensor:
    return (p.logits.exp() * (p.logits - q.logits)).sum((-2, -1))
