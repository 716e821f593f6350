"""High-resolution draws against exact conditionals."""

from __future__ import annotations

import pytest
import torch

import pyro_vae as pv
from pyro_vae.distributions.linear_gaussian import linear_gaussian_log_likelihood, linear_gaussian_posterior
from pyro_vae.models import SRVAE, VAE
from pyro_vae.networks.mlp import MLP
from tests.support.exact_draws import fixed, srvae


def affine_srvae() -> SRVAE:
    """An SRVAE whose conditionals are all affine, with constant scales and no trace of training."""
    y, u, z = (1, 2, 2), (3,), (2,)
    networks = {
        "q_u": MLP([y], 6, hidden=()),
        "p_y": MLP([u], 4, hidden=()),
        "p_z": MLP([y, u], 4, hidden=()),
        "p_x": MLP([y, z], 16, hidden=()),
    }
    prior = pv.StandardNormal(3)
    heads = pv.Gaussian(pv.FixedScale(0.3)), pv.Gaussian(pv.FixedScale(0.6))
    pair = fixed(SRVAE((1, 4, 4), 2, prior, "delta", *heads, z_size=2, networks=networks))
    # A wide q(u | y), so that its weights have a finite variance.
    networks["q_u"].layers[0].bias[3:] = 1.0
    networks["q_u"].layers[0].weight[3:] = 0.0
    return pair


def test_super_resolution_draws_from_the_model() -> None:
    pair, y = affine_srvae(), torch.rand(2, 1, 2, 2)
    high = pv.super_resolve(pair, y, num_samples=20_000, seed=0)
    assert high.samples.shape == high.means.shape == (20_000, 2, 1, 4, 4)
    assert high.spread.shape == (2, 1, 4, 4)
    assert (high.spread > 0).all()
    # Affine maps take means to means: u's, then z's, then x's.
    u = pair.q_u(y).mean
    expected = pair.p_x(y, pair.p_z(y, u).mean).mean
    error = high.spread / 20_000**0.5
    assert ((high.samples.mean(0) - expected).abs() <= 4 * error).all()
    torch.testing.assert_close(high.spread, high.samples.std(0))


def test_super_resolutions_weights_are_those_of_y() -> None:
    pair, y = affine_srvae(), torch.rand(2, 1, 2, 2)
    high = pv.super_resolve(pair, y, num_samples=20_000, seed=0)
    layer = pair.p_y.network.layers[0]
    flat, scale = y.flatten(1), torch.tensor(0.6)
    exact = linear_gaussian_log_likelihood(flat, layer.weight, layer.bias, scale)
    ratios = torch.exp(high.log_weights - exact)
    assert ratios.shape == (20_000, 2)
    assert ((ratios.mean(0) - 1).abs() <= 4 * ratios.std(0) / 20_000**0.5).all()
    # Weighted, the draws are of p(x | y), with u from its exact posterior.
    weights = high.log_weights.softmax(0)[..., None, None, None]
    mean = (weights * high.samples).sum(0)
    error = ((weights * (high.samples - mean)) ** 2).sum(0).sqrt()
    u = linear_gaussian_posterior(flat, layer.weight, layer.bias, scale).mean
    assert ((mean - pair.p_x(y, pair.p_z(y, u).mean).mean).abs() <= 4 * error).all()


@pytest.mark.parametrize("transition", ["delta", "gaussian", "discretised"])
def test_super_resolution_takes_every_reading(transition: str) -> None:
    pair = srvae(transition, pv.MixtureOfGaussians(2, 3))
    x = torch.randint(0, 17, (3, 1, 4, 4)) / 16
    high = pv.super_resolve(pair, pair.down_scale(x), num_samples=1, seed=0)
    assert high.samples.shape == (1, 3, 1, 4, 4)
    # One draw does not tell its spread.
    assert high.spread.isnan().all()
    assert torch.isfinite(high.log_weights).all()


def test_super_resolution_says_what_it_needs() -> None:
    with pytest.raises(ValueError, match="VAE has no low-resolution stage"):
        pv.super_resolve(VAE((1, 4, 4), pv.StandardNormal(2)), torch.zeros(2, 1, 2, 2), seed=0)
    with pytest.raises(ValueError, match=r"y has shape \(2, 1, 4, 4\); the pair's low resolution is \(1, 2, 2\)"):
        pv.super_resolve(srvae(), torch.zeros(2, 1, 4, 4), seed=0)
    with pytest.raises(ValueError, match="num_samples is 0"):
        pv.super_resolve(srvae(), torch.zeros(2, 1, 2, 2), num_samples=0, seed=0)


@pytest.mark.parametrize("bad", ["nan", "dtype", "empty"])
def test_super_resolution_refuses_bad_images(bad: str) -> None:
    y = torch.zeros(2, 1, 2, 2)
    y = {"nan": y / 0, "dtype": y.float(), "empty": y[:0]}[bad]
    with pytest.raises(ValueError, match="y "):
        pv.super_resolve(srvae(), y, seed=0)
