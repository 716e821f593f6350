"""Draws of the guide, weighted and decoded, against exact posteriors."""

from __future__ import annotations

import pytest
import torch

import pyro_vae as pv
from pyro_vae.models import LinearGaussianVAE
from pyro_vae.runtime.memory import CountBytes
from tests.support.exact_draws import OffGuide, assert_moments, fixed, srvae


def test_reconstructions_have_the_posterior_predictive_mean() -> None:
    pair, x = fixed(LinearGaussianVAE(4, 2)), torch.randn(3, 4)
    back = pv.reconstruct(pair, x, num_particles=4000, seed=0)
    assert back.mean.shape == back.x.shape == (4000, 3, 4)
    exact = pair.exact_posterior(x)
    mean = exact.mean @ pair.weight.mT + pair.bias
    covariance = pair.weight @ exact.covariance_matrix[0] @ pair.weight.mT
    assert ((back.mean.mean(0) - mean).abs() <= 4 * (covariance.diagonal() / 4000).sqrt()).all()
    assert_moments(back.x[:, 1], mean[1], covariance + pair.scale() ** 2 * torch.eye(4))


def test_weights_turn_a_wrong_guides_draws_into_the_posteriors() -> None:
    pair, x = fixed(OffGuide(4, 2)), torch.randn(3, 4)
    draws = pv.posterior(pair, x, num_particles=5000, seed=0)
    z = draws.latents["z"]
    assert (z.shape, draws.log_weights.shape) == ((5000, 3, 2), (5000, 3))
    exact = pair.exact_posterior(x)
    weights = draws.log_weights.softmax(0).unsqueeze(-1)
    mean = (weights * z).sum(0)
    error = ((weights * (z - mean)) ** 2).sum(0).sqrt()
    assert ((mean - exact.mean).abs() <= 4 * error).all()
    # The draws alone are the guide's.
    plain = z.std(0) / 5000**0.5
    assert ((z.mean(0) - exact.mean - 0.2).abs() <= 4 * plain).all()


def test_point_masses_have_their_particles_too() -> None:
    pair, x = srvae(), torch.rand(3, 1, 4, 4)
    draws = pv.posterior(pair, x, num_particles=5, seed=0)
    shapes = {name: tuple(value.shape) for name, value in draws.latents.items()}
    assert shapes == {"u": (5, 3, 3), "y": (5, 3, 1, 2, 2), "z": (5, 3, 2)}
    assert torch.equal(draws.latents["y"][4], pair.down_scale(x))


def test_a_small_budget_draws_the_same_posterior_in_parts() -> None:
    pair, x = fixed(LinearGaussianVAE(4, 2)), torch.randn(7, 4)
    # What is returned does not count: 4000 draws of 7 data, two numbers and a weight each, take 672 kB.
    with CountBytes() as counter:
        drawn = pv.posterior(pair, x, num_particles=4000, memory=150_000, seed=0)
    assert drawn.latents["z"].shape == (4000, 7, 2)
    assert drawn.log_weights.shape == (4000, 7)
    assert counter.peak <= 150_000 + 2 * 672_000 + 10_000
    torch.testing.assert_close(drawn.log_weights, pair.exact_log_likelihood(x).expand(4000, 7), rtol=1e-10, atol=1e-10)
    exact = pair.exact_posterior(x)
    for i in range(7):
        assert_moments(drawn.latents["z"][:, i], exact.mean[i], exact.covariance_matrix[i])
    # No draw is repeated from one part to the next.
    assert len(drawn.latents["z"][:, 0, 0].unique()) == 4000


def test_too_small_a_budget_is_refused_with_one_that_works() -> None:
    pair, x, seen = LinearGaussianVAE(4, 2), torch.randn(3, 4), torch.ones(4, dtype=torch.bool)
    for use in (
        lambda memory: pv.posterior(pair, x, num_particles=3, memory=memory),
        lambda memory: pv.impute(pair, x, seen, num_samples=2, num_particles=3, sweeps=1, memory=memory),
    ):
        with pytest.raises(ValueError, match="raise it to") as error:
            use(10)
        use(int(str(error.value).split("raise it to ")[1].split()[0]))
    with pytest.raises(ValueError, match="one chain and its 3 candidates"):
        pv.impute(pair, x, seen, num_particles=3, memory=10)
    with pytest.raises(ValueError, match="num_particles is 0"):
        pv.posterior(pair, x, num_particles=0)
