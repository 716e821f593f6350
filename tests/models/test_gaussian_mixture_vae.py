"""The clustering VAE keeps the contract, and is the VAE with a mixture prior, summed over the cluster."""

from __future__ import annotations

import math

import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO
from torch import Tensor

import pyro_vae as pv
from pyro_vae.models import VAE, GaussianMixtureVAE
from pyro_vae.pair.site import sites_of
from pyro_vae.runtime.random_state import own_random_state
from pyro_vae.testing import PairContract

# The same sums in another order: a few hundred roundings.
ROUNDING = {"rtol": 1e-10, "atol": 1e-10}


def images(size: int = 5) -> Tensor:
    return torch.rand(size, 1, 4, 4)


def prior() -> pv.MixtureOfGaussians:
    return pv.MixtureOfGaussians(3, 2, weights=torch.tensor([1.0, 2, 3]), scales=torch.rand(3, 2) + 0.5)


def both(*, enumerated: bool = False) -> tuple[GaussianMixtureVAE, VAE]:
    """Return the pair and the VAE with the same parameters and the mixture as one density."""
    pair = GaussianMixtureVAE((1, 4, 4), prior(), pv.ContinuousBernoulli(), enumerated=enumerated)
    summed = VAE((1, 4, 4), prior(), pv.ContinuousBernoulli())
    summed.load_state_dict(pair.state_dict())
    return pair, summed


class TestGaussianMixtureVAE(PairContract):
    expected_findings = (("not trainable this way", "c"),)

    def make_pair(self) -> pv.Pair:
        return GaussianMixtureVAE((1, 4, 4), prior(), pv.ContinuousBernoulli())

    def make_batch(self) -> tuple[Tensor, ...]:
        return (images(),)


class TestFullCovarianceGaussianMixtureVAE(TestGaussianMixtureVAE):
    def make_pair(self) -> pv.Pair:
        return GaussianMixtureVAE((1, 4, 4), prior(), pv.Gaussian(), pv.FullGaussian())


def test_marginalising_the_cluster_gives_the_mixture_prior() -> None:
    pair, x, z = both()[0], images(1), torch.randn(7, 2)
    joint = []
    for c in range(3):
        given = poutine.condition(GaussianMixtureVAE.model, data={"c": torch.full((7,), c), "z": z})
        sites = sites_of(poutine.trace(given).get_trace(pair, x.expand(7, 1, 4, 4)))
        joint.append(sum(sites[name].fn.log_prob(sites[name].drawn) for name in ("c", "z")))
    torch.testing.assert_close(torch.stack(joint).logsumexp(0), pair.prior().log_prob(z), **ROUNDING)


def test_log_weights_are_those_of_the_summed_mixture_at_every_draw() -> None:
    pair, summed = both()
    x = images()
    weights = []
    for p in (pair, summed):
        torch.manual_seed(3)
        weights.append(pv.log_terms(p, x, num_particles=20).log_weights)
    torch.testing.assert_close(*weights, **ROUNDING)


def loss_and_gradients(pair: pv.Pair, loss: Trace_ELBO, x: Tensor) -> tuple[float, dict[str, Tensor]]:
    torch.manual_seed(4)
    pair.zero_grad()
    value = loss.loss_and_grads(pair.model, pair.guide, x)
    return value, {name: p.grad.clone() for name, p in pair.named_parameters()}


def test_enumeration_gives_the_summed_mixtures_loss_and_gradients() -> None:
    pair, summed = both(enumerated=True)
    x = images()
    enumerated = loss_and_gradients(pair, TraceEnum_ELBO(max_plate_nesting=1), x)
    exact = loss_and_gradients(summed, Trace_ELBO(), x)
    torch.testing.assert_close(enumerated, exact, **ROUNDING)


def test_a_drawn_cluster_leaves_the_gradient_unbiased() -> None:
    # At one z: everything that still varies is the draw of c.
    pair, summed = both()
    x, draws = images(1), 4000
    with torch.no_grad():
        z = pair.q_z(x).sample()
    fixed = {"z": z.expand(draws, 2)}
    programs = [poutine.condition(f, data=fixed) for f in (GaussianMixtureVAE.guide, GaussianMixtureVAE.model)]
    many = x.expand(draws, 1, 4, 4)
    guide = poutine.trace(programs[0]).get_trace(pair, many)
    sites = sites_of(poutine.trace(poutine.replay(programs[1], trace=guide)).get_trace(pair, many))
    terms = sites["c"].fn.log_prob(sites["c"].drawn) + sites["z"].fn.log_prob(fixed["z"])
    c = guide.nodes["c"]["value"]
    assert not guide.nodes["c"]["fn"].probs.requires_grad
    (gradient,) = torch.autograd.grad(terms.sum() / draws, pair.prior.means)
    (exact,) = torch.autograd.grad(summed.prior().log_prob(z).sum(), summed.prior.means)
    # Of a component's gradient only how often it was drawn is random: a binomial share.
    shares = pair.prior.responsibilities(z)[0].detach()
    slope = exact / shares[:, None]
    error = slope.abs() * (shares * (1 - shares) / draws).sqrt()[:, None]
    assert len(c.unique()) == 3
    assert ((gradient - exact).abs() <= 4 * error).all()


