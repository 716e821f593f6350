"""New data have the exact moments; every draw follows its seed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import pyro_vae as pv
from pyro_vae.models import LinearGaussianVAE
from tests.support.exact_draws import assert_moments, fixed, marginal, srvae


def test_generated_data_have_the_exact_moments() -> None:
    pair = fixed(LinearGaussianVAE(4, 2))
    with torch.no_grad():
        pair.bias.copy_(torch.randn(4))
    new = pv.generate(pair, 20_000, seed=0)
    assert_moments(new.x, *marginal(pair))
    assert_moments(new.latents["z"], torch.zeros(2), torch.eye(2))
    torch.testing.assert_close(new.mean, new.latents["z"] @ pair.weight.mT + pair.bias)


def test_generated_latents_follow_a_mixture() -> None:
    prior = pv.MixtureOfGaussians(2, 3, weights=torch.tensor([1.0, 3.0]), scales=torch.full((2, 3), 0.5))
    u = pv.generate(fixed(srvae(prior=prior)), 20_000, seed=0).latents["u"]
    weights = torch.tensor([0.25, 0.75])
    mean = weights @ prior.means
    variance = 0.25 + weights @ (prior.means - mean) ** 2
    assert ((u.mean(0) - mean).abs() <= 4 * (variance / 20_000).sqrt()).all()


@pytest.mark.parametrize("transition", ["delta", "gaussian", "discretised"])
def test_generation_draws_every_site(transition: str) -> None:
    new = pv.generate(srvae(transition), 5, seed=0)
    assert (new.x.shape, new.mean.shape) == ((5, 1, 4, 4), (5, 1, 4, 4))
    assert {name: tuple(value.shape) for name, value in new.latents.items()} == {
        "u": (5, 3),
        "y": (5, 1, 2, 2),
        "z": (5, 2),
    }
    assert not any(value.requires_grad or value.is_inference() for value in (new.x, new.mean, *new.latents.values()))


def test_given_latents_stay_as_they_are() -> None:
    pair, y = srvae(), torch.rand(5, 1, 2, 2)
    new = pv.generate(pair, 5, given={"y": y}, seed=0)
    assert torch.equal(new.latents["y"], y)
    z = torch.randn(4, 2)
    linear = fixed(LinearGaussianVAE(3, 2))
    torch.testing.assert_close(pv.generate(linear, 4, given={"z": z}, seed=0).mean, z @ linear.weight.mT + linear.bias)


def test_what_cannot_be_generated_is_refused() -> None:
    pair = LinearGaussianVAE(3, 2)
    with pytest.raises(ValueError, match="num_samples is 0"):
        pv.generate(pair, 0, seed=0)
    with pytest.raises(ValueError, match=r"given names \['w'\]; the model's sites are \['x', 'z'\]"):
        pv.generate(pair, 2, given={"w": torch.zeros(2)}, seed=0)
    del pair.x_shape
    with pytest.raises(ValueError, match="states no x_shape"):
        pv.generate(pair, 2, seed=0)


@pytest.mark.parametrize(
    "draw",
    [
        lambda pair, x: pv.generate(pair, 3, seed=0).x,
        lambda pair, x: pv.reconstruct(pair, x, seed=0).x,
        lambda pair, x: pv.posterior(pair, x, seed=0).latents["u"],
        lambda pair, x: pv.super_resolve(pair, pair.down_scale(x), seed=0).samples,
        lambda pair, x: pv.impute(pair, x, x > 0.5, num_samples=2, sweeps=1, seed=0).samples,
    ],
    ids=["generate", "reconstruct", "posterior", "super_resolve", "impute"],
)
def test_draws_follow_their_seed_and_change_nothing(draw: Any) -> None:
    pair, x = srvae(), torch.rand(3, 1, 4, 4)
    x[:, 0, 0, 0] = 1.0
    state, rng = {n: v.clone() for n, v in pair.state_dict().items()}, torch.get_rng_state()
    first = draw(pair, x)
    assert torch.equal(rng, torch.get_rng_state())
    torch.rand(5)
    assert torch.equal(first, draw(pair, x))
    assert pair.training
    assert all(torch.equal(state[name], value) for name, value in pair.state_dict().items())
