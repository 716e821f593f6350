"""ELBO ≤ L_K ≤ log p(x) for guides that are not the posterior, on models whose log p(x) is known."""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import kl_divergence

import pyro_vae as pv
from pyro_vae.models import LinearGaussianMixtureVAE, LinearGaussianVAE, LinearTwoStageVAE
from pyro_vae.objectives.bounds import elbo, iwae
from tests.support.repetitions import repetitions

# The estimator itself, from the pair's own guide.
log_likelihood = partial(pv.log_likelihood, proposal="guide")

# Cholesky factors of small, well-conditioned matrices: rounding stays below 1e-11 relative.
ROUNDING = {"rtol": 1e-10, "atol": 1e-10}
PARTICLES = (1, 2, 8, 64)
REPETITIONS = 400


class Fault(NamedTuple):
    """What keeps a guide from being the posterior: its scale times ``factor``, its mean moved by ``shift`` of the
    posterior's own scale, its component probabilities flattened to the power ``flatten``."""

    factor: float = 1.0
    shift: float = 0.0
    flatten: float = 1.0

    def apply(self, exact: dist.MultivariateNormal) -> dist.MultivariateNormal:
        loc = exact.loc + self.shift * exact.stddev
        return dist.MultivariateNormal(loc, scale_tril=self.factor * exact.scale_tril)


FAULTS = {
    "narrow": Fault(factor=0.7),
    "wide": Fault(factor=1.5),
    "shifted": Fault(shift=0.6),
    "all": Fault(factor=1.3, shift=-0.4, flatten=0.5),
}


class FaultyVAE(LinearGaussianVAE):
    fault: Fault

    def exact_posterior(self, x: Tensor) -> dist.MultivariateNormal:
        return self.fault.apply(super().exact_posterior(x))


class FaultyComponents:
    """Give the guide other components than the posterior's; both mixtures ask this method for them."""

    fault: Fault
    prior: pv.MixtureOfGaussians

    def exact_components(self, x: Tensor) -> tuple[Tensor, dist.MultivariateNormal]:
        log_marginals, exact = super().exact_components(x)  # type: ignore[misc]
        log_shares = self.fault.flatten * (self.prior.logits.log_softmax(-1) + log_marginals)
        # The guide adds the prior's weights to what it takes for the marginals.
        return log_shares - self.prior.logits.log_softmax(-1), self.fault.apply(exact)


class FaultyMixtureVAE(FaultyComponents, LinearGaussianMixtureVAE):
    pass


class FaultyTwoStageVAE(FaultyComponents, LinearTwoStageVAE):
    pass


def mixture() -> pv.MixtureOfGaussians:
    return pv.MixtureOfGaussians(3, 2, weights=torch.tensor([1.0, 2, 3]), scales=torch.rand(3, 2) + 0.5)


MODELS: dict[str, Any] = {
    "one stage": (LinearGaussianVAE, FaultyVAE, lambda: (4, 2)),
    "one stage, mixture": (LinearGaussianMixtureVAE, FaultyMixtureVAE, lambda: (4, mixture())),
    "two stages, mixture": (LinearTwoStageVAE, FaultyTwoStageVAE, lambda: (6, 2, mixture(), 2)),
}


