"""Densities, divergences and flows at extreme parameters against mpmath and Jacobians, in float32 and float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import mpmath as mp
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import transforms
from torch import Tensor
from torch.distributions import kl_divergence

import pyro_vae as pv
from pyro_vae.distributions import DiscretisedLogistic, EqualMixture, OneHots, gaussian_entropy
from pyro_vae.distributions.kl import kl_diagonal, kl_full, kl_standard_normal
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


SCALES = (1e-6, 1e-3, 1.0, 1e3, 1e6)
SCALE = pytest.mark.parametrize("scale", SCALES)


def log_normal(x: Any, loc: Any, scale: Any) -> mp.mpf:
    return -((mp.mpf(x) - loc) ** 2) / (2 * mp.mpf(scale) ** 2) - mp.log(scale) - mp.log(2 * mp.pi) / 2


@BOTH
@pytest.mark.parametrize("logit", [-200.0, -50.0, -1.0, 0.0, 50.0, 200.0])
def test_bernoulli_pixels(logit: float, dtype: torch.dtype) -> None:
    pixel = pv.Bernoulli()(torch.tensor([[logit]], dtype=dtype), (1,))
    for x in (0.0, 1.0):
        found = pixel.log_prob(torch.tensor([[x]], dtype=dtype)).squeeze()
        close(found, x * mp.mpf(logit) - mp.log1p(mp.exp(logit)))


@BOTH
@SCALE
@pytest.mark.parametrize("distance", [0.0, 0.7, 30.0])
def test_gaussian_pixels_and_latents(distance: float, scale: float, dtype: torch.dtype) -> None:
    loc = torch.tensor([[0.25]], dtype=dtype)
    x = loc + distance * scale
    fixed = pv.Gaussian(pv.FixedScale(scale))
    density = fixed.to(dtype)(loc, (1,))
    gamma = density.base_dist.scale.flatten()[0]
    # (x − x̂)/γ is rounded once, and squared.
    exact = log_normal(x.item(), 0.25, gamma.item())
    close(density.log_prob(x).squeeze(), exact, roundings=20)
    entropy = gaussian_entropy(gamma, 1)
    close(entropy, (1 + mp.log(2 * mp.pi * mp.mpf(gamma.item()) ** 2)) / 2)


@BOTH
@SCALE
@pytest.mark.parametrize("other", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("mean", [0.0, 10.0])
def test_diagonal_divergences(mean: float, other: float, scale: float, dtype: torch.dtype) -> None:
    m, s, o = (torch.tensor([value], dtype=dtype) for value in (mean, scale, other))
    a, b = mp.mpf(s.item()), mp.mpf(o.item())
    exact = mp.log(b / a) + (a**2 + mp.mpf(mean) ** 2) / (2 * b**2) - mp.mpf(1) / 2
    close(kl_diagonal(m, s, torch.zeros_like(m), o), exact, roundings=20)
    close(kl_standard_normal(m, s), (a**2 + mp.mpf(mean) ** 2 - 1) / 2 - mp.log(a), roundings=20)
    full = kl_full(m, s.unsqueeze(-1), torch.zeros_like(m), o.unsqueeze(-1))
    close(full, exact, roundings=20)


@BOTH
@SCALE
@pytest.mark.parametrize("level", [0, 3, 250, 255])
def test_discretised_logistic_levels(level: int, scale: float, dtype: torch.dtype) -> None:
    loc, s = torch.tensor(0.4, dtype=dtype), torch.tensor(scale, dtype=dtype)
    found = DiscretisedLogistic(loc, s, 256).log_prob(torch.tensor(level / 255, dtype=dtype))
    m, width = mp.mpf(loc.item()), mp.mpf(s.item())

    def at(edge: float) -> mp.mpf:
        return (mp.mpf(edge) / 255 - m) / width

    # σ(b) − σ(a) = σ(b) σ(−a) (1 − e^{a − b}), which needs no more digits in the tails.
    exact = mp.mpf(0)
    if level < 255:
        exact -= mp.log1p(mp.exp(-at(level + 0.5)))
    if level > 0:
        exact -= mp.log1p(mp.exp(at(level - 0.5)))
    if 0 < level < 255:
        exact += mp.log(-mp.expm1(at(level - 0.5) - at(level + 0.5)))
    # Edges of a level lie at distances of 0.4 or 0.6 from the location: each is rounded, then divided by the scale.
    close(found, exact, roundings=20)


@BOTH
@SCALE
def test_mixtures_and_one_hot_rows(scale: float, dtype: torch.dtype) -> None:
    locs, s = torch.tensor([-10.0, 10.0], dtype=dtype), torch.tensor(scale, dtype=dtype)
    mixture = EqualMixture(dist.Normal(locs, s))
    x = torch.tensor(-10.0, dtype=dtype) + 0.5 * s
    parts = [log_normal(x.item(), loc, s.item()) for loc in (-10, 10)]
    exact = mp.log((mp.exp(parts[0]) + mp.exp(parts[1])) / 2)
    # x − loc is exact up to a rounding of 10, which the scale divides.
    slope = 10 * torch.finfo(dtype).eps / scale if scale < 1 else 0.0
    assert abs(float(mixture.log_prob(x)) - float(exact)) <= 20 * torch.finfo(dtype).eps * max(1, abs(exact)) + slope
    logits = torch.tensor([[0.0, 50.0, -50.0]], dtype=dtype)
    for i, logit in enumerate((0, 50, -50)):
        row = torch.eye(3, dtype=dtype)[i].unsqueeze(0)
        close(OneHots(logits).log_prob(row), logit - mp.log(1 + mp.exp(50) + mp.exp(-50)))


def layers(names: str) -> dict[str, Callable[[], Any]]:
    return {name: getattr(transforms, name) for name in names.split()}


LAYERS = {
    **layers("affine_coupling affine_autoregressive spline spline_coupling spline_autoregressive householder planar"),
    **layers("radial neural_autoregressive block_autoregressive polynomial batchnorm"),
    "Sylvester": lambda size: pv.Sylvester(size, 2),
    "Reversal": pv.Reversal,
}
CONDITIONAL = layers(
    "conditional_planar conditional_radial conditional_spline conditional_householder conditional_affine_coupling "
    "conditional_affine_autoregressive conditional_neural_autoregressive conditional_spline_autoregressive"
)
# Pyro adds 1e-8 or 1e-6 to a slope in these, which leaves their determinants off by as much, a hundred times over.
OFFSETS = {name: 3e-4 for name in LAYERS if "polynomial" in name}
OFFSETS |= {name: 1e-5 for name in (*LAYERS, *CONDITIONAL) if "neural" in name or "block" in name}


@BOTH
@pytest.mark.parametrize("norm", [0.1, 1.0, 3.0, 10.0])
@pytest.mark.parametrize("name", [*LAYERS, *CONDITIONAL])
def test_a_flows_volume_is_that_of_its_jacobian(name: str, norm: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    size, context = 3, 2
    layer = CONDITIONAL[name](size, context) if name in CONDITIONAL else LAYERS[name](size)
    for parameter in layer.parameters():
        new = torch.randn_like(parameter)
        parameter.data.copy_(norm * new / new.norm())
    layer.to(dtype).eval()
    flow = layer.condition(torch.randn(context).to(dtype)) if name in CONDITIONAL else layer
    x = torch.randn(size).to(dtype).requires_grad_()
    y = flow(x)
    reported = flow.log_abs_det_jacobian(x, y).detach().sum().double()
    jacobian = torch.stack([torch.autograd.grad(entry, x, retain_graph=True)[0] for entry in y]).double()
    # Rounding of an entry moves log |det| by the condition number.
    rounding = 100 * torch.finfo(dtype).eps * float(torch.linalg.cond(jacobian))
    if "spline" in name:
        # It divides by the widths of its bins, a thousandth at the least.
        rounding *= 1000
    exact = float(torch.linalg.slogdet(jacobian)[1])
    assert float(reported) == pytest.approx(exact, rel=0, abs=rounding + OFFSETS.get(name, 0.0))
    assert math.isfinite(exact)
