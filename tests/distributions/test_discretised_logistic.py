"""Masses that sum to one, log-densities against references of another origin, and supports that refuse."""

from __future__ import annotations

import decimal
import math
from decimal import Decimal

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import biject_to

from pyro_vae.distributions.batch_optimal import BatchOptimalNormal
from pyro_vae.distributions.discretised_logistic import DiscretisedLogistic, on_grid
from pyro_vae.distributions.mixtures import GaussianMixture

ROUNDING = {"rtol": 1e-10, "atol": 1e-12}


def grid(levels: int) -> Tensor:
    """Return the values 0, 1/(levels − 1), …, 1."""
    return torch.arange(levels) / (levels - 1)


def exact_log_mass(index: int, loc: float, scale: float, levels: int) -> float:
    """Return log[σ(b) − σ(a)] with 200 digits, in which the difference of two nearly equal numbers is harmless."""
    with decimal.localcontext() as context:
        context.prec = 200
        top = Decimal(levels - 1)

        def cdf(edge: Decimal) -> Decimal:
            return 1 / (1 + (-(edge / top - Decimal(loc)) / Decimal(scale)).exp())

        half = Decimal("0.5")
        above = Decimal(1) if index == levels - 1 else cdf(index + half)
        below = Decimal(0) if index == 0 else cdf(index - half)
        return float((above - below).ln())


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_discretised_logistic_sums_to_one(levels: int) -> None:
    loc = torch.tensor([-0.3, 0.0, 0.4, 1.0, 1.7]).unsqueeze(-1)
    for scale in (1e-3, 0.05, 0.5, 20.0):
        mass = DiscretisedLogistic(loc, torch.tensor(scale), levels).log_prob(grid(levels)).exp()
        # 256 roundings of numbers whose exponents have been rounded too: below 1e-12.
        torch.testing.assert_close(mass.sum(-1), torch.ones(5), rtol=0, atol=1e-12)


@pytest.mark.parametrize("levels", [2, 17, 256])
@pytest.mark.parametrize(("loc", "scale"), [(0.3, 0.005), (-0.4, 0.01), (1.4, 0.01), (0.5, 0.08), (0.5, 30.0)])
def test_discretised_logistic_equals_a_reference_of_200_digits(levels: int, loc: float, scale: float) -> None:
    # With the first three the farthest level is 140 scales off, where σ(b) − σ(a) in float64 would be zero.
    found = DiscretisedLogistic(torch.tensor(loc), torch.tensor(scale), levels).log_prob(grid(levels))
    expected = torch.tensor([exact_log_mass(k, loc, scale, levels) for k in range(levels)])
    assert torch.isfinite(found).all()
    # An argument of 140 carries a rounding error of 1e-14 or so into the logarithm.
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("side", [-1, 1])
def test_discretised_logistic_has_exponential_tails_with_finite_slopes(side: int) -> None:
    scale = torch.tensor(0.002, requires_grad=True)
    value = torch.tensor(8 / 16)
    loc = (value + side * 40 * scale.detach()).requires_grad_()
    log_mass = DiscretisedLogistic(loc, scale, levels=17).log_prob(value)
    slope, scale_slope = torch.autograd.grad(log_mass, (loc, scale))
    # The nearest edge is half a level, 15.6 scales, closer: 24.4 scales off the logistic is e^{−|·|/s} up to e^{−24}.
    torch.testing.assert_close(slope, -side / scale.detach(), **ROUNDING)
    torch.testing.assert_close(scale_slope, (40 - 1 / (32 * scale.detach())) / scale.detach(), **ROUNDING)


def test_discretised_logistic_gradient_is_finite_at_every_level_and_far_outside() -> None:
    for loc_value in (-5.0, 0.0, 0.5, 1.0, 6.0):
        loc = torch.tensor(loc_value, requires_grad=True)
        scale = torch.tensor(1e-3, requires_grad=True)
        for log_mass in DiscretisedLogistic(loc, scale, levels=17).log_prob(grid(17)):
            for gradient in torch.autograd.grad(log_mass, (loc, scale), retain_graph=True):
                assert torch.isfinite(gradient)


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_discretised_logistic_mean_is_the_sum_over_levels(levels: int) -> None:
    pmf = DiscretisedLogistic(torch.tensor([-0.2, 0.3, 0.9]), torch.tensor([0.3, 0.02, 0.1]), levels)
    values = grid(levels).unsqueeze(-1)
    torch.testing.assert_close(pmf.mean, (values * pmf.log_prob(values).exp()).sum(0), **ROUNDING)


def test_discretised_logistic_samples_with_its_own_frequencies() -> None:
    pmf = DiscretisedLogistic(torch.tensor(0.3), torch.tensor(0.1), levels=17)
    draws = pmf.sample((100_000,))
    assert pmf.support.check(draws).all()
    frequency = torch.bincount((draws * 16).round().long(), minlength=17) / len(draws)
    mass = pmf.log_prob(grid(17)).exp()
    assert (mass * len(draws) > 25).all(), "the normal approximation needs some 25 draws at every level"
    standard_error = (mass * (1 - mass) / len(draws)).sqrt()
    assert ((frequency - mass).abs() <= 4 * standard_error).all()


