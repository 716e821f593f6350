"""Modules that return distributions: priors, likelihoods, and the guides' conditionals."""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from pyro_vae import distributions
from pyro_vae.scales import LearnedScale, Scale

__all__ = [
    "Bernoulli",
    "Conditional",
    "ContinuousBernoulli",
    "DiagonalGaussian",
    "DiscretisedLogistic",
    "FreeGaussian",
    "FullGaussian",
    "Gaussian",
    "Head",
    "MixtureOfGaussians",
    "StandardNormal",
]

# A guide's scale never falls below this: float32 log-densities of a narrower Gaussian lose their digits.
SMALLEST_GUIDE_SCALE = 1e-4


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
        weights, means, scales: starting values, (components,), (components, size), (components, size); without them
            equal weights, means drawn from N(0, I), unit scales.
        learned: whether the three are parameters; else they stay as given.

    Raises:
        ValueError: for values of another shape, weights that are not positive, scales that are not positive.

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
            (…, components), each row sums to one.
        """
        log_joint = self.logits.log_softmax(-1) + self.component_distribution().log_prob(u.unsqueeze(-2))
        return log_joint.softmax(-1)


class Head(nn.Module, abc.ABC):
    """Turn a network's outputs into a distribution over an event."""

    @abc.abstractmethod
    def num_outputs(self, event_shape: Sequence[int]) -> int:
        """Return how many numbers the network must produce for one event."""

    @abc.abstractmethod
    def forward(self, outputs: Tensor, event_shape: Sequence[int]) -> Any:
        """Return the distribution with batch shape (…) for outputs (…, num_outputs) or (…, k C, H, W)."""


def _blocks(outputs: Tensor, event_shape: Sequence[int], count: int) -> tuple[Tensor, ...]:
    """Split outputs, flat or images with ``count`` blocks of channels, into tensors of the event's shape."""
    event_shape = tuple(event_shape)
    image = (count * event_shape[0], *event_shape[1:])
    if tuple(outputs.shape[-len(image) :]) == image:
        batch = outputs.shape[: -len(image)]
    elif outputs.shape[-1] == count * math.prod(event_shape):
        batch = outputs.shape[:-1]
    else:
        raise ValueError(
            f"the network returns shape {tuple(outputs.shape)}; its last dimensions must be "
            f"{count * math.prod(event_shape)} numbers or {image}"
        )
    return outputs.reshape(*batch, count, *event_shape).unbind(len(batch))


class Bernoulli(Head):
    """Return Π Bernoulli(x; σ(l)) for data in {0, 1}."""

    def num_outputs(self, event_shape: Sequence[int]) -> int:
        return math.prod(event_shape)

    def forward(self, outputs: Tensor, event_shape: Sequence[int]) -> Any:
        (logits,) = _blocks(outputs, event_shape, 1)
        return dist.Bernoulli(logits=logits).to_event(len(event_shape))


class ContinuousBernoulli(Head):
    """Return Π ContinuousBernoulli(x; σ(l)) for data in [0, 1].

    Reference:
        Loaiza-Ganem and Cunningham (2019), The continuous Bernoulli, NeurIPS.
    """

    def num_outputs(self, event_shape: Sequence[int]) -> int:
        return math.prod(event_shape)

    def forward(self, outputs: Tensor, event_shape: Sequence[int]) -> Any:
        (logits,) = _blocks(outputs, event_shape, 1)
        return dist.ContinuousBernoulli(logits=logits).to_event(len(event_shape))


class Gaussian(Head):
    """Return N(x; x̂, γ² I), the decoder noise γ fixed, learned or batch-optimal.

    Args:
        scale: a :class:`FixedScale`, :class:`LearnedScale` (the default) or :class:`BatchOptimalScale`.
    """

    def __init__(self, scale: Scale | None = None) -> None:
        super().__init__()
        self.scale = LearnedScale() if scale is None else scale

    def num_outputs(self, event_shape: Sequence[int]) -> int:
        return math.prod(event_shape)

    def forward(self, outputs: Tensor, event_shape: Sequence[int]) -> Any:
        (loc,) = _blocks(outputs, event_shape, 1)
        return self.scale.normal(loc).to_event(len(event_shape))


