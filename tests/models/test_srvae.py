"""The two-stage VAE keeps the contract, and is LinearTwoStageVAE where its networks are affine; its readings meet."""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor

import pyro_vae as pv
from pyro_vae.conditionals.posteriors import SMALLEST_GUIDE_SCALE
from pyro_vae.models import SRVAE, LinearGaussianMixtureVAE, LinearTwoStageVAE
from pyro_vae.networks.mlp import MLP
from pyro_vae.pair.trace import trace_pair
from pyro_vae.testing import PairContract

# Cholesky factors of small, well-conditioned matrices: rounding stays below 1e-11 relative.
ROUNDING = {"rtol": 1e-10, "atol": 1e-10}
READINGS = ("delta", "gaussian", "discretised")


class TestSRVAEDelta(PairContract):
    expected_findings: tuple[tuple[str, str], ...] = (("not log p(x)", "y"),)

    def make_pair(self) -> pv.Pair:
        return SRVAE((1, 4, 4), 2, pv.MixtureOfGaussians(3, 2), "delta")

    def make_batch(self) -> tuple[Tensor, ...]:
        return (torch.randint(0, 17, (5, 1, 4, 4)) / 16,)


class TestSRVAEGaussian(TestSRVAEDelta):
    expected_findings = ()

    def make_pair(self) -> pv.Pair:
        return SRVAE((1, 4, 4), 2, pv.StandardNormal(2), "gaussian", pv.DiscretisedLogistic(17))


class TestSRVAEDiscretised(TestSRVAEDelta):
    expected_findings = ()

    def make_pair(self) -> pv.Pair:
        return SRVAE((1, 4, 4), 2, pv.MixtureOfGaussians(3, 2), "discretised", levels=17)


# The affine case


def affine(shapes: list[tuple[int, ...]], weight: Tensor, bias: Tensor, scale: Tensor | None = None) -> MLP:
    """Return weight · inputs + bias, followed by the raw entries of a constant scale where one is given."""
    if scale is not None:
        raw = torch.log(torch.expm1(scale - SMALLEST_GUIDE_SCALE))
        weight, bias = torch.cat([weight, torch.zeros_like(weight)]), torch.cat([bias, raw])
    network = MLP(shapes, len(bias), hidden=())
    network.load_state_dict({"layers.0.weight": weight, "layers.0.bias": bias})
    return network


def affine_prior(components: int) -> pv.StandardNormal | pv.MixtureOfGaussians:
    if components == 1:
        return pv.StandardNormal(2)
    weights, scales = torch.arange(1.0, components + 1), torch.rand(components, 2) + 0.5
    return pv.MixtureOfGaussians(components, 2, weights=weights, scales=scales, learned=False)


