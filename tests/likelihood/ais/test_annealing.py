"""Annealing against exact log-likelihoods: values, unbiasedness, bounds from both sides, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.likelihood.ais.hmc import HMC
from pyro_vae.likelihood.ais.path import AnnealingPath
from pyro_vae.likelihood.ais.temperatures import geometric_schedule, sigmoidal_schedule
from pyro_vae.models import VAE, LinearGaussianVAE, LinearTwoStageVAE
from tests.support.repetitions import repetitions

ROUNDING = {"rtol": 1e-9, "atol": 1e-9}


class BadGuide(LinearGaussianVAE):
    """Probabilistic PCA with a guide that is far from the posterior and much too narrow."""

    def guide(self, x: Tensor) -> None:
        exact = self.exact_posterior(x)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(exact.mean + 4 * exact.stddev, 0.1 * exact.stddev).to_event(1))


class VeryWide(LinearGaussianVAE):
    """Probabilistic PCA with a guide wider than the posterior and off its mean."""

    def guide(self, x: Tensor) -> None:
        exact = self.exact_posterior(x)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(exact.mean + exact.stddev, 3 * exact.stddev).to_event(1))


class Sites(pv.Pair):
    """Two scalar sites, one of them in a plate of its own, all observed through Gaussians."""

    max_plate_nesting = 2

    def __init__(self) -> None:
        super().__init__()
        self.x_shape = (3,)

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(0.5, 1.0))
            with pyro.plate("parts", 3, dim=-2):
                b = pyro.sample("b", dist.Normal(a, 0.6))
                pyro.sample("x", dist.Normal(b, 0.5), obs=x.mT)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("a", dist.Normal(x.mean(-1), 0.7))
            with pyro.plate("parts", 3, dim=-2):
                pyro.sample("b", dist.Normal(x.mT, 0.7))

    def exact_log_likelihood(self, x: Tensor) -> Tensor:
        covariance = torch.ones(3, 3) + (0.6**2 + 0.5**2) * torch.eye(3)
        return dist.MultivariateNormal(torch.full((3,), 0.5), covariance).log_prob(x)


class HalfFixed(pv.Pair):
    """u → y → x where the guide fixes y = x / 2."""

    def __init__(self) -> None:
        super().__init__()
        self.x_shape = ()

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            u = pyro.sample("u", dist.Normal(0.0, 1.0))
            y = pyro.sample("y", dist.Normal(u, 0.5))
            pyro.sample("x", dist.Normal(y, 0.5), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("u", dist.Normal(0.3 * x, 0.6))
            pyro.sample("y", dist.Delta(x / 2))

    def exact_log_likelihood(self, x: Tensor) -> Tensor:
        return dist.Normal(0.0, 1.25**0.5).log_prob(x / 2) + dist.Normal(x / 2, 0.5).log_prob(x)


def exact(pair: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        return pair.exact_log_likelihood(x)


def test_annealing_is_right_where_the_guide_is_useless() -> None:
    pair, x = BadGuide(3, 2), torch.randn(4, 3)
    truth = exact(pair, x)
    importance = pv.log_likelihood(pair, x, num_particles=1000, seed=0, proposal="guide").per_datum
    assert (truth - importance > 1).all()
    annealed = pv.annealed_log_likelihood(pair, x, num_chains=400, leapfrog_steps=4, seed=0)
    assert annealed.num_temperatures == 1000
    assert ((annealed.per_datum - truth).abs() <= 0.05).all()
    # A fifth of the tolerance, so that it is not met by luck.
    assert (annealed.standard_error < 0.02).all()


def test_from_an_exact_guide_every_chain_is_exact() -> None:
    # log q(z) + β log p(x) is then every density on the way.
    pair, x = LinearGaussianVAE(5, 2), torch.randn(4, 5)
    annealed = pv.annealed_log_likelihood(pair, x, start="guide", num_temperatures=12, num_chains=3, leapfrog_steps=2)
    torch.testing.assert_close(annealed.per_datum, exact(pair, x), **ROUNDING)
    torch.testing.assert_close(annealed.ess, torch.full((4,), 3.0), **ROUNDING)


@pytest.mark.parametrize("schedule", [geometric_schedule, sigmoidal_schedule])
@pytest.mark.parametrize("start", ["prior", "guide"])
@pytest.mark.parametrize("make", [lambda: LinearGaussianVAE(3, 2), Sites, HalfFixed])
def test_the_mean_weight_is_the_likelihood(make: Any, start: Any, schedule: Any) -> None:
    pair, repeats = make(), 2000
    x = torch.randn(1, *pair.x_shape).expand(repeats, *pair.x_shape)
    annealed = pv.annealed_log_likelihood(
        pair, x, start=start, schedule=schedule, num_temperatures=15, num_chains=1, leapfrog_steps=3, seed=0
    )
    ratios = torch.exp(annealed.per_datum - exact(pair, x[:1]))
    assert abs(float(ratios.mean()) - 1) <= 4 * float(ratios.std()) / repeats**0.5 + 1e-9
    # Below log p(x) in the mean, by Jensen.
    gaps = ratios.log()
    assert float(gaps.mean()) <= 4 * float(gaps.std()) / repeats**0.5 + 1e-9


def test_more_temperatures_come_closer() -> None:
    pair, x = LinearGaussianVAE(4, 3), torch.randn(1, 4).expand(500, 4)
    gaps = []
    for size in (2, 8, 32):
        annealed = pv.annealed_log_likelihood(pair, x, num_temperatures=size, num_chains=1, seed=0)
        gaps.append(float((exact(pair, x) - annealed.per_datum).mean()))
    assert gaps[0] > 1.5 * gaps[1] > 1.5**2 * gaps[2] > 0


def test_one_temperature_is_the_naive_estimate() -> None:
    pair, x = LinearGaussianVAE(3, 2), repetitions(torch.randn(1, 3), 4000)
    annealed = pv.annealed_log_likelihood(pair, x, num_temperatures=1, num_chains=2, seed=0).per_datum
    naive = pv.naive_log_likelihood(pair, x, num_particles=2, seed=1).per_datum
    assert abs(annealed.mean() - naive.mean()) <= 4 * math.hypot(float(annealed.std()), float(naive.std())) / 4000**0.5


def test_the_standard_error_is_the_spread_of_repeated_estimates() -> None:
    pair, repeats = LinearGaussianVAE(3, 2), 300
    x = torch.randn(1, 3).expand(repeats, 3)
    annealed = pv.annealed_log_likelihood(pair, x, num_temperatures=20, num_chains=100, leapfrog_steps=3, seed=0)
    claimed = float((annealed.standard_error**2).mean().sqrt())
    # As for importance sampling: a standard deviation of n values, and the delta method's bias of order 1/C.
    assert abs(float(annealed.per_datum.std()) / claimed - 1) <= 4 * (2 * repeats) ** -0.5 + 2 / 100


def test_moves_leave_the_posterior_as_it_is() -> None:
    pair, x = LinearGaussianVAE(3, 2), torch.randn(1, 3)
    posterior, chains = pair.exact_posterior(x), 4000
    with torch.no_grad():
        path = AnnealingPath(pair, (x,), chains, "prior")
        sampler = HMC(path, 3)
        state = sampler.at(posterior.sample((chains,)))
        before = state.z
        for _ in range(5):
            state = sampler.move(state, 1.0, torch.full((1,), 0.4))
        white = torch.linalg.solve_triangular(
            posterior.scale_tril, (state.z - posterior.mean).unsqueeze(-1), upper=False
        ).squeeze(-1)[:, 0]
        # They have moved, and some were refused.
        assert (state.z - before).abs().mean() > 0.1
        assert 0.5 < float(sampler.acceptance) < 0.999
    error = chains**-0.5
    assert (white.mean(0).abs() <= 4 * error).all()
    torch.testing.assert_close(white.mT @ white / chains, torch.eye(2), rtol=0, atol=4 * 2**0.5 * error)


@pytest.mark.parametrize("scale", [0.5, 0.1])
def test_step_sizes_are_tuned_to_the_posterior(scale: float) -> None:
    pair, x = LinearGaussianVAE(6, 4, scale=scale), torch.randn(5, 6)
    annealed = pv.annealed_log_likelihood(pair, x, num_temperatures=300, leapfrog_steps=5, seed=0)
    assert ((annealed.acceptance > 0.55) & (annealed.acceptance < 0.75)).all()


@pytest.mark.parametrize("schedule", [geometric_schedule, sigmoidal_schedule])
@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_schedules_rise_from_nought_to_one(schedule: Any, size: int) -> None:
    betas = schedule(size)
    assert betas.shape == (size + 1,)
    assert (betas[0], betas[-1]) == (0, 1)
    assert (betas.diff() > 0).all()


# From both sides


@pytest.mark.parametrize("start", ["prior", "guide"])
def test_the_truth_lies_between_the_bounds(start: Any) -> None:
    pair = VeryWide(3, 2)
    bounds = pv.bidirectional_log_likelihood(
        pair, 200, start=start, num_temperatures=30, num_chains=2, leapfrog_steps=3, seed=1
    )
    truth = exact(pair, bounds.x)
    covered = int(((bounds.low <= truth) & (truth <= bounds.high)).sum())
    assert covered >= 181
    # Ordered in the mean, and so far apart that the order is not one of noise.
    for difference in (truth - bounds.lower, bounds.upper - truth):
        assert float(difference.mean()) > 4 * float(difference.std()) / 200**0.5
    # The raw bounds are no interval: this is why they are widened.
    assert int(((bounds.lower <= truth) & (truth <= bounds.upper)).sum()) < 181
    torch.testing.assert_close(bounds.low, bounds.lower - math.log(40), **ROUNDING)
    torch.testing.assert_close(bounds.high, bounds.upper + math.log(40), **ROUNDING)


def test_the_mean_inverse_weight_is_the_inverse_likelihood() -> None:
    pair = LinearGaussianVAE(2, 1)
    bounds = pv.bidirectional_log_likelihood(pair, 2000, num_temperatures=20, num_chains=1, leapfrog_steps=3, seed=0)
    truth = exact(pair, bounds.x)
    for ratios in (torch.exp(bounds.lower - truth), torch.exp(truth - bounds.upper)):
        assert abs(float(ratios.mean()) - 1) <= 4 * float(ratios.std()) / 2000**0.5


def test_both_bounds_meet_from_an_exact_guide() -> None:
    pair = LinearGaussianVAE(4, 2)
    settings: dict[str, Any] = {"num_temperatures": 10, "num_chains": 2, "leapfrog_steps": 2}
    bounds = pv.bidirectional_log_likelihood(pair, 6, start="guide", **settings)
    torch.testing.assert_close(bounds.lower, exact(pair, bounds.x), **ROUNDING)
    torch.testing.assert_close(bounds.upper, exact(pair, bounds.x), **ROUNDING)
    assert bounds.gap == pytest.approx(0, abs=1e-9)


# What is left, and what is refused


def test_nothing_is_changed_and_seeds_repeat() -> None:
    pair, x = VAE((4,), pv.StandardNormal(2), decoder=nn.Sequential(nn.Linear(2, 4), nn.Dropout())), torch.randn(5, 4)
    before = {name: value.clone() for name, value in pair.state_dict().items()}
    rng = torch.get_rng_state()
    settings: dict[str, Any] = {"num_temperatures": 5, "num_chains": 2, "leapfrog_steps": 2}
    first, again = (pv.annealed_log_likelihood(pair, x, seed=3, **settings).per_datum for _ in range(2))
    other = pv.annealed_log_likelihood(pair, x, **settings).per_datum
    pv.bidirectional_log_likelihood(pair, 3, **settings)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(rng, torch.get_rng_state())
    assert all(module.training for module in pair.modules())
    assert all(torch.equal(before[name], value) for name, value in pair.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in pair.parameters())


def test_chunks_of_data_are_put_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyro_vae.likelihood.ais.annealing.CHAINS", 7)
    pair, calls = LinearGaussianVAE(5, 2), []
    x = torch.randn(8, 5)
    settings: dict[str, Any] = {"num_temperatures": 3, "num_chains": 2, "leapfrog_steps": 1, "start": "guide"}
    annealed = pv.annealed_log_likelihood(pair, x, progress=lambda *done: calls.append(done), **settings)
    torch.testing.assert_close(annealed.per_datum, exact(pair, x), **ROUNDING)
    assert calls == [(3, 8), (6, 8), (8, 8)]
    bounds = pv.bidirectional_log_likelihood(pair, 8, **settings)
    torch.testing.assert_close(bounds.upper, exact(pair, bounds.x), **ROUNDING)


def test_what_was_estimated_is_named() -> None:
    settings: dict[str, Any] = {"num_temperatures": 3, "num_chains": 1, "leapfrog_steps": 1}
    assert pv.annealed_log_likelihood(HalfFixed(), torch.randn(2), **settings).quantity == "log p(x, y)"
    single = pv.annealed_log_likelihood(LinearGaussianVAE(3, 1), torch.randn(2, 3), **settings)
    assert repr(single).startswith("log p(x) = ")
    assert single.standard_error.isnan().all()
    assert "between" in repr(pv.bidirectional_log_likelihood(LinearGaussianVAE(3, 1), 2, **settings))


def test_latents_that_are_not_real_are_refused_by_name() -> None:
    pair = LinearTwoStageVAE(6, 2, pv.MixtureOfGaussians(3, 2), 2)
    with pytest.raises(ValueError, match=r"site 'c' \(Categorical\) has support .*needs every one real"):
        pv.annealed_log_likelihood(pair, torch.randn(2, 6))

    class Positive(HalfFixed):
        def model(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                rate = pyro.sample("rate", dist.Gamma(torch.tensor(2.0), 1.0))
                pyro.sample("x", dist.Normal(rate, 1.0), obs=x)

        def guide(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("rate", dist.Gamma(torch.tensor(2.0), 1.0))

    with pytest.raises(ValueError, match=r"site 'rate' \(Gamma\)"):
        pv.bidirectional_log_likelihood(Positive(), 2)


def test_a_point_mass_has_no_upper_bound() -> None:
    with pytest.raises(ValueError, match=r"guide fixes site 'y' to a point mass"):
        pv.bidirectional_log_likelihood(HalfFixed(), 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_temperatures": 0}, "num_temperatures is 0"),
        ({"num_chains": 0}, "num_chains is 0"),
        ({"leapfrog_steps": 0}, "leapfrog_steps is 0"),
        ({"start": "posterior"}, "choose 'prior' or 'guide'"),
        ({"schedule": lambda size: torch.linspace(0, 0.9, size + 1)}, "rise from 0 to 1"),
    ],
)
def test_bad_arguments_are_refused(arguments: Any, message: str) -> None:
    pair = LinearGaussianVAE(3, 1)
    with pytest.raises(ValueError, match=message):
        pv.annealed_log_likelihood(pair, torch.randn(2, 3), **arguments)
    with pytest.raises(ValueError, match=message):
        pv.bidirectional_log_likelihood(pair, 2, **arguments)


def test_bad_data_and_probabilities_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expects \(N, 3\)"):
        pv.annealed_log_likelihood(LinearGaussianVAE(3, 1), torch.randn(2, 4))
    with pytest.raises(ValueError, match=r"simulated x has shape \(3, 7\)"):
        pv.bidirectional_log_likelihood(Sites(), 7)
    for delta in (0.0, 1.0):
        with pytest.raises(ValueError, match="delta is"):
            pv.bidirectional_log_likelihood(LinearGaussianVAE(3, 1), 2, delta=delta)
