"""The continuous Bernoulli, exact at every logit."""

from __future__ import annotations

from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.kl import register_kl

__all__ = ["ContinuousBernoulli"]

# Below this |l|, power series replace quotients: these lose digits as 1/l, their derivatives as 1/l².
SMALL = 0.5
# log (sinh(l/2)/(l/2)) = Σ_n B_2n l^2n / (2n (2n)!), to l¹⁴: the next term is 1e-17 at |l| = ½.
SERIES = (
    1 / 24,
    -1 / 2880,
    1 / 181440,
    -1 / 9676800,
    1 / 479001600,
    -691 / 15692092416000,
    1 / 1046139494400,
)


class ContinuousBernoulli(dist.ContinuousBernoulli):
    """Put the density e^{l x} / ∫₀¹ e^{l t} dt on [0, 1].

    log p(x) = x l − log((e^l − 1)/l)

    Use it in place of torch's class, which clamps σ(l): float32 densities there are wrong from |l| = 16 on.

    Args:
        logits: l, any shape.

    Reference:
        Loaiza-Ganem and Cunningham (2019), The continuous Bernoulli, NeurIPS.

    >>> density = ContinuousBernoulli(torch.tensor([-20.0, 0.0, 60.0]))
    >>> density.log_prob(torch.tensor([0.0, 0.5, 1.0]))
    tensor([2.9957, 0.0000, 4.0943])
    >>> density.mean
    tensor([0.0500, 0.5000, 0.9833])
    """

    arg_constraints: ClassVar = {"logits": constraints.real}

    def __init__(self, logits: Tensor, validate_args: bool | None = None) -> None:
        super().__init__(logits=logits, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> ContinuousBernoulli:
        new = self._get_checked_instance(ContinuousBernoulli, _instance)
        return super().expand(batch_shape, new)

    @property
    def probs(self) -> Tensor:
        """σ(l), not clamped."""
        return torch.sigmoid(self.logits)

    @property
    def mean(self) -> Tensor:
        small, near, far = self._split()
        # The distance of the mean from the end where the mode is.
        distance = 1 / far + torch.exp(-far) / torch.expm1(-far)
        return torch.where(small, 0.5 + near * _slope(near**2), torch.where(self.logits > 0, 1 - distance, distance))

    @property
    def variance(self) -> Tensor:
        small, near, far = self._split()
        return torch.where(small, _curvature(near**2), 1 / far**2 - torch.exp(-far) / torch.expm1(-far) ** 2)

    def entropy(self) -> Tensor:
        small, near, far = self._split()
        square = near**2
        distance = 1 / far + torch.exp(-far) / torch.expm1(-far)
        return torch.where(
            small, _power(square) - square * _slope(square), far * distance - torch.log(far / -torch.expm1(-far))
        )

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        small, near, far = self._split()
        # From the end where the mode is: no difference of two large numbers.
        away = torch.where(self.logits > 0, 1 - value, value)
        steep = torch.log(far / -torch.expm1(-far)) - far * away
        return torch.where(small, near * (value - 0.5) - _power(near**2), steep)

    def cdf(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        small, near, far = self._split(_flat(self.logits))
        ratio = torch.expm1(-far * value) / torch.expm1(-far)
        steep = torch.where(self.logits > 0, torch.exp(-far * (1 - value)) * ratio, ratio)
        bend = value * (value - 1) / 2
        return torch.where(small, value + near * bend * (1 + near * (2 * value - 1) / 6), steep)

    def icdf(self, value: Tensor) -> Tensor:
        small, near, far = self._split(_flat(self.logits))
        # The quantile's distance from the end where the mode is.
        steep, up = ~small & (far >= 1), self.logits > 0
        tail = torch.where(up, 1 - value, value)
        mild = -torch.log1p(tail * torch.expm1(-torch.where(steep, 1.0, far)))
        below, above = torch.log(value), torch.log1p(-value)
        spread = torch.where(
            steep, -torch.logaddexp(torch.where(up, below, above), torch.where(up, above, below) - far), mild
        )
        away = spread / far
        bend = value * (1 - value) / 2
        flat = value + near * bend * (1 + near * (1 - 2 * value) / 3)
        return torch.where(small, flat, torch.where(up, 1 - away, away)).clamp(0, 1)

    def _log_normalizer(self, x: Tensor) -> Tensor:
        small, near, far = _split(x, SMALL)
        steep = torch.relu(x) - torch.log(far / -torch.expm1(-far))
        return torch.where(small, near / 2 + _power(near**2), steep)

    def _split(self, limit: float = SMALL) -> tuple[Tensor, Tensor, Tensor]:
        return _split(self.logits, limit)


def _split(logits: Tensor, limit: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return where |l| is small, l there and |l| elsewhere; each is harmless where the other counts."""
    small = logits.abs() < limit
    return small, torch.where(small, logits, 0.0), torch.where(small, 1.0, logits.abs())


def _flat(logits: Tensor) -> float:
    # A series to l² errs by l³/192, the derivative of the quotient by ε/l.
    return float(torch.finfo(logits.dtype).eps ** 0.25)


def _power(square: Tensor) -> Tensor:
    """Return log (sinh(l/2)/(l/2)) of l²."""
    return _polynomial(square, SERIES) * square


def _slope(square: Tensor) -> Tensor:
    """Return the first derivative of :func:`_power` by l, over l."""
    return _polynomial(square, [(2 * n) * c for n, c in enumerate(SERIES, 1)])


def _curvature(square: Tensor) -> Tensor:
    """Return the second derivative of :func:`_power` by l."""
    return _polynomial(square, [(2 * n) * (2 * n - 1) * c for n, c in enumerate(SERIES, 1)])


def _polynomial(x: Tensor, coefficients: Any) -> Tensor:
    *rest, total = coefficients
    for coefficient in reversed(rest):
        total = total * x + coefficient
    return total


@register_kl(ContinuousBernoulli, ContinuousBernoulli)
def _kl(p: ContinuousBernoulli, q: ContinuousBernoulli) -> Tensor:
    # From the end of q's mode: −E_p log q keeps its digits at any logits.
    small, near, far = q._split()
    mean, other = p.mean, ContinuousBernoulli(-p.logits, validate_args=False).mean
    away = torch.where(q.logits > 0, other, mean)
    steep = far * away - torch.log(far / -torch.expm1(-far))
    cross = torch.where(small, _power(near**2) - near * (mean - 0.5), steep)
    return cross - p.entropy()