def test_discretised_logistic_refuses_values_off_its_grid() -> None:
    pmf = DiscretisedLogistic(torch.tensor(0.5), torch.tensor(0.1), levels=17)
    for value in (0.5 / 16, -1 / 16, 17 / 16, 0.51):
        assert not on_grid(17).check(torch.tensor(value))
        with pytest.raises(ValueError, match="support"):
            pmf.log_prob(torch.tensor(value))
    with pytest.raises(ValueError, match="levels is 1"):
        DiscretisedLogistic(torch.tensor(0.5), torch.tensor(0.1), levels=1)
    with pytest.raises(ValueError, match="scale"):
        DiscretisedLogistic(torch.tensor(0.5), torch.tensor(-0.1), levels=17, validate_args=True)


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_grid_takes_every_float32_level(levels: int) -> None:
    assert on_grid(levels).check(torch.arange(levels, dtype=torch.float32) / (levels - 1)).all()
    assert on_grid(levels).is_discrete


def test_discretised_logistic_expands_without_changing_its_mass() -> None:
    pmf = DiscretisedLogistic(torch.tensor([0.2, 0.7]), torch.tensor(0.1), levels=17)
    wide = pmf.expand((3, 2))
    value = grid(17)[torch.randint(17, (3, 2))]
    assert wide.batch_shape == (3, 2)
    assert wide.sample().shape == (3, 2)
    torch.testing.assert_close(wide.log_prob(value), pmf.log_prob(value), rtol=0, atol=0)
    with pytest.raises(ValueError, match="support"):
        wide.log_prob(value + 0.5 / 16)


def test_gaussian_mixture_log_density_is_the_log_of_the_weighted_sum() -> None:
    weights = torch.tensor([0.2, 0.5, 0.3])
    means, scales, u = torch.randn(3, 2), torch.rand(3, 2) + 0.5, torch.randn(6, 2)
    mixture = GaussianMixture(dist.Categorical(probs=weights), dist.Normal(means, scales).to_event(1))
    squares = ((u.unsqueeze(1) - means) / scales) ** 2
    densities = (torch.exp(-squares / 2) / (scales * math.sqrt(2 * math.pi))).prod(-1)
    torch.testing.assert_close(mixture.log_prob(u), (densities @ weights).log(), **ROUNDING)


def test_gaussian_mixture_support_is_the_whole_space() -> None:
    mixture = GaussianMixture(
        dist.Categorical(logits=torch.zeros(3)), dist.Normal(torch.zeros(3, 2), torch.ones(3, 2)).to_event(1)
    )
    # What Hamiltonian samplers ask of a site: a continuous support over the event and its bijection from ℝⁿ.
    assert not mixture.support.is_discrete
    assert mixture.support.event_dim == 1
    u = torch.randn(4, 2)
    assert mixture.support.check(u).tolist() == [True] * 4
    assert not mixture.support.check(torch.tensor([0.0, math.nan]))
    torch.testing.assert_close(biject_to(mixture.support)(u), u, rtol=0, atol=0)


def test_batch_optimal_normal_is_the_normal_at_the_best_scale_and_records_it() -> None:
    loc, value, recorded = torch.randn(6, 3), torch.randn(6, 3), []
    log_density = BatchOptimalNormal(loc, floor=1e-3, record=recorded.append).log_prob(value)
    variance = ((value - loc) ** 2).mean() + 1e-6
    torch.testing.assert_close(log_density, dist.Normal(loc, variance.sqrt()).log_prob(value), **ROUNDING)
    assert len(recorded) == 1
    torch.testing.assert_close(recorded[0], variance, **ROUNDING)
    assert not recorded[0].requires_grad


def test_batch_optimal_normal_beats_every_other_common_scale() -> None:
    loc, value = torch.randn(6, 3), torch.randn(6, 3)
    best = BatchOptimalNormal(loc, floor=0.0, record=lambda _: None).log_prob(value).sum()
    scale = ((value - loc) ** 2).mean().sqrt()
    for ratio in (0.5, 0.9, 0.99, 1.01, 1.1, 2.0):
        assert dist.Normal(loc, ratio * scale).log_prob(value).sum() < best


def test_batch_optimal_normal_stays_finite_at_a_perfect_fit() -> None:
    loc = torch.randn(6, 3)
    log_density = BatchOptimalNormal(loc, floor=1e-3, record=lambda _: None).log_prob(loc)
    expected = torch.full((6, 3), -0.5 * math.log(2 * math.pi * 1e-6))
    torch.testing.assert_close(log_density, expected, **ROUNDING)