def regression(inputs: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the least-squares weight and bias, and twice the residuals' scale: a guide that covers the posterior."""
    design = torch.cat([inputs, torch.ones(len(inputs), 1)], -1)
    solution = torch.linalg.lstsq(design, target).solution
    return solution[:-1].mT, solution[-1], 2 * (target - design @ solution).std(0)


def two_stage(components: int, transition: Any = "delta") -> tuple[SRVAE, LinearTwoStageVAE]:
    """Return the affine SRVAE on images of 4 × 2 pixels and the oracle on their 8 numbers, row after row.

    An image two pixels wide has its 2 × 2 blocks one after the other, so that both down-scale alike. N(0, I) is the
    oracle's mixture of one. The guides are the best affine ones, twice as wide.
    """
    prior = affine_prior(components)
    oracle_prior = pv.MixtureOfGaussians(1, 2, means=torch.zeros(1, 2)) if components == 1 else prior
    oracle = LinearTwoStageVAE(8, 4, oracle_prior, z_size=2, x_scale=0.6, y_scale=0.4, z_scale=0.7)
    x, y, u, z = (1, 4, 2), (1, 2, 1), (2,), (2,)
    data = pv.generate(oracle, 2000, seed=3).x
    latents = pv.posterior(oracle, data, num_particles=1, seed=4).latents
    with torch.no_grad():
        networks = {
            "q_u": affine([y], *regression(oracle.down_scale(data), latents["u"][0])),
            "q_z": affine([x], *regression(data, latents["z"][0])),
            "p_y": affine([u], oracle.y_of_u.weight, oracle.y_of_u.bias),
            "p_z": affine(
                [y, u], torch.cat([oracle.z_of_y.weight, oracle.z_of_u.weight], 1), oracle.z_of_y.bias, oracle.z_scale()
            ),
            "p_x": affine([y, z], torch.cat([oracle.x_of_y.weight, oracle.x_of_z.weight], 1), oracle.x_of_z.bias),
        }
        heads = (pv.Gaussian(pv.FixedScale(scale())) for scale in (oracle.x_scale, oracle.y_scale))
        pair = SRVAE(x, 2, prior, transition, *heads, networks=networks)
    return pair.requires_grad_(False), oracle.requires_grad_(False)


def densities(program: Any, pair: pv.Pair, x: Tensor, values: dict[str, Tensor]) -> Tensor:
    """Return the sum of the program's log-densities at these latents and x, (B,)."""
    trace = poutine.trace(poutine.condition(program, data=values)).get_trace(pair, x)
    trace.compute_log_prob()
    return torch.stack([trace.nodes[name]["log_prob"] for name in (*values, "x") if name in trace.nodes]).sum(0)


@pytest.mark.parametrize("components", [1, 3])
def test_affine_networks_have_the_oracles_joint_density(components: int) -> None:
    pair, oracle = two_stage(components)
    x, u, y, z = torch.randn(20, 1, 4, 2), torch.randn(20, 2), torch.randn(20, 1, 2, 1), torch.randn(20, 2)
    torch.testing.assert_close(pair.down_scale(x).flatten(1), oracle.down_scale(x.flatten(1)), **ROUNDING)
    ours = densities(SRVAE.model, pair, x, {"u": u, "y": y, "z": z})
    flat = {"u": u, "y": y.flatten(1), "z": z}
    theirs = [
        densities(LinearTwoStageVAE.model, oracle, x.flatten(1), {"c": torch.full((20,), c), **flat})
        for c in range(components)
    ]
    torch.testing.assert_close(ours, torch.logsumexp(torch.stack(theirs), 0), **ROUNDING)


@pytest.mark.parametrize("components", [1, 3])
def test_joint_density_over_the_exact_posterior_is_the_likelihood_at_every_draw(components: int) -> None:
    pair, oracle = two_stage(components)
    x, u, z = torch.randn(20, 1, 4, 2), torch.randn(20, 2), torch.randn(20, 2)
    joint = densities(SRVAE.model, pair, x, {"u": u, "y": pair.down_scale(x), "z": z})
    log_marginals, posteriors = oracle.exact_components(x.flatten(1))
    log_shares = (oracle.prior.logits.log_softmax(-1) + log_marginals).log_softmax(-1)
    posterior = torch.logsumexp(log_shares + posteriors.log_prob(torch.cat([u, z], -1).unsqueeze(1)), -1)
    torch.testing.assert_close(joint - posterior, oracle.exact_log_likelihood(x.flatten(1)), **ROUNDING)


@pytest.mark.parametrize("components", [1, 3])
def test_importance_sampling_finds_the_oracles_likelihood(components: int) -> None:
    pair, oracle = two_stage(components)
    x = pv.generate(oracle, 10, seed=1).x
    ll = pv.log_likelihood(pair, x.reshape(10, 1, 4, 2), num_particles=40_000, seed=2, proposal="guide")
    assert ll.quantity == "log p(x, y)"
    # So many effective draws that the delta method's standard error can be trusted.
    assert (ll.ess > 400).all()
    assert ((ll.per_datum - oracle.exact_log_likelihood(x)).abs() <= 4 * ll.standard_error).all()


# Readings


def test_a_narrowing_gaussian_reading_tends_to_the_delta_reading_and_the_entropy() -> None:
    gaussian, x = SRVAE((1, 4, 4), 2, pv.MixtureOfGaussians(3, 2), "gaussian"), torch.rand(500, 1, 4, 4)
    delta = SRVAE((1, 4, 4), 2, gaussian.prior, "delta")
    delta.load_state_dict({name: value for name, value in gaussian.state_dict().items() if name != "s.raw"})
    delta.requires_grad_(False)
    gaussian.requires_grad_(False)
    rests = []
    for s in (1e-4, 1e-6):
        gaussian.s = pv.FixedScale(s)
        torch.manual_seed(1)
        guide = trace_pair(gaussian, x).guide
        at = {name: guide[name].drawn.squeeze(0) for name in ("u", "y", "z")}
        weights = densities(SRVAE.model, gaussian, x, at) - densities(SRVAE.guide, gaussian, x, at)
        surprise = -gaussian.q_y(x).log_prob(at["y"])
        at["y"] = delta.down_scale(x)
        rests.append(weights - surprise - densities(SRVAE.model, delta, x, at) + densities(SRVAE.guide, delta, x, at))
        # H[q(y | x)] for the four pixels of y; −log q is H + Σ (ε² − 1)/2, of variance 4/2.
        entropy = 4 * (0.5 * math.log(2 * math.pi * math.e) + math.log(s))
        assert abs(float(surprise.mean()) - entropy) <= 4 * math.sqrt(2 / len(x))
    # What is left is a gradient times s ε and a curvature times (s ε)²: a hundredth of s leaves a hundredth. The second
    # order of the first, over 100, is 1e-10 of a curvature, and rounding 1e-13; 1e-4 of the largest rest is 1e-8 of a
    # gradient, larger than both.
    assert ((rests[1] - rests[0] / 100).abs() <= 1e-4 * rests[0].abs().max()).all()


def quadrature(pair: SRVAE, x: Tensor, y: Tensor) -> Tensor:
    """Return p(x, y) for one y and x (B, 1, 2, 2) by the trapezoid rule over u and z, one number each."""
    # Both axes end where N(0, 1), and N(mean, scale²) of z given u and y, have no mass that float64 could add.
    u, z, step = torch.linspace(-9, 9, 181), torch.linspace(-9, 9, 361), (0.1, 0.05)
    at = y.expand(len(u), 1, 1, 1), u.unsqueeze(-1)
    stage = (dist.Normal(0.0, 1.0).log_prob(u) + pair.p_y(at[1]).log_prob(at[0])).exp() * step[0]
    p_z = (stage.unsqueeze(-1) * pair.p_z(*at).base_dist.log_prob(z.reshape(-1, 1, 1)).squeeze(-1).exp().mT).sum(0)
    p_x = pair.p_x(y.expand(len(z), 1, 1, 1), z.unsqueeze(-1)).log_prob(x.unsqueeze(1)).exp()
    return p_x @ p_z * step[1]


def test_discretised_bound_lies_below_the_sum_over_every_y() -> None:
    # Two gray levels, one pixel of y, four of x: all sixteen images and both y can be added up.
    pair = SRVAE((1, 2, 2), 2, pv.StandardNormal(1), "discretised", pv.DiscretisedLogistic(2), levels=2)
    pair.requires_grad_(False)
    x = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 4).reshape(16, 1, 2, 2)
    joint = torch.stack([quadrature(pair, x, torch.full((1, 1, 1), level)) for level in (0.0, 1.0)], -1)
    # A trapezoid rule on analytic integrands that vanish at the ends: rounding is all that remains.
    torch.testing.assert_close(joint.sum(), torch.tensor(1.0), **ROUNDING)
    own = joint[torch.arange(16), pair.down_scale(x).flatten().long()]
    assert (own < joint.sum(-1)).all(), "p(x, d(x)) is one term of the sum that is p(x)"
    terms = pv.log_terms(pair, x, num_particles=1000)
    error = terms.log_weights.std(0) / math.sqrt(1000)
    assert (pv.objectives.elbo(terms) <= own.log() + 4 * error).all()
    ll = pv.log_likelihood(pair, x, num_particles=1000, seed=1, proposal="guide")
    assert ll.quantity == "lower bound on log p(x)"
    assert ((ll.per_datum - own.log()).abs() <= 4 * ll.standard_error).all()
    assert (ll.per_datum <= joint.sum(-1).log() + 4 * ll.standard_error).all()


