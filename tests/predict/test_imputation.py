"""Completed data against exact conditionals."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyro_vae as pv
from pyro_vae.models import LinearGaussianMixtureVAE, LinearGaussianVAE
from pyro_vae.runtime.memory import CountBytes
from tests.support.exact_draws import OffGuide, assert_moments, fixed, marginal, srvae


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


def test_a_seeded_imputation_repeats_and_shares_nothing_with_the_next_seed() -> None:
    pair, x, seen = fixed(LinearGaussianVAE(4, 2)), torch.randn(2, 4), torch.zeros(4, dtype=torch.bool)
    settings: dict[str, Any] = {"num_samples": 5, "num_particles": 4, "sweeps": 0}
    first, again, following = (pv.impute(pair, x, seen, **settings, seed=seed).samples for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.isclose(first.flatten()[:, None], following.flatten()).any()
