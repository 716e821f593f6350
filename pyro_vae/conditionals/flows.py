"""Normalising flows in posteriors and priors, with Pyro's transforms as layers.

    z = f_T(… f_1(z₀) …),   log q(z) = log q₀(z₀) − Σ_t log |det ∂f_t / ∂z_{t−1}|

A layer is a module of ``pyro.distributions.transforms``. A ``TransformModule``, e.g. ``affine_coupling(20)``, has
parameters. A ``ConditionalTransformModule``, e.g. ``conditional_planar(20, 16)``, takes them from a network for each
datum. Every call builds new transforms around the modules' parameters: they cache nothing between draws.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from types import MethodType
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import ConditionalTransformModule, TransformModule
from torch import Tensor, nn
from torch.distributions import Transform

from pyro_vae.conditionals.conditional import Head
from pyro_vae.conditionals.posteriors import DiagonalGaussian
from pyro_vae.conditionals.priors import StandardNormal
from pyro_vae.distributions.flow import FlowDistribution, NoInverseError

__all__ = ["FlowPosterior", "FlowPrior"]


class _Flow(nn.ModuleList):
    """Layers of a flow on vectors, in order from the base."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        for layer in layers:
            if not isinstance(layer, (TransformModule, ConditionalTransformModule)):
                raise ValueError(
                    f"{type(layer).__name__} is no module of pyro.distributions.transforms: pass layers such as "
                    "affine_coupling(size) or conditional_planar(size, context)"
                )
        super().__init__(layers)

    def transforms(self, context: Tensor | None = None) -> list[Transform]:
        """Return new transforms around the layers' parameters; conditional layers take the context."""
        return [
            layer.condition(context) if isinstance(layer, ConditionalTransformModule) else _fresh(layer)
            for layer in self
        ]


def _fresh(layer: Any) -> Any:
    """Return a transform that shares the layer's parameters, but not its cache of the latest draw.

    A cache would tie one density to another draw, and a captured step could not replay it.
    """
    new = copy.copy(layer)
    for name, value in vars(layer).items():
        if isinstance(value, MethodType) and value.__self__ is layer:
            # Some transforms store a bound method as an attribute.
            vars(new)[name] = MethodType(value.__func__, new)
    parts = {name: _fresh(part) if isinstance(part, Transform) else part for name, part in layer._modules.items()}
    vars(new)["_modules"] = parts
    return new


class FlowPosterior(Head):
    """Return N(μ, diag σ²) under a flow, over a vector: a guide's head.

    Args:
        layers: Pyro's transform modules, in order from the Gaussian; none gives the Gaussian.
        context: number of network outputs for the conditional layers.

    Raises:
        ValueError: for layers that are no transform modules, and conditional layers without a context.

    Reference:
        Rezende and Mohamed (2015), Variational inference with normalizing flows, ICML.

    >>> from pyro.distributions import transforms
    >>> head = FlowPosterior([transforms.conditional_planar(3, 4) for _ in range(2)], context=4)
    >>> head.num_outputs((3,)), head(torch.zeros(5, 10), (3,)).rsample().shape
    (10, torch.Size([5, 3]))
    """

    def __init__(self, layers: Sequence[nn.Module], context: int = 0) -> None:
        super().__init__()
        self.flow, self.context = _Flow(layers), context
        if context < 0:
            raise ValueError(f"context is {context}; it counts outputs of the network and must be at least 0")
        if context == 0 and any(isinstance(layer, ConditionalTransformModule) for layer in layers):
            raise ValueError("a conditional layer needs a context: pass context, the size that the layer was made for")

    def num_outputs(self, event_shape: Sequence[int]) -> int:
        return DiagonalGaussian().num_outputs(event_shape) + self.context

    def forward(self, outputs: Tensor, event_shape: Sequence[int]) -> Any:
        if outputs.shape[-1] != self.num_outputs(event_shape):
            raise ValueError(
                f"the network returns shape {tuple(outputs.shape)}; its last dimension must be "
                f"{self.num_outputs(event_shape)}"
            )
        size = outputs.shape[-1] - self.context
        base = DiagonalGaussian()(outputs[..., :size], event_shape)
        parts = self.flow.transforms(outputs[..., size:])
        return FlowDistribution(base, parts) if parts else base


class FlowPrior(nn.Module):
    """Return N(0, I) under a flow, over (size,): a prior.

    A prior scores points that it did not draw, and needs layers with an inverse. An autoregressive layer is inverted:
    its density then takes one pass, a draw ``size`` passes. Affine ones make a masked autoregressive flow.

    Args:
        size: L.
        layers: Pyro's transform modules, in order from N(0, I).

    Raises:
        ValueError: for a layer without an inverse, naming layers that have one; for conditional layers, and layers of
            another size.

    Reference:
        Dinh, Sohl-Dickstein and Bengio (2017), Density estimation using Real NVP, ICLR; Papamakarios, Pavlakou and
        Murray (2017), Masked autoregressive flow for density estimation, NeurIPS.

    >>> from pyro.distributions import transforms
    >>> from pyro_vae.distributions import Reversal
    >>> prior = FlowPrior(4, [transforms.affine_coupling(4), Reversal(4), transforms.affine_coupling(4)])
    >>> prior().log_prob(torch.zeros(5, 4)).shape
    torch.Size([5])
    """

    def __init__(self, size: int, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.base, self.flow, self.size = StandardNormal(size), _Flow(layers), size
        if any(isinstance(layer, ConditionalTransformModule) for layer in layers):
            raise ValueError("a prior has no context: use layers that are not conditional, such as affine_coupling")
        with torch.no_grad():
            point = torch.zeros(1, size, dtype=next((p.dtype for p in self.parameters()), None))
            try:
                self().log_prob(point)
            except NoInverseError as error:
                raise ValueError(f"not to be used as a prior: {error}") from error
            except (RuntimeError, IndexError) as error:
                raise ValueError(
                    f"a layer of the prior's flow does not take vectors of size {size}: {error}"
                ) from error

    def forward(self) -> dist.Distribution:
        parts = [part.inv if getattr(part, "autoregressive", False) else part for part in self.flow.transforms()]
        return FlowDistribution(self.base(), parts) if parts else self.base()
