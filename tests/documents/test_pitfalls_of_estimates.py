"""The ways in which code for latent-variable models goes wrong, continued: bounds that lie, scales, tails, updates.

As in ``test_pitfalls.py``: a wrong version, an exact case against it, and ours.
"""

from __future__ import annotations

import copy
import math
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor, nn
from torch.distributions import kl_divergence

import pyro_vae as pv
from pyro_vae.models import VAE, LinearGaussianVAE
from pyro_vae.objectives.bounds import elbo
from pyro_vae.training.step import eager_step

ROUNDING = {"rtol": 1e-9, "atol": 1e-9}


def test_16_a_perfect_guide_must_not_be_flagged_as_the_worst() -> None:
    pair, x = LinearGaussianVAE(3, 1), torch.randn(4, 3)
    with torch.no_grad():
        weights = pv.log_terms(pair, x, num_particles=400).log_weights
    with warnings.catch_warnings():
        # ArviZ 0.23 announces its next version whenever it is imported.
        warnings.simplefilter("ignore", FutureWarning)
        import arviz

        if hasattr(arviz, "psislw"):
            # Wrong: no weight lies above the tail's cutoff, and k̂ is then +∞.
            _, shape = arviz.psislw(np.zeros((4, 400)))
            assert (np.asarray(shape) == np.inf).all()
    assert float(weights.std(0).max()) < 1e-9
    ll = pv.log_likelihood(pair, x, num_particles=400, proposal="guide")
    assert (ll.pareto_k == -math.inf).all()
    assert ll.share_above_threshold == 0


def test_17_a_bound_is_not_registered_as_a_divergence() -> None:
    means = torch.tensor([[-2.0], [2.0]])
    prior = pv.MixtureOfGaussians(2, 1, means=means, learned=False)()
    q = dist.Normal(torch.zeros(1), 1.0).to_event(1)
    # KL by quadrature, on a grid where both densities are below 1e-30 at the ends.
    grid = torch.linspace(-12, 12, 20001).unsqueeze(-1)
    integrand = q.log_prob(grid).exp() * (q.log_prob(grid) - prior.log_prob(grid))
    truth = float(torch.trapezoid(integrand, grid[:, 0]))
    # Wrong, if it were called the divergence: both bounds lie well above it.
    bounds = [float(pv.variational_kl_bound(q, prior)), float(pv.convex_kl_bound(q, prior))]
    assert truth + 0.1 < bounds[0] <= bounds[1] + 1e-12
    # Ours: the registry stays silent, and the sampled divergence is right.
    with pytest.raises(NotImplementedError):
        kl_divergence(q, prior)
    draws = q.sample((20000,))
    ratios = q.log_prob(draws) - prior.log_prob(draws)
    assert abs(float(ratios.mean()) - truth) <= 4 * float(ratios.std()) / 20000**0.5


def test_18_a_scale_fitted_to_each_batch_flatters() -> None:
    # Data of scale one around a mean that is known: no γ is better than 1 on average.
    batches = torch.randn(500, 8)
    best = (batches**2).mean(1, keepdim=True).sqrt()
    wrong = dist.Normal(0.0, best).log_prob(batches).mean(1)
    truth = dist.Normal(0.0, 1.0).log_prob(batches).mean(1)
    # It is never below, batch by batch, and the excess is a half of E[s² − 1 − log s²] > 0.
    assert (wrong >= truth - 1e-12).all()
    assert float((wrong - truth).mean()) > 0.04
    # Ours: evaluated with one frozen γ, a datum's value does not know its batch.
    pair = VAE((8,), pv.StandardNormal(1), pv.Gaussian(pv.BatchOptimalScale()))
    pv.fit(pair, batches, epochs=1, batch_size=100, progress=False)
    data = batches[:50]
    others = torch.cat([data[:1], 10 * data[1:]])
    calm, wild = (pv.log_likelihood(pair, batch, num_particles=1, seed=0).per_datum[0] for batch in (data, others))
    torch.testing.assert_close(calm, wild, **ROUNDING)


def test_19_two_estimates_are_no_interval() -> None:
    pair = LinearGaussianVAE(3, 2)
    bounds = pv.bidirectional_log_likelihood(
        pair, 200, num_temperatures=20, num_chains=1, leapfrog_steps=2, delta=0.05, seed=0
    )
    truth = pair.exact_log_likelihood(bounds.x).detach()
    raw = ((bounds.lower <= truth) & (truth <= bounds.upper)).double().mean()
    wide = ((bounds.low <= truth) & (truth <= bounds.high)).double().mean()
    # 0.95 less four standard errors of a share of 200 runs is 0.888.
    assert float(raw) < 0.888
    assert float(wide) >= 0.95