def test_far_clusters_are_told_apart_by_their_responsibilities() -> None:
    means = torch.tensor([[-20.0, 0], [20, 0]])
    pair = GaussianMixtureVAE((2,), pv.MixtureOfGaussians(2, 2, means=means))
    z = means[[0, 1, 1]]
    torch.testing.assert_close(pair.prior.responsibilities(z), torch.eye(2)[[0, 1, 1]], **ROUNDING)


def test_soft_clusters_sum_to_one_and_follow_the_draws_of_c() -> None:
    pair, x = both()[0], images()
    shares = pair.responsibilities(x, num_particles=4000)
    torch.testing.assert_close(shares.sum(-1), torch.ones(5), **ROUNDING)
    c = pv.posterior(pair, x, num_particles=4000, seed=1).latents["c"]
    drawn = torch.stack([(c == k).double().mean(0) for k in range(3)], -1)
    # Both are means over 4000 draws of a number between 0 and 1.
    assert ((shares - drawn).abs() <= 4 * (2 * drawn * (1 - drawn) / 4000).sqrt() + 1e-12).all()


def test_clusters_start_where_the_encoded_data_lie() -> None:
    centres = torch.tensor([[-3.0, 0], [0, 3], [3, 0]])
    rows = torch.arange(600) % 3
    x = centres[rows] + 0.1 * torch.randn(600, 2)
    encoder = torch.nn.Linear(2, 4)
    # Narrow posteriors: their scale is the softplus of −5.
    encoder.load_state_dict({"weight": torch.eye(4, 2), "bias": torch.tensor([0.0, 0.0, -5.0, -5.0])})
    pair = GaussianMixtureVAE((2,), pv.MixtureOfGaussians(3, 2), encoder=encoder)
    pair.start_clusters(x, seed=7)
    with own_random_state(7, torch.device("cpu")), torch.no_grad():
        drawn = pair.q_z(x).sample()
    order = pair.prior.means[:, 0].argsort()
    moments = [torch.stack([f(drawn[rows == k], 0) for k in range(3)]) for f in (torch.mean, torch.var)]
    # The clusters are thirty standard deviations apart, so that the mixture's fit is each cluster's draws' own moments,
    # up to scikit-learn's floor of 1e-6 on variances and the correction 200 / 199.
    torch.testing.assert_close(pair.prior.means[order].detach(), moments[0], rtol=1e-6, atol=1e-6)
    variances = (2 * pair.prior.log_scales[order]).exp().detach()
    torch.testing.assert_close(variances, moments[1] * 199 / 200, rtol=1e-3, atol=2e-6)
    torch.testing.assert_close(pair.prior.logits.softmax(-1).detach(), torch.full((3,), 1 / 3), **ROUNDING)


def test_a_start_of_clusters_does_not_lower_the_bound() -> None:
    # Posteriors all alike and as wide as the prior: clusters as narrow as their means would cost hundreds of nats.
    encoder = torch.nn.Linear(2, 4)
    torch.nn.init.zeros_(encoder.weight)
    torch.nn.init.zeros_(encoder.bias)
    pair, x = GaussianMixtureVAE((2,), pv.MixtureOfGaussians(3, 2), encoder=encoder), torch.randn(2000, 2)
    with torch.no_grad():
        drawn = pair.q_z(x).sample()
        before = pair.prior().log_prob(drawn).mean()
        pair.start_clusters(x)
        after = pair.prior().log_prob(drawn).mean()
    # The mixture fits the very distribution of the draws, other ones of them: 14 parameters cost 14 / (2 · 2000) nats.
    assert after > before - 0.01
    assert after > -pair.q_z(x[0]).entropy() - 0.03


def test_training_by_drawn_clusters_raises_the_bound() -> None:
    pair, x = both()[0], images(64)
    run = pv.fit(pair, x, epochs=15, batch_size=32, lr=1e-2, validation=x, progress=False)
    losses = [record["validation_loss"] for record in run.metrics]
    assert math.isfinite(losses[-1])
    assert losses[-1] < losses[0]


def test_a_prior_without_clusters_is_refused() -> None:
    with pytest.raises(ValueError, match="MixtureOfGaussians"):
        GaussianMixtureVAE((2,), pv.StandardNormal(2))


def test_fewer_data_than_clusters_are_refused() -> None:
    with pytest.raises(ValueError, match="fewer than the prior's 3"):
        both()[0].start_clusters(images(2))
