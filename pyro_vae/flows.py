"""Normalising flows in posteriors and priors: Pyro's transforms as layers of a guide's head, or of a prior.

    z = f_T(… f_1(z₀) …),   log q(z) = log q₀(z₀) − Σ_t log |det ∂f_t / ∂z_{t−1}|

A layer is one of Pyro's modules, ``pyro.distributions.transforms``: a ``TransformModule`` with parameters of its own,
such as ``affine_coupling(20)``, or a ``ConditionalTransformModule``, such as ``conditional_planar(20, 16)``, whose
parameters a network gives for each datum. Every call builds its transforms afresh around the modules' parameters, so
that nothing of one draw is kept for another.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from types import MethodType
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import ConditionalTransformModule, TransformModule, transforms
from torch import Tensor, nn
from torch.distributions import Transform

from pyro_vae.conditionals import DiagonalGaussian, Head, StandardNormal

__all__ = ["FlowDistribution", "FlowPosterior", "FlowPrior", "NoInverseError", "Reversal", "Sylvester"]

# Pyro's constructors of flows that score any point, each checked against quadrature in the tests.
SCORING = (
    "affine_coupling",
    "affine_autoregressive",
    "spline_coupling",
    "spline",
    "householder",
)


class NoInverseError(ValueError, NotImplementedError):
    """A point is to be scored under a flow that can only score its own draws."""


class FlowDistribution(dist.TransformedDistribution):
    """A base distribution under a flow; a flow without an inverse scores its own draws only, and says so.

    Raises:
        NoInverseError: from ``log_prob``, for another point than the latest draw under such a flow.
    """

    def log_prob(self, value: Tensor) -> Tensor:
        try:
            return super().log_prob(value)
        except (KeyError, NotImplementedError) as error:
            names = ", ".join(
                dict.fromkeys(type(part).__name__.removeprefix("Conditioned") for part in self.transforms)
            )
            raise NoInverseError(
                f"a flow of {names} has no inverse in closed form: it scores its own draws, not other points; flows "
                f"that score any point are those of {', '.join(SCORING)}"
            ) from error


class _Flow(nn.ModuleList):
    """Layers of a flow on vectors, from the base outwards."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        for layer in layers:
            if not isinstance(layer, (TransformModule, ConditionalTransformModule)):
                raise ValueError(
                    f"{type(layer).__name__} is no module of pyro.distributions.transforms: pass layers such as "
                    "affine_coupling(size) or conditional_planar(size, context)"
                )
        super().__init__(layers)

    def transforms(self, context: Tensor | None = None) -> list[Transform]:
        """Return new transforms around the layers' parameters, those of conditional layers at the context."""
        return [
            layer.condition(context) if isinstance(layer, ConditionalTransformModule) else _fresh(layer)
            for layer in self
        ]


def _fresh(layer: Any) -> Any:
    """Return a transform that shares the layer's parameters but not what it remembers of its latest draw.

    A memory would tie one density to another's draw, and no recording of a step could follow it.
    """
    new = copy.copy(layer)
    for name, value in vars(layer).items():
        if isinstance(value, MethodType) and value.__self__ is layer:
            # Some transforms keep one of their own methods as an attribute.
            vars(new)[name] = MethodType(value.__func__, new)
    parts = {name: _fresh(part) if isinstance(part, Transform) else part for name, part in layer._modules.items()}
    vars(new)["_modules"] = parts
    return new


class FlowPosterior(Head):
    """Return N(μ, diag σ²) under a flow, over a vector: a guide's head.

    Args:
        layers: Pyro's transform modules, from the Gaussian outwards; none leaves the Gaussian as it is.
        context: how many numbers of the network's output the conditional layers see.

    Raises:
        ValueError: for layers that are no transform modules, and conditional ones without a context.

    Reference:
        Rezende and Mohamed (2015), Variational inference with normalizing flows, ICML.

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
    """Return N(0, I) under a flow, over (size,): a prior, which must score points that it did not draw.

    An autoregressive layer is turned round, so that its density takes one pass and its draws ``size`` of them: affine
    ones then make a masked autoregressive flow.

    Args:
        size: L.
        layers: Pyro's transform modules, from N(0, I) outwards.

    Raises:
        ValueError: for a flow that has no inverse, with those that have; for conditional layers, and layers made for
            another size.

    Reference:
        Dinh, Sohl-Dickstein and Bengio (2017), Density estimation using Real NVP, ICLR; Papamakarios, Pavlakou and
        Murray (2017), Masked autoregressive flow for density estimation, NeurIPS.

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


class Reversal(transforms.Permute, TransformModule):
    """Reverse the entries of a vector, so that the next coupling moves those that this one left.

    It is Pyro's ``Permute`` with its order kept as a buffer.

    >>> Reversal(3)(torch.tensor([1.0, 2.0, 3.0]))
    tensor([3., 2., 1.])
    """

    def __init__(self, size: int) -> None:
        order = torch.arange(size - 1, -1, -1)
        super().__init__(order)
        del self.permutation
        self.register_buffer("permutation", order)


class Sylvester(transforms.Sylvester):
    """Bend space along the columns of an orthogonal Q: z ↦ z + Q Rᵀ tanh(Sᵀ Qᵀ z + b), R and S upper triangular.

    log |det| = Σ_i log(1 + tanh′(·)_i R_ii S_ii)

    Parameters and Householder reflections are Pyro's. Its own map multiplies by Qᵀ and Q on the other sides, where this
    determinant does not hold: its densities are off by tenths of a nat where R and S are of order one.

    Reference:
        Van den Berg, Hasenclever, Tomczak and Welling (2018), Sylvester normalizing flows for variational inference,
        UAI.

    >>> flow, z = Sylvester(3, 2), torch.randn(5, 3)
    >>> flow.log_abs_det_jacobian(z, flow(z)).shape
    torch.Size([5])
    """

    def _call(self, x: Tensor) -> Tensor:
        q, r, s = self.Q(x), self.R(), self.S()
        bent = torch.tanh(x @ (q @ s) + self.b)
        self._cached_logDetJ = torch.log1p((1 - bent**2) * r.diagonal() * s.diagonal()).sum(-1)
        return x + bent @ (r @ q.mT)

    def Q(self, x: Tensor) -> Tensor:  # noqa: N802 - Pyro's name
        # Pyro's takes the identity in the default type and on the CPU whatever its parameters are.
        eye = torch.eye(self.input_dim, dtype=x.dtype, device=x.device)
        q = eye
        for u in self.u():
            q = q @ (eye - 2 * torch.outer(u, u))
        return q
