"""Error bars against repetitions: they cover the truth as often as they say, or they are not given."""

from __future__ import annotations

import math

import numpy
import pyro
import pyro.distributions as dist
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
