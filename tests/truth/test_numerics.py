"""Densities at extreme parameters against mpmath, in float32 and float64."""

from __future__ import annotations

from collections.abc import Iterator

import mpmath as mp
import pytest
import torch
from torch import Tensor
from torch.distributions import kl_divergence

import pyro_vae as pv
from pyro_vae.objectives.reconstruction import reconstruction

LOGITS = (-200.0, -60.0, -50.0, -20.0, -15.9, -1.0, -0.499, -1e-3, 0.0, 1e-20, 0.0041, 0.501, 8.0, 20.0, 50.0, 60.0)
POINTS = (0.0, 1e-7, 0.1, 0.5, 0.9, 1.0)
BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


@pytest.fixture(autouse=True)
def _digits() -> Iterator[None]:
    # e^200 has 87 digits: sums with it keep a few more.
    with mp.workdps(120):
        yield


def log_integral(logit: float) -> mp.mpf:
    """Return log ∫₀¹ e^{l t} dt."""
    return mp.log(mp.expm1(mp.mpf(logit)) / mp.mpf(logit)) if logit else mp.mpf(0)


def mean(logit: float) -> mp.mpf:
    return 1 / (1 - mp.exp(-mp.mpf(logit))) - 1 / mp.mpf(logit) if logit else mp.mpf(1) / 2


def variance(logit: float) -> mp.mpf:
    return 1 / mp.mpf(logit) ** 2 - 1 / (4 * mp.sinh(mp.mpf(logit) / 2) ** 2) if logit else mp.mpf(1) / 12


def cdf(logit: float, x: float) -> mp.mpf:
    return mp.expm1(mp.mpf(logit) * x) / mp.expm1(mp.mpf(logit)) if logit else mp.mpf(x)


def density(logit: Tensor) -> torch.distributions.Distribution:
    """Return the package's distribution of one pixel."""
    return pv.ContinuousBernoulli()(logit.unsqueeze(-1), (1,)).base_dist


def close(value: Tensor, exact: mp.mpf, roundings: int = 10) -> None:
    # Relative for numbers above one.
    tolerance = roundings * torch.finfo(value.dtype).eps
    assert abs(float(mp.mpf(value.item()) - exact)) <= tolerance * max(1.0, abs(float(exact)))


def test_one_pixel_at_logit_minus_twenty() -> None:
    value = density(torch.tensor(-20.0, dtype=torch.float32)).log_prob(torch.zeros(1, dtype=torch.float32))
    exact = -mp.log(mp.quad(lambda x: mp.exp(-20 * x), [0, 0.05, 0.2, 1]))
    assert float(exact) == pytest.approx(2.9957, abs=1e-4)
    close(value.squeeze(), exact)


@BOTH
@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("start", LOGITS)
def test_continuous_bernoulli_and_its_derivatives_at_a_point(start: float, point: float, dtype: torch.dtype) -> None:
    logit, x = torch.tensor(start, dtype=dtype, requires_grad=True), torch.tensor([point], dtype=dtype)
    of, at = logit.item(), mp.mpf(x.item())
    one = density(logit)
    log_prob = one.log_prob(x)
    (slope,) = torch.autograd.grad(log_prob, logit)
    close(log_prob.detach(), of * at - log_integral(of))
    close(slope, at - mean(of))
    close(one.cdf(x).detach(), cdf(of, at))
    quantile = one.icdf(x)
    (slope,) = torch.autograd.grad(quantile, logit)
    assert torch.isfinite(slope)
    exact = (of + mp.log(at + (1 - at) * mp.exp(-mp.mpf(of)))) / mp.mpf(of) if of else at
    close(quantile.detach(), exact)


@BOTH
@pytest.mark.parametrize("start", LOGITS)
def test_continuous_bernoulli_moments_entropy_and_divergence(start: float, dtype: torch.dtype) -> None:
    logit = torch.tensor(start, dtype=dtype, requires_grad=True)
    one, of = density(logit), logit.item()
    (slope,) = torch.autograd.grad(one.mean, logit, retain_graph=True)
    close(one.mean.detach(), mean(of))
    close(slope, variance(of))
    # At |l| = 1/2 the variance is a difference of two numbers 48 times as large.
    close((one.variance / float(variance(of))).detach(), mp.mpf(1), roundings=50)
    close(one.entropy().detach(), log_integral(of) - of * mean(of))
    for other in (-50.0, 0.0, 3.0, 60.0):
        exact = (of - other) * mean(of) - log_integral(of) + log_integral(other)
        close(kl_divergence(one, density(torch.tensor(other, dtype=dtype))).detach(), exact)


@BOTH
def test_continuous_bernoulli_in_its_site_and_in_its_closed_form(dtype: torch.dtype) -> None:
    logits = torch.tensor(LOGITS, dtype=dtype).unsqueeze(-1)
    for point in POINTS:
        x = torch.full((len(LOGITS), 1), point, dtype=dtype)
        event = pv.ContinuousBernoulli()(logits, (1,))
        # The closed form is a difference of numbers up to 200; one rounding there is 200 ε.
        tolerance = 2 * 200 * torch.finfo(dtype).eps
        torch.testing.assert_close(reconstruction(event, x), -event.log_prob(x), rtol=0, atol=tolerance)


def test_continuous_bernoulli_draws_have_its_mean() -> None:
    logits = torch.tensor([-60.0, -3.0, 0.1, 30.0], dtype=torch.float32, requires_grad=True)
    torch.manual_seed(0)
    few = density(logits).expand((4, 4))
    draws = few.rsample((10_000,))
    (slope,) = torch.autograd.grad(draws.sum(), logits)
    assert torch.isfinite(slope).all()
    exact = torch.tensor([float(mean(each)) for each in logits.tolist()])
    deviation = torch.tensor([float(mp.sqrt(variance(each))) for each in logits.tolist()])
    error = draws.detach().double().mean((0, 2)) - exact
    # 40 000 draws a logit; five standard errors.
    assert (error.abs() < 5 * deviation / 200).all()