# Generation, super-resolution and clusters


def separated(transition: Any) -> SRVAE:
    """Return a pair whose prior's components are at least 14 of their scales apart."""
    means = torch.tensor([[-10.0, 0], [10, 0], [0, 10]])
    prior = pv.MixtureOfGaussians(3, 2, weights=torch.tensor([1.0, 2, 5]), means=means, learned=False)
    return SRVAE((1, 4, 4), 2, prior, transition, levels=17).requires_grad_(False)


@pytest.mark.parametrize("transition", READINGS)
def test_generated_components_have_the_priors_weights_and_are_told_apart(transition: str) -> None:
    pair, size = separated(transition), 4000
    u = pv.generate(pair, size, seed=1).latents["u"]
    nearest = torch.cdist(u, pair.prior.means).argmin(-1)
    weights = torch.tensor([1.0, 2, 5]) / 8
    frequencies = nearest.bincount(minlength=3) / size
    assert ((frequencies - weights).abs() <= 4 * (weights * (1 - weights) / size).sqrt()).all()
    # Two means are 14 scales apart or more: no draw is nearly half-way, where the weights would decide.
    assert torch.equal(pair.prior.responsibilities(u).argmax(-1), nearest)


@pytest.mark.parametrize("transition", READINGS)
def test_responsibilities_of_encoded_data_are_shares(transition: str) -> None:
    pair = SRVAE((1, 4, 4), 2, pv.MixtureOfGaussians(3, 2), transition, levels=17)
    u = pv.posterior(pair, torch.rand(5, 1, 4, 4), num_particles=7, seed=1).latents["u"]
    shares = pair.prior.responsibilities(u)
    assert shares.shape == (7, 5, 3)
    assert (shares > 0).all()
    torch.testing.assert_close(shares.sum(-1), torch.ones(7, 5), **ROUNDING)


