"""Draws from a pair against exact moments and conditionals."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyro_vae as pv
from pyro_vae.distributions.linear_gaussian import linear_gaussian_log_likelihood, linear_gaussian_posterior
from pyro_vae.models import SRVAE, VAE, LinearGaussianMixtureVAE, LinearGaussianVAE
from pyro_vae.networks.mlp import MLP
from pyro_vae.runtime.memory import CountBytes


class OffGuide(LinearGaussianVAE):
    """Probabilistic PCA with a guide off in place and scale."""

    def guide(self, x: Tensor) -> None:
        exact = self.exact_posterior(x)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(exact.mean + 0.2, 1.4 * exact.stddev).to_event(1))


def fixed(pair: Any) -> Any:
    """Keep parameters out of the graph, so that exact values are plain numbers."""
    return pair.requires_grad_(False)


def marginal(pair: LinearGaussianVAE) -> tuple[Tensor, Tensor]:
    size = len(pair.bias)
    return pair.bias, pair.weight @ pair.weight.mT + pair.scale() ** 2 * torch.eye(size)


def assert_moments(x: Tensor, mean: Tensor, covariance: Tensor) -> None:
    """Hold the mean and covariance of Gaussian draws (N, D) within 4 of their standard errors."""
    variance = covariance.diagonal()
    assert ((x.mean(0) - mean).abs() <= 4 * (variance / len(x)).sqrt()).all()
    # Wishart: var S_ij = (Σ_ii Σ_jj + Σ_ij²) / (N − 1).
    error = ((variance.unsqueeze(-1) * variance + covariance**2) / (len(x) - 1)).sqrt()
    assert ((torch.cov(x.mT) - covariance).abs() <= 4 * error).all()


def srvae(transition: Any = "delta", prior: Any = None) -> SRVAE:
    return SRVAE((1, 4, 4), 2, prior or pv.StandardNormal(3), transition, levels=17, z_size=2)


# Generation


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


# Reconstruction and posterior


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


# Super-resolution


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
    torch.testing.assert_close(high.spread, high.samples.std(0, correction=0))


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
    assert high.spread.eq(0).all()
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


# Imputation


@pytest.mark.parametrize("kind", [LinearGaussianVAE, OffGuide])
def test_imputations_have_the_exact_conditional_moments(kind: type[LinearGaussianVAE]) -> None:
    pair = fixed(kind(5, 2, scale=0.8))
    with torch.no_grad():
        pair.weight.copy_(0.6 * torch.randn(5, 2))
        pair.bias.copy_(torch.randn(5))
    x, seen = torch.randn(1, 5), torch.tensor([True, False, True, True, False])
    hidden = torch.where(seen, x, torch.tensor(math.nan))
    # Each sweep keeps at most the share of z's variance that x explains, below 0.75 here: 0.75²⁰ is 0.003 of a scale.
    result = pv.impute(pair, hidden, seen, num_samples=20_000, num_particles=8, sweeps=20, seed=0)
    assert result.samples.shape == (20_000, 1, 5)
    assert not result.approximate
    mean, covariance = marginal(pair)
    gain = covariance[~seen][:, seen] @ torch.linalg.inv(covariance[seen][:, seen])
    conditional = mean[~seen] + gain @ (x[0, seen] - mean[seen])
    assert_moments(
        result.samples[:, 0, ~seen], conditional, covariance[~seen][:, ~seen] - gain @ covariance[seen][:, ~seen]
    )
    assert torch.equal(result.samples[..., seen], x[:, seen].expand(20_000, 1, 3))


def test_imputation_keeps_what_is_seen() -> None:
    x = torch.rand(3, 1, 4, 4)
    mask = torch.rand(3, 1, 4, 4) < 0.5
    mask[:, 0, 0, 0] = True
    result = pv.impute(
        srvae("gaussian"), torch.where(mask, x, torch.tensor(math.nan)), mask, num_samples=4, sweeps=2, seed=0
    )
    assert result.samples.shape == (4, 3, 1, 4, 4)
    assert torch.equal(torch.where(mask, result.samples, 0.0), torch.where(mask, x, 0.0).expand(4, 3, 1, 4, 4))
    assert torch.isfinite(result.samples).all()
    assert result.ess.shape == (3,)
    assert ((result.ess >= 1) & (result.ess <= 64)).all()
    assert not result.approximate
    assert pv.impute(srvae("delta"), x, mask, num_samples=2, sweeps=1, seed=0).approximate


def test_nothing_missing_changes_nothing() -> None:
    pair, x = LinearGaussianVAE(4, 2), torch.randn(3, 4)
    result = pv.impute(pair, x, torch.ones(3, 4, dtype=torch.bool), num_samples=2, num_particles=7, sweeps=1, seed=0)
    assert torch.equal(result.samples, x.expand(2, 3, 4))
    # Every weight of the exact posterior is the same.
    torch.testing.assert_close(result.ess, torch.full((3,), 7.0))


def test_imputation_takes_discrete_sites() -> None:
    pair, x = LinearGaussianMixtureVAE(4, pv.MixtureOfGaussians(3, 2)), torch.randn(3, 4)
    mask = torch.tensor([True, True, False, False])
    result = pv.impute(pair, x, mask, num_samples=2, num_particles=5, sweeps=2, seed=0)
    assert torch.equal(result.samples[..., :2], x[:, :2].expand(2, 3, 2))


def test_imputation_says_what_is_wrong() -> None:
    pair, x = LinearGaussianVAE(4, 2), torch.randn(3, 4)
    seen = torch.ones(4, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"mask is torch.float64 of shape \(4,\); it must be boolean"):
        pv.impute(pair, x, seen.double(), seed=0)
    with pytest.raises(ValueError, match=r"mask is torch.bool of shape \(3,\)"):
        pv.impute(pair, x, seen[:3], seed=0)
    with pytest.raises(ValueError, match="at least 1"):
        pv.impute(pair, x, seen, num_particles=0, seed=0)
    with pytest.raises(ValueError, match="NaN"):
        pv.impute(pair, x / 0, seen, seed=0)


def test_imputation_of_everything_is_generation() -> None:
    pair, chains = LinearGaussianVAE(3, 2), 20_000
    unseen = torch.zeros(1, 3, dtype=torch.bool)
    samples = pv.impute(
        pair, torch.full((1, 3), torch.nan), unseen, num_samples=chains, num_particles=8, seed=0
    ).samples[:, 0]
    variances = (pair.weight.detach() ** 2).sum(-1) + float(pair.scale().detach()) ** 2
    assert ((samples.mean(0) - pair.bias.detach()).abs() < 4 * (variances / chains).sqrt()).all()
    # A Gaussian's sample variance has relative standard error √(2/S).
    assert ((samples.var(0) / variances - 1).abs() < 4 * (2 / chains) ** 0.5).all()


def test_imputation_needs_a_likelihood_that_factorises() -> None:
    class Joint(LinearGaussianVAE):
        def model(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                zero = torch.zeros_like(self.weight[0])
                z = pyro.sample("z", dist.Normal(zero, torch.ones_like(zero)).to_event(1))
                noise = torch.eye(4) + 0.5
                pyro.sample("x", dist.MultivariateNormal(z @ self.weight.mT + self.bias, noise), obs=x)

    with pytest.raises(
        ValueError, match="site 'x' has a MultivariateNormal likelihood: impute needs one that factorises"
    ):
        pv.impute(Joint(4, 2), torch.randn(3, 4), torch.tensor([True, True, True, False]), sweeps=1, seed=0)


# What is left


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


# Memory


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


def test_a_small_budget_imputes_the_same_conditional_in_parts() -> None:
    pair, x = fixed(LinearGaussianVAE(3, 1)), torch.randn(1, 3)
    mask = torch.tensor([True, True, False])
    settings: dict[str, Any] = {"num_samples": 2000, "num_particles": 8, "sweeps": 20}
    with CountBytes() as counter:
        result = pv.impute(pair, x, mask, **settings, memory=1_200_000, seed=0)
    # Beside a chunk there are the chains' data, their masks, what is drawn of them and weights, and copies of those.
    assert counter.peak <= 1_200_000 + 2000 * 8 * (6 * 3 + 4 * 8)
    mean, covariance = marginal(pair)
    gain = covariance[2, :2] @ torch.linalg.inv(covariance[:2, :2])
    samples = result.samples[:, 0]
    assert torch.equal(samples[:, :2], x[:, :2].expand(2000, 2))
    expected, variance = mean[2] + gain @ (x[0, :2] - mean[:2]), covariance[2, 2] - gain @ covariance[:2, 2]
    assert_moments(samples[:, 2:], expected[None], variance[None, None])
    assert len(samples[:, 2].unique()) == 2000


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


def test_a_seeded_imputation_repeats_and_shares_nothing_with_the_next_seed() -> None:
    pair, x, seen = fixed(LinearGaussianVAE(4, 2)), torch.randn(2, 4), torch.zeros(4, dtype=torch.bool)
    settings: dict[str, Any] = {"num_samples": 5, "num_particles": 4, "sweeps": 0}
    first, again, following = (pv.impute(pair, x, seen, **settings, seed=seed).samples for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.isclose(first.flatten()[:, None], following.flatten()).any()
