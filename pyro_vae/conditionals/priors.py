"""Priors: distributions without a context."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_vae import distributions

__all__ = ["MixtureOfGaussians", "StandardNormal"]


class StandardNormal(nn.Module):
    """Return p(z) = N(0, I) over (size,).

    >>> StandardNormal(3)().log_prob(torch.zeros(3))
    tensor(-2.7568)
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = _positive(size, "size")
        self.register_buffer("zero", torch.zeros(size), persistent=False)

    def forward(self) -> dist.Distribution:
        zero = self.get_buffer("zero")
        return dist.Normal(zero, torch.ones_like(zero)).to_event(1)


class MixtureOfGaussians(nn.Module):
    """Return p(u) = Σ_i w_i N(u; μ_i, diag σ_i²) over (size,).

    Args:
        components: number of Gaussians.
        size: event size.
        weights, means, scales: starting values, (components,), (components, size), (components, size). Defaults are
            equal weights, means drawn from N(0, I), unit scales.
        learned: whether the three are parameters; else they are constant.

    Raises:
        ValueError: for values of another shape, and for weights or scales that are not positive.

    >>> prior = MixtureOfGaussians(10, 4)
    >>> prior.responsibilities(torch.zeros(5, 4)).shape
    torch.Size([5, 10])
    """

    def __init__(
        self,
        components: int,
        size: int,
        *,
        weights: Tensor | None = None,
        means: Tensor | None = None,
        scales: Tensor | None = None,
        learned: bool = True,
    ) -> None:
        super().__init__()
        self.components, self.size = _positive(components, "components"), _positive(size, "size")
        weights = torch.ones(components) if weights is None else _shaped(weights, (components,), "weights")
        means = torch.randn(components, size) if means is None else _shaped(means, (components, size), "means")
        scales = torch.ones(components, size) if scales is None else _shaped(scales, (components, size), "scales")
        if not (weights > 0).all() or not (scales > 0).all():
            raise ValueError("weights and scales of a mixture must be positive")
        for name, value in (("logits", weights.log()), ("means", means), ("log_scales", scales.log())):
            if learned:
                self.register_parameter(name, nn.Parameter(value.clone()))
            else:
                self.register_buffer(name, value.clone())

    logits: Tensor
    means: Tensor
    log_scales: Tensor

    def forward(self) -> dist.Distribution:
        return distributions.GaussianMixture(dist.Categorical(logits=self.logits), self.component_distribution())

    def component_distribution(self) -> dist.Distribution:
        """Return the components N(μ_i, diag σ_i²), batch (components,), event (size,)."""
        return dist.Normal(self.means, self.log_scales.exp()).to_event(1)

    def responsibilities(self, u: Tensor) -> Tensor:
        """Return r_i(u) ∝ w_i N(u; μ_i, diag σ_i²).

        Args:
            u: (…, size).

        Returns:
            (…, components); each row sums to one.
        """
        log_joint = self.logits.log_softmax(-1) + self.component_distribution().log_prob(u.unsqueeze(-2))
        return log_joint.softmax(-1)


def _positive(value: int, name: str) -> int:
    if value < 1:
        raise ValueError(f"{name} is {value}; it must be at least 1")
    return value


def _shaped(value: Tensor, shape: tuple[int, ...], name: str) -> Tensor:
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(value.shape)}, expected {shape}")
    return value if value.is_floating_point() else value.to(torch.get_default_dtype())
