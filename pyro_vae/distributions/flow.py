"""The distribution of a flow, and transforms that Pyro lacks."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from pyro.distributions import TransformModule, transforms
from torch import Tensor

__all__ = ["SCORING", "FlowDistribution", "NoInverseError", "Reversal", "Sylvester"]

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