def test_20_a_marginal_over_corruptions_contains_the_draws_own() -> None:
    # z ~ N(0, 1), x ~ N(z, ½²); q(z | x̃) = N(0.8 x̃, v) at x̃ = x + s ε; the posterior is N(0.8 x, 0.2).
    x, s, v, count = torch.tensor(1.0), 0.5, 0.1, 200_000
    truth = float(dist.Normal(0.0, 1.25**0.5).log_prob(x))

    def log_weights(corruptions: int, own: bool) -> Tensor:
        """Return log p(x, z) − log (1/M) Σ_m q(z | x̃_m); z is drawn at the first corruption or at one left out."""
        means = 0.8 * (x + s * torch.randn(corruptions + (not own), count))
        z = dist.Normal(means[0], v**0.5).sample()
        log_q = dist.Normal(means[(not own) :], v**0.5).log_prob(z)
        log_joint = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z, 0.5).log_prob(x)
        return log_joint - torch.logsumexp(log_q, 0) + math.log(corruptions)

    def assert_mean(values: Tensor, expected: float) -> None:
        assert abs(float(values.mean()) - expected) <= 4 * float(values.std()) / count**0.5

    # Ours at M = 1: log p(x) less E KL(q(z | x̃) ‖ p(z | x)), in closed form.
    spread = (0.8 * s) ** 2
    bound = truth - 0.5 * ((v + spread) / 0.2 - 1 + math.log(0.2 / v))
    assert_mean(log_weights(1, own=True), bound)
    # Wrong: at another corruption log q costs (0.8 s)²/v more, and the "bound" lies above log p(x) by a nat.
    assert bound + spread / v > truth + 1
    assert_mean(log_weights(1, own=False), bound + spread / v)
    # Of more corruptions the right bound comes out higher, and never above the truth; the wrong one comes down to it.
    count = 20_000
    right, wrong = log_weights(8, own=True), log_weights(8, own=False)
    assert bound < float(right.mean()) < truth
    assert float(wrong.mean()) - truth > 4 * float(wrong.std()) / count**0.5
    # The right one is an average of weights, each of which has p(x) for its expectation, whatever M.
    weights = right.exp()
    assert abs(float(weights.mean()) - math.exp(truth)) <= 4 * float(weights.std()) / count**0.5


def test_21_a_latent_that_the_guide_lacks_is_never_paid_for() -> None:
    class Lacking(LinearGaussianVAE):
        def model(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("idle", dist.Normal(0.0, 1.0))
                z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(z @ self.weight.mT + self.bias, self.scale()).to_event(1), obs=x)

    pair, x = Lacking(3, 1), torch.randn(2000, 3)
    with torch.no_grad():
        guide = poutine.trace(pair.guide).get_trace(x)
        model = poutine.trace(poutine.replay(pair.model, trace=guide)).get_trace(x)
        truth = float(pair.exact_log_likelihood(x).sum())
    # Wrong: the idle latent changes nothing about x, and yet costs its entropy, 1.42 nats for each datum.
    wrong = float(model.log_prob_sum() - guide.log_prob_sum())
    assert abs((wrong - truth) / 2000 + 0.5 * math.log(2 * math.pi * math.e)) <= 4 * 0.5**0.5 / 2000**0.5
    with pytest.raises(ValueError, match=r"the model samples \['idle'\], the guide does not"):
        pv.log_terms(pair, x)


def test_23_adam_hides_a_wrong_scale_of_the_gradient() -> None:
    start, x = VAE((4,), pv.StandardNormal(2), encoder=nn.Linear(4, 4), decoder=nn.Linear(2, 4)), torch.randn(50, 4)

    def moved(summed: bool, make: type[torch.optim.Optimizer]) -> Tensor:
        pair = copy.deepcopy(start)
        optimizer = make(pair.parameters(), lr=1e-3)  # type: ignore[call-arg]
        torch.manual_seed(0)
        if summed:
            # Wrong: the sum over the batch for its mean.
            (-elbo(pv.log_terms(pair, x))).sum().backward()
            optimizer.step()
        else:
            eager_step(pair, elbo, optimizer)(x)
        steps = zip(pair.parameters(), start.parameters(), strict=True)
        return torch.cat([(new - old).detach().flatten() for new, old in steps])

    wrong, ours = (moved(summed, torch.optim.Adam) for summed in (True, False))
    assert float((wrong - ours).abs().max()) < 1e-3 * float(ours.abs().max())
    wrong, ours = (moved(summed, torch.optim.SGD) for summed in (True, False))
    torch.testing.assert_close(wrong, 50 * ours, **ROUNDING)
    # Ours is the mean's.
    torch.manual_seed(0)
    pair = copy.deepcopy(start)
    gradients = torch.autograd.grad(-elbo(pv.log_terms(pair, x)).mean(), list(pair.parameters()))
    torch.testing.assert_close(ours, -1e-3 * torch.cat([gradient.flatten() for gradient in gradients]), **ROUNDING)
