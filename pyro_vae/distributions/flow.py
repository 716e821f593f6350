"""The distribution of a flow, and transforms that Pyro lacks."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from pyro.distributions import TransformModule, transforms
from torch import Tensor

__all__ = ["SCORING", "FlowDistribution", "NoInverseError", "Reversal", "Sylvester"]

# Pyro's constructors of flows that score any point. Tests check each against quadrature.
SCORING = (
    "affine_coupling",
    "affine_autoregressive",
    "spline_coupling",
    "spline",
    "householder",
)


class NoInverseError(ValueError, NotImplementedError):
    """Raised for a point under a flow that can score only its latest draws."""


class FlowDistribution(dist.TransformedDistribution):
    """A base distribution under a flow.

    Raises:
        NoInverseError: from ``log_prob``, for a flow without an inverse, at a point other than its latest draw.
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


class Reversal(transforms.Permute, TransformModule):
    """Reverse the entries of a vector: the next coupling then moves the half that the last one left.

    It is Pyro's ``Permute`` with the order as a buffer.

    >>> Reversal(3)(torch.tensor([1.0, 2.0, 3.0]))
    tensor([3., 2., 1.])
    """

    def __init__(self, size: int) -> None:
        order = torch.arange(size - 1, -1, -1)
        super().__init__(order)
        del self.permutation
        self.register_buffer("permutation", order)


class Sylvester(transforms.Sylvester):
    """Bend space along the columns of an orthogonal Q.

    z ↦ z + Q Rᵀ tanh(Sᵀ Qᵀ z + b),   log |det| = Σ_i log(1 + tanh′(·)_i R_ii S_ii),   R and S upper triangular

    Parameters and Householder reflections are those of Pyro's ``Sylvester``. Pyro's map has Q and Qᵀ on the other
    sides, and this determinant does not hold for it: for R and S of order one, densities are off by tenths of a nat.

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
        # Pyro's identity has the default dtype and is on the CPU, unlike the parameters.
        eye = torch.eye(self.input_dim, dtype=x.dtype, device=x.device)
        q = eye
        for u in self.u():
            q = q @ (eye - 2 * torch.outer(u, u))
        return q
