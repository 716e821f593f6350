"""Error bars against repetitions: they cover the truth as often as they say, or they are not given."""

from __future__ import annotations

import torch

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
