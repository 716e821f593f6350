"""Error bars against repetitions: they cover the truth as often as they say, or they are not given."""

from __future__ import annotations

import math

import numpy
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyro_vae as pv
from pyro_vae.distributions.linear_gaussian import linear_gaussian_posterior
from tests.predict.test_super_resolution import affine_srvae

# Super-resolution


def test_the_spread_of_few_draws_is_unbiased() -> None:
    pair, y = affine_srvae(), torch.rand(1, 1, 2, 2).expand(3000, 1, 2, 2)
    variance = pv.super_resolve(pair, y, num_samples=2, seed=0).spread.square()
    many = pv.super_resolve(pair, y[:1], num_samples=50_000, seed=1).spread.square()
    # A sample variance of two draws has a relative standard deviation of √2; divided by K it would be half the truth.
    assert ((variance.mean(0) / many - 1).abs().mean()) <= 4 * (2 / 3000) ** 0.5
    assert pv.super_resolve(pair, y[:1], num_samples=1, seed=0).spread.isnan().all()


def test_resampled_draws_follow_the_posterior_that_the_guide_misses() -> None:
    pair, y = affine_srvae(), torch.rand(1, 1, 2, 2) + 1
    high = pv.super_resolve(pair, y, num_samples=50_000, seed=0)
    layer = pair.p_y.network.layers[0]
    u = linear_gaussian_posterior(y.flatten(1), layer.weight, layer.bias, torch.tensor(0.6)).mean
    truth = pair.p_x(y, pair.p_z(y, u).mean).mean[0].detach()
    drawn = high.resample(20_000, seed=0)
    assert drawn.shape == (20_000, 1, 1, 4, 4)
    # The choices' own noise, and that of the weighted mean.
    error = high.spread[0] * (1 / 20_000 + 1 / float(high.ess)) ** 0.5
    assert ((drawn[:, 0].mean(0) - truth).abs() <= 4 * error).all()
    # The unweighted draws are others.
    assert ((high.samples[:, 0].mean(0) - truth).abs() > 6 * error).any()


# The inference gap


class Correlated(pv.Pair):
    """Two latents N(0, 1), and their sum seen with a noise that makes their posterior correlation −0.97."""

    # Posterior precision [[1 + c, c], [c, 1 + c]] has correlation −c/(1 + c).
    c = 0.97 / 0.03

    def __init__(self) -> None:
        super().__init__()
        self.x_shape = ()

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            b = pyro.sample("b", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(a + b, self.c**-0.5), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("a", dist.Normal(torch.zeros_like(x), 0.3))
            pyro.sample("b", dist.Normal(torch.zeros_like(x), 0.3))


class HeavyTailed(pv.Pair):
    """A latent with the tails of 2 degrees of freedom that x does not bear on, beside one that it does."""

    def __init__(self) -> None:
        super().__init__()
        self.x_shape = ()

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("a", dist.StudentT(2.0))
            b = pyro.sample("b", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(b, 1.0), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("a", dist.Normal(torch.zeros_like(x), 1.0))
            pyro.sample("b", dist.Normal(x / 2, 0.7))


def test_the_gap_of_a_correlated_posterior_is_covered() -> None:
    pair = Correlated()
    x = torch.linspace(-2, 2, 100)
    gap = pv.inference_gap(pair, x, num_particles=numpy.int64(1000), steps=250, seed=0)
    # −½ log(1 − ρ²): 1.414 nats at ρ = 0.97.
    truth = -0.5 * math.log(1 - 0.97**2)
    covered = int(((gap.approximation - truth).abs() <= 1.96 * gap.approximation_error + 1e-4).sum())
    # A binomial of 100 trials at 0.95 falls below 88 once in 500 times.
    assert covered >= 88
    assert (gap.approximation_error < 0.1).all()
    exact = dist.Normal(0.0, (2 + 1 / pair.c) ** 0.5).log_prob(x)
    assert ((gap.log_likelihood - exact).abs() < 0.02).all()


def test_the_gap_of_a_heavy_tailed_posterior_is_called_unknown_or_is_covered() -> None:
    pair, x = HeavyTailed(), torch.linspace(-2, 2, 60)
    gap = pv.inference_gap(pair, x, num_particles=1000, steps=200, seed=0)
    exact = dist.Normal(0.0, 2**0.5).log_prob(x)
    covered = (gap.log_likelihood - exact).abs() <= 1.96 * gap.approximation_error
    # Gaussian weights over such tails have no variance: most are flagged, and the others are close.
    assert gap.approximation_error.isinf().float().mean() > 0.5
    assert covered.float().mean() > 0.85
    assert "unknown" in repr(gap)
    assert "largest k̂" in repr(gap)


# Annealing


class Bimodal(pv.Pair):
    """z ~ N(0, 1), seen as z² ± 0.2: two modes, at ±√x, of which the guide knows one."""

    def __init__(self) -> None:
        super().__init__()
        self.x_shape = ()

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z.square(), 0.2), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.sqrt(), 0.1))


def bimodal_truth() -> float:
    """log p(x = 2) by quadrature."""
    grid = torch.linspace(-8, 8, 20_001)
    density = dist.Normal(0.0, 1.0).log_prob(grid) + dist.Normal(grid**2, 0.2).log_prob(torch.tensor(2.0))
    return float(torch.logsumexp(density, 0) + math.log(float(grid[1] - grid[0])))


@pytest.mark.parametrize("chains", [4, 16])
def test_annealing_covers_a_bimodal_posterior_or_says_it_does_not_know(chains: int) -> None:
    x = torch.full((1000,), 2.0)
    annealed = pv.annealed_log_likelihood(
        Bimodal(), x, num_temperatures=40, num_chains=numpy.int64(chains), leapfrog_steps=3, seed=1
    )
    misses = (annealed.per_datum - bimodal_truth()).abs() > 1.96 * annealed.standard_error
    known = annealed.standard_error.isfinite()
    # Four standard errors of a binomial share of 0.05 in 1000 trials.
    assert float(misses.double().mean()) <= 0.05 + 4 * (0.05 * 0.95 / 1000) ** 0.5
    # Sixteen chains mostly know their error; with four, most weight lies on one or two.
    assert float(known.double().mean()) > 0.8 if chains == 16 else not known.any()
    assert not annealed.disagrees.any()
    assert "effective chains" in repr(annealed)


def test_annealing_from_a_guide_that_misses_a_mode_says_so() -> None:
    x = torch.full((40,), 2.0)
    annealed = pv.annealed_log_likelihood(
        Bimodal(), x, start="guide", num_temperatures=100, num_chains=16, leapfrog_steps=3, seed=1
    )
    short = bimodal_truth() - annealed.per_datum
    # One of two equal modes: log 2 is missing.
    assert ((short - math.log(2)).abs() < 0.1).all()
    covered = short <= 1.96 * annealed.standard_error
    assert float(covered.double().mean()) > 0.8
    assert annealed.disagrees.any()
    assert annealed.mean_monte_carlo_error == math.inf
    assert "use start='prior'" in repr(annealed)


# Imputation


def test_an_imputation_states_its_effective_candidates_and_its_bias() -> None:
    pair, x = pv.models.LinearGaussianVAE(3, 1), torch.randn(2, 3)
    result = pv.impute(
        pair, x, torch.tensor([True, True, False]), num_samples=numpy.int64(4), num_particles=numpy.int64(8), seed=0
    )
    assert f"least {float(result.ess.min()):.1f}" in repr(result)
    assert "biased at finite K" in repr(result)