class DiscretisedLogistic(Head):
    """Return a logistic's mass on the data's own gray levels, location and scale from the network.

    Args:
        levels: number of equally spaced levels from 0 to 1: 256 for 8-bit images, 17 for scikit-learn's digits.
    """

    def __init__(self, levels: int) -> None:
        super().__init__()
        if levels < 2:
            raise ValueError(f"levels is {levels}; a discretised likelihood needs at least 2")
        self.levels = levels

    def num_outputs(self, event_shape: Sequence[int]) -> int:
        return 2 * math.prod(event_shape)

    def forward(self, outputs: Tensor, event_shape: Sequence[int]) -> Any:
        loc, raw = _blocks(outputs, event_shape, 2)
        # Scales start near a tenth of the gray range and cannot fall below a tenth of a level's width, where the mass
        # on the nearest level is already 0.99.
        scale = 0.15 * softplus(raw) + 0.1 / (self.levels - 1)
        return distributions.DiscretisedLogistic(loc + 0.5, scale, self.levels).to_event(len(event_shape))


class DiagonalGaussian(Head):
    """Return N(μ, diag σ²) over a vector."""

    def num_outputs(self, event_shape: Sequence[int]) -> int:
        return 2 * math.prod(event_shape)

    def forward(self, outputs: Tensor, event_shape: Sequence[int]) -> Any:
        loc, raw = _blocks(outputs, event_shape, 2)
        return dist.Normal(loc, softplus(raw) + SMALLEST_GUIDE_SCALE).to_event(len(event_shape))


class FullGaussian(Head):
    """Return N(b, A Aᵀ) over a vector, z = b + A ε with A lower triangular and its diagonal positive."""

    def num_outputs(self, event_shape: Sequence[int]) -> int:
        (size,) = event_shape
        return size + size * (size + 1) // 2

    def forward(self, outputs: Tensor, event_shape: Sequence[int]) -> Any:
        (size,) = event_shape
        if outputs.shape[-1] != self.num_outputs(event_shape):
            raise ValueError(
                f"the network returns shape {tuple(outputs.shape)}; its last dimension must be "
                f"{self.num_outputs(event_shape)}"
            )
        loc, entries = outputs[..., :size], outputs[..., size:]
        rows, columns = torch.tril_indices(size, size, device=outputs.device)
        entries = torch.where(rows == columns, softplus(entries) + SMALLEST_GUIDE_SCALE, entries)
        flat = entries.new_zeros(*entries.shape[:-1], size * size).index_copy(-1, rows * size + columns, entries)
        return dist.MultivariateNormal(loc, scale_tril=flat.unflatten(-1, (size, size)))


class Conditional(nn.Module):
    """Return p(event | context) = head(network(context)).

    Args:
        network: maps the context to ``head.num_outputs(event_shape)`` numbers.
        head: what distribution they parametrise.
        event_shape: shape of one event.

    >>> conditional = Conditional(nn.Linear(3, 8), DiagonalGaussian(), (4,))
    >>> conditional(torch.zeros(5, 3)).batch_shape, conditional(torch.zeros(5, 3)).event_shape
    (torch.Size([5]), torch.Size([4]))
    """

    def __init__(self, network: nn.Module, head: Head, event_shape: Sequence[int]) -> None:
        super().__init__()
        self.network, self.head, self.event_shape = network, head, tuple(event_shape)

    def forward(self, *context: Tensor) -> Any:
        return self.head(self.network(*context), self.event_shape)


class FreeGaussian(nn.Module):
    """Return q(z | i) = N(μ_i, diag σ_i²), parameters of its own for every training datum i: no amortisation.

    The datum's index is a condition of the pair: train with ``fit(pair, (x, torch.arange(len(x))))``.

    Args:
        num_data: N.
        size: event size.

    >>> FreeGaussian(100, 4)(torch.zeros(2, 7), torch.tensor([3, 99])).event_shape
    torch.Size([4])
    """

    def __init__(self, num_data: int, size: int) -> None:
        super().__init__()
        self.num_data = num_data
        self.loc = nn.Parameter(torch.zeros(num_data, size))
        self.raw_scale = nn.Parameter(torch.zeros(num_data, size))

    def forward(self, x: Tensor, index: Tensor | None = None) -> Any:
        if index is None:
            raise ValueError(
                "a FreeGaussian guide has parameters per training datum: pass the data as (x, torch.arange(len(x)))"
            )
        try:
            loc, raw_scale = self.loc[index], self.raw_scale[index]
        except IndexError as error:
            raise ValueError(f"the guide has parameters for data 0 to {self.num_data - 1}: {error}") from error
        return dist.Normal(loc, softplus(raw_scale) + SMALLEST_GUIDE_SCALE).to_event(1)


def _positive(value: int, name: str) -> int:
    if value < 1:
        raise ValueError(f"{name} is {value}; it must be at least 1")
    return value


def _shaped(value: Tensor, shape: tuple[int, ...], name: str) -> Tensor:
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(value.shape)}, expected {shape}")
    return value if value.is_floating_point() else value.to(torch.get_default_dtype())
