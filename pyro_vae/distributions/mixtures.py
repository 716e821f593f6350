"""Mixtures of Gaussians, and equal mixtures whose draws are reparameterised."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

__all__ = ["EqualMixture", "GaussianMixture"]


class GaussianMixture(dist.MixtureSameFamily):
    """Mix diagonal Gaussians over ``(L,)``: p(u) = Σ_i w_i N(u; μ_i, diag σ_i²).

    It is ``MixtureSameFamily`` with a static support, which Pyro's NUTS requires.

    >>> components = dist.Normal(torch.zeros(3, 2), torch.ones(3, 2)).to_event(1)
    >>> GaussianMixture(dist.Categorical(logits=torch.zeros(3)), components).log_prob(torch.zeros(2))
    tensor(-1.8379)
    """

    support = constraints.independent(constraints.real, 1)


class EqualMixture(dist.TorchDistribution):
    """Mix M distributions of one family with equal weights; draws have gradients.

    p(z) = (1/M) Σ_m p_m(z)

    The choice of a component depends on no parameter: the component's ``rsample`` is reparameterised for the mixture
    too. A mixture with learned weights has no ``rsample``.

    Args:
        components: batch shape (…, M).

    >>> mixture = EqualMixture(dist.Normal(torch.tensor([-1.0, 1.0]), 1.0))
    >>> mixture.batch_shape, mixture.mean, mixture.log_prob(torch.tensor(0.0))
    (torch.Size([]), tensor(0.), tensor(-1.4189))
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(self, components: Any) -> None:
        self.components = components
        super().__init__(components.batch_shape[:-1], components.event_shape, validate_args=False)

    @property
    def support(self) -> Any:
        return self.components.support

    @property
    def has_rsample(self) -> bool:
        return bool(self.components.has_rsample)

    @property
    def mean(self) -> Tensor:
        mean: Tensor = self.components.mean
        return mean.mean(-1 - self.event_dim)

    def expand(self, batch_shape: Any, _instance: Any = None) -> EqualMixture:
        return EqualMixture(self.components.expand((*batch_shape, self.components.batch_shape[-1])))

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        return self._one_of(self.components.rsample(torch.Size(sample_shape)))

    def sample(self, sample_shape: Any = ()) -> Tensor:
        with torch.no_grad():
            return self._one_of(self.components.sample(torch.Size(sample_shape)))

    def _one_of(self, draws: Tensor) -> Tensor:
        dim = draws.dim() - self.event_dim - 1
        chosen = torch.randint(draws.shape[dim], draws.shape[:dim], device=draws.device)
        index = chosen.reshape(*chosen.shape, 1, *(1 for _ in self.event_shape))
        return draws.gather(dim, index.expand(*chosen.shape, 1, *self.event_shape)).squeeze(dim)

    def log_prob(self, value: Tensor) -> Tensor:
        each = self.components.log_prob(value.unsqueeze(-1 - self.event_dim))
        return torch.logsumexp(each, -1) - math.log(each.shape[-1])