@pytest.fixture(params=MODELS)
def pairs(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """Return a pair with its exact posterior as guide, and the same model with a guide still to be given a fault."""
    right, wrong, make = MODELS[request.param]
    arguments = make()
    exact, faulty = right(*arguments), wrong(*arguments)
    faulty.load_state_dict(exact.state_dict())
    return exact.requires_grad_(False), faulty.requires_grad_(False)


def divergence(exact: Any, faulty: Any, x: Tensor) -> Tensor:
    """Return KL(q ‖ posterior) over every latent, the component a site among them, (B,)."""
    if isinstance(exact, LinearGaussianVAE):
        return kl_divergence(faulty.exact_posterior(x), exact.exact_posterior(x))
    (log_p, p), (log_q, q) = exact.exact_components(x), faulty.exact_components(x)
    prior = exact.prior.logits.log_softmax(-1)
    log_p, log_q = (prior + log_p).log_softmax(-1), (prior + log_q).log_softmax(-1)
    return (log_q.exp() * (log_q - log_p + kl_divergence(q, p))).sum(-1)


def mean_and_error(values: Tensor) -> tuple[float, float]:
    return float(values.mean()), float(values.std()) / math.sqrt(len(values))


@pytest.mark.parametrize("fault", FAULTS)
def test_elbo_l_k_and_log_p_are_in_order(pairs: tuple[Any, Any], fault: str) -> None:
    exact, faulty = pairs
    faulty.fault = FAULTS[fault]
    x = pv.generate(exact, REPETITIONS, seed=1).x
    log_p = exact.exact_log_likelihood(x)
    # Every datum is a repetition of its own: its draws are, and its gap to its own log p(x) is compared.
    elbo_gaps = elbo(pv.log_terms(faulty, x)) - log_p
    gaps = {k: log_likelihood(faulty, x, num_particles=k, seed=k).per_datum - log_p for k in PARTICLES}
    (low, low_error), *estimates = (mean_and_error(gap) for gap in (elbo_gaps, *gaps.values()))
    for mean, error in estimates:
        assert low <= mean + 4 * math.hypot(low_error, error)
        assert mean <= 4 * error
    for (mean, error), (next_mean, next_error) in pairwise(estimates):
        assert mean <= next_mean + 4 * math.hypot(error, next_error)
    # The order is no matter of noise: the ends are apart by more than their errors.
    assert estimates[-1][0] - low > 4 * math.hypot(low_error, estimates[-1][1])
    assert low < -4 * low_error


@pytest.mark.parametrize("fault", FAULTS)
def test_the_elbos_gap_is_the_divergence_of_the_guide_from_the_posterior(pairs: tuple[Any, Any], fault: str) -> None:
    exact, faulty = pairs
    faulty.fault = FAULTS[fault]
    x = pv.generate(exact, REPETITIONS, seed=1).x
    gaps = exact.exact_log_likelihood(x) - elbo(pv.log_terms(faulty, x, num_particles=4))
    mean, error = mean_and_error(gaps - divergence(exact, faulty, x))
    assert abs(mean) <= 4 * error


def test_a_guide_without_fault_leaves_no_gap(pairs: tuple[Any, Any]) -> None:
    exact, faulty = pairs
    faulty.fault = Fault()
    x = pv.generate(exact, 20, seed=1).x
    weights = pv.log_terms(faulty, x, num_particles=5).log_weights
    torch.testing.assert_close(weights, exact.exact_log_likelihood(x).expand(5, 20), **ROUNDING)


@pytest.mark.parametrize("fault", FAULTS)
def test_bounds_from_the_same_draws_are_in_order_at_every_datum(pairs: tuple[Any, Any], fault: str) -> None:
    # Jensen: the mean of L_k over the blocks of K/k of the same draws rises with k, whatever the draws.
    exact, faulty = pairs
    faulty.fault = FAULTS[fault]
    x = pv.generate(exact, 50, seed=1).x
    terms = pv.log_terms(faulty, x, num_particles=64)
    blocks = [_block_mean(terms.log_weights, k) for k in PARTICLES]
    torch.testing.assert_close(blocks[0], elbo(terms), **ROUNDING)
    torch.testing.assert_close(blocks[-1], iwae(terms), **ROUNDING)
    for lower, upper in pairwise(blocks):
        assert (lower < upper).all()


def _block_mean(log_weights: Tensor, size: int) -> Tensor:
    blocks = log_weights.unflatten(0, (-1, size))
    return (torch.logsumexp(blocks, 1) - math.log(size)).mean(0)


def test_repeated_estimates_of_one_datum_stay_below_it_in_the_mean(pairs: tuple[Any, Any]) -> None:
    exact, faulty = pairs
    faulty.fault = FAULTS["all"]
    x = pv.generate(exact, 1, seed=3).x
    copies, log_p = repetitions(x, 20), exact.exact_log_likelihood(x)
    means = []
    for k in (1, 16):
        # A seed of its own for every call, as separate runs would have.
        runs = [log_likelihood(faulty, copies, num_particles=k, seed=100 * k + run).per_datum for run in range(20)]
        mean, error = mean_and_error(torch.cat(runs) - log_p)
        assert mean <= 4 * error
        means.append((mean, error))
    assert means[0][0] <= means[1][0] + 4 * math.hypot(means[0][1], means[1][1])
