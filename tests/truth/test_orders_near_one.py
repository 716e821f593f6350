"""Rényi bounds of orders near one, where the ELBO is their limit, beside fifty digits."""

from __future__ import annotations

from typing import Any

import mpmath
import pytest
import torch
from torch import Tensor

from pyro_vae.objectives.bounds import elbo, iwae, renyi
from pyro_vae.pair.terms import LogTerms

ORDERS = [1 + sign * step for step in (0.5, 0.1, 1e-2, 1e-4, 1e-8, 1e-12) for sign in (1, -1)]


def terms_of(log_weights: Tensor) -> LogTerms:
    nothing = torch.zeros_like(log_weights)
    return LogTerms(log_weights, nothing, nothing)


def exact(log_weights: list[float], alpha: float) -> tuple[float, list[float]]:
    """Return the bound of one datum and its slopes."""
    with mpmath.workdps(50):
        order = 1 - mpmath.mpf(alpha)
        powers = [mpmath.exp(order * mpmath.mpf(w)) for w in log_weights]
        total = mpmath.fsum(powers)
        return float(mpmath.log(total / len(powers)) / order), [float(power / total) for power in powers]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("alpha", ORDERS)
@pytest.mark.parametrize(("level", "spread"), [(-700.0, 1.0), (-9300.0, 40.0), (3.0, 1e-3), (0.0, 0.0)])
def test_values_and_slopes_are_exact(dtype: Any, alpha: float, level: float, spread: float) -> None:
    torch.manual_seed(0)
    log_weights = (level + spread * torch.randn(8, 3)).to(dtype).requires_grad_()
    value = renyi(alpha)(terms_of(log_weights))
    (slopes,) = torch.autograd.grad(value.sum(), log_weights)
    expected = [exact(column.tolist(), alpha) for column in log_weights.detach().double().mT]
    # Weights are exact inputs: what is left are a few roundings of numbers as large as they, and of their differences.
    eps = torch.finfo(dtype).eps
    bound = 8 * eps * float(log_weights.detach().abs().max() + 8 * spread)
    assert (value.double() - torch.tensor([v for v, _ in expected])).abs().max() <= bound
    # A slope is the exponential of up to r times a difference, which is rounded at the weights' size.
    relative = 8 * eps * (1 + abs(1 - alpha) * (abs(level) + 8 * spread))
    torch.testing.assert_close(slopes.double(), torch.tensor([g for _, g in expected]).mT, rtol=relative, atol=eps)


def test_single_precision_at_hundreds_of_nats_is_not_zero() -> None:
    # Of log (1/K) Σ w^(1 − α), here 7e-6, float32 keeps no digit beside log K.
    value = renyi(1 - 1e-8)(terms_of(torch.full((8, 1), -700.0, dtype=torch.float32)))
    assert float(value) == -700


@pytest.mark.parametrize("alpha", [0.5, 1 - 1e-9, 1 + 1e-9, 2.0])
def test_impossible_draws(alpha: float) -> None:
    log_weights = torch.tensor([[0.0, -torch.inf], [-torch.inf, -torch.inf], [1.0, -torch.inf]])
    value = renyi(alpha)(terms_of(log_weights))
    if alpha < 1:
        assert float(value[0]) == pytest.approx(exact_with_zeros([0.0, 1.0], 3, alpha), rel=1e-9)
    else:
        # One draw of weight zero has an infinite negative power.
        assert value[0] == -torch.inf
    assert value[1] == -torch.inf


def exact_with_zeros(log_weights: list[float], count: int, alpha: float) -> float:
    with mpmath.workdps(50):
        order = 1 - mpmath.mpf(alpha)
        return float(mpmath.log(mpmath.fsum(mpmath.exp(order * w) for w in log_weights) / count) / order)


def test_the_ends_are_the_named_bounds() -> None:
    terms = terms_of(torch.randn(6, 4) - 100)
    torch.testing.assert_close(renyi(1.0)(terms), elbo(terms), rtol=0, atol=0)
    # The importance-weighted bound sums the same weights in another order.
    torch.testing.assert_close(renyi(0.0)(terms), iwae(terms), rtol=1e-14, atol=0)