@pytest.mark.parametrize("components", [1, 3])
def test_generated_images_have_the_oracles_mean(components: int) -> None:
    pair, oracle = two_stage(components)
    x = pv.generate(pair, 20_000, seed=1).x.flatten(1)
    prior = oracle.prior
    y = oracle.y_of_u(prior.logits.softmax(-1) @ prior.means)
    u = prior.logits.softmax(-1) @ prior.means
    mean = oracle.x_of_z(oracle.z_of_y(y) + oracle.z_of_u(u)) + oracle.x_of_y(y)
    assert ((x.mean(0) - mean).abs() <= 4 * x.std(0) / math.sqrt(len(x))).all()


@pytest.mark.parametrize("transition", ["delta", "gaussian"])
@pytest.mark.parametrize("components", [1, 3])
def test_super_resolutions_weights_average_to_the_density_of_y(components: int, transition: str) -> None:
    pair, oracle = two_stage(components, transition)
    first_stage = LinearGaussianMixtureVAE(2, oracle.prior, scale=0.4)
    first_stage.load_state_dict(
        {**first_stage.state_dict(), "weight": oracle.y_of_u.weight, "bias": oracle.y_of_u.bias}
    )
    y = pv.generate(pair, 10, seed=1).latents["y"]
    drawn = pv.super_resolve(pair, y, num_samples=20_000, seed=2)
    estimate = torch.logsumexp(drawn.log_weights, 0) - math.log(20_000)
    with torch.no_grad():
        exact = first_stage.exact_log_likelihood(y.flatten(1))
    error = (torch.softmax(drawn.log_weights, 0) * 20_000).std(0) / math.sqrt(20_000)
    assert ((estimate - exact).abs() <= 4 * error).all()
    # x is drawn around its mean with γ₁; the pixels of one draw are independent given it.
    noise = ((drawn.samples - drawn.means) / oracle.x_scale()).flatten()
    assert abs(float(noise.mean())) <= 4 / math.sqrt(len(noise))
    assert abs(float(noise.square().mean()) - 1) <= 4 * math.sqrt(2 / len(noise))
