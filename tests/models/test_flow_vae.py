"""The VAE with flows keeps the contract; without layers it is the VAE, and its densities train and evaluate it."""

from __future__ import annotations

from functools import partial
from typing import Any, get_args

import pyro
import pytest
import torch
from pyro.distributions import transforms
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.cli.recipes.flow_vae import FlowName, FlowVAERecipe, posterior_layers, prior_layers
from pyro_vae.models import VAE, FlowVAE
from pyro_vae.testing import PairContract
from tests.support.terms import parts


def small_pair(flow: Any = "planar", prior: Any = "normal", length: int = 2) -> FlowVAE:
    layers = posterior_layers(flow, length, 2, 3, hidden=8)
    conditional = any(isinstance(layer, pyro.distributions.ConditionalTransformModule) for layer in layers)
    posterior = pv.FlowPosterior(layers, 3 if conditional else 0)
    bent = pv.FlowPrior(2, prior_layers(prior, 2, 2, hidden=8)) if prior != "normal" else pv.StandardNormal(2)
    networks: dict[str, nn.Module] = {"encoder": nn.Linear(5, posterior.num_outputs((2,))), "decoder": nn.Linear(2, 5)}
    return FlowVAE((5,), bent, posterior, pv.Gaussian(), **networks)


@pytest.mark.parametrize("flow", get_args(FlowName))
class TestFlowVAE(PairContract):
    @pytest.fixture(autouse=True)
    def _of(self, flow: str) -> None:
        self.flow = flow

    def make_pair(self) -> pv.Pair:
        return small_pair(self.flow)

    def make_batch(self) -> tuple[Tensor, ...]:
        return (torch.randn(4, 5),)


class TestFlowPriorVAE(PairContract):
    def make_pair(self) -> pv.Pair:
        return small_pair("sylvester", "autoregressive")

    def make_batch(self) -> tuple[Tensor, ...]:
        return (torch.randn(4, 5),)


def test_no_layers_are_the_vae() -> None:
    flows = small_pair(length=0)
    networks = {"encoder": flows.q_z.network, "decoder": flows.p_x.network}
    vae = VAE((5,), pv.StandardNormal(2), flows.p_x.head, **networks)
    assert set(flows.state_dict()) == set(vae.state_dict())
    x, results = torch.randn(4, 5), []
    for pair in (flows, vae):
        pyro.set_rng_seed(1)
        results.append(parts(pv.log_terms(pair, x, num_particles=3)))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


def test_a_flow_prior_without_layers_is_the_standard_normal() -> None:
    z = torch.randn(6, 3)
    assert torch.equal(pv.FlowPrior(3, [])().log_prob(z), pv.StandardNormal(3)().log_prob(z))


@pytest.mark.parametrize("flow", get_args(FlowName))
def test_importance_sampling_through_a_flow_finds_the_exact_likelihood(flow: Any) -> None:
    # A linear decoder has a closed log p(x), which a wrong log-determinant in the guide would miss.
    oracle, pair = pv.models.LinearGaussianVAE(5, 2).requires_grad_(False), small_pair(flow)
    pair.p_x.network.load_state_dict({"weight": oracle.weight, "bias": oracle.bias})
    pair.p_x.head.scale = pv.FixedScale(oracle.scale())
    for parameter in pair.q_z.parameters():
        # A mild flow of a Gaussian twice as wide as the prior covers every posterior: its weights are bounded.
        nn.init.normal_(parameter, std=0.1)
    nn.init.zeros_(pair.q_z.network.weight[:4])
    nn.init.constant_(pair.q_z.network.bias[2:4], 2.0)
    x = pv.generate(oracle, 10, seed=1).x
    ll = pv.log_likelihood(pair, x, num_particles=20_000, seed=2, proposal="guide")
    assert ((ll.per_datum - oracle.exact_log_likelihood(x)).abs() <= 4 * ll.standard_error).all()


@pytest.mark.parametrize("prior", ["coupling", "autoregressive", "spline"])
def test_a_flow_prior_scores_what_it_draws(prior: Any) -> None:
    pair = small_pair("coupling", prior)
    drawn = pv.generate(pair, 3, seed=0)
    assert drawn.x.shape == (3, 5)
    assert torch.isfinite(pair.prior().log_prob(drawn.latents["z"])).all()


def test_dreg_refuses_a_guide_that_it_cannot_score_again() -> None:
    x = torch.randn(3, 5)
    for flow in ("planar", "sylvester"):
        pair = small_pair(flow)
        with pytest.raises(ValueError, match=r"guide's site 'z' cannot be scored again .*objective iwae"):
            pv.DReG(2).loss_and_grads(pair.model, pair.guide, x)
    pair = small_pair("coupling")
    pv.DReG(2).loss_and_grads(pair.model, pair.guide, x)
    assert all(parameter.grad is not None for parameter in pair.parameters())


def test_imputation_refuses_a_guide_that_it_cannot_score_again() -> None:
    x, seen = torch.randn(3, 5), torch.tensor([True, True, True, False, False])
    with pytest.raises(ValueError, match="has no inverse"):
        pv.impute(small_pair("planar"), x, seen, num_samples=2, sweeps=1)
    assert pv.impute(small_pair("coupling"), x, seen, num_samples=2, sweeps=1).samples.shape == (2, 3, 5)


def test_coupled_data_are_seen_through_a_flow_without_an_inverse() -> None:
    class Coupled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x - x.mean(0))

    pair = FlowVAE(
        (5,), pv.StandardNormal(2), pv.FlowPosterior([transforms.planar(2)]), pv.Gaussian(), encoder=Coupled(5, 4)
    )
    with pytest.raises(ValueError, match="data are coupled"):
        pv.testing.check_pair(pair, torch.randn(4, 5))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"length": -1}, "length is -1"), ({"latent": 1, "flow": "coupling"}, "latent is 1; a flow of kind 'coupling'")],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    blank = torch.zeros(3, 1, 4, 4)
    with pytest.raises(ValueError, match=message):
        FlowVAERecipe(**options).build(pv.data.DataSet("blank", blank, blank, None, None, levels=17))


@pytest.mark.parametrize("prior", [pv.StandardNormal(3), pv.MixtureOfGaussians(2, 3)], ids=["normal", "mixture"])
def test_a_guide_under_a_flow_has_no_closed_divergence(prior: Any) -> None:
    posterior = pv.FlowPosterior([transforms.planar(3)])
    pair, x = VAE((4,), prior, pv.Gaussian(), posterior), torch.randn(5, 4)
    for bound in (pv.convex_kl_bound, pv.variational_kl_bound):
        with pytest.raises(ValueError, match=r"the guide's distribution of a latent is FlowDistribution.*Trace_ELBO"):
            pv.analytic_loss(pair, x, mixture_kl=bound)


def test_a_prior_under_a_flow_has_no_closed_divergence() -> None:
    pair = VAE((4,), pv.FlowPrior(3, [transforms.affine_coupling(3, [8])]), pv.Gaussian())
    with pytest.raises(ValueError, match=r"the prior's distribution of a latent is FlowDistribution.*Trace_ELBO"):
        pv.analytic_loss(pair, torch.randn(5, 4))


def test_the_sampled_divergence_from_a_mixture_takes_any_guide() -> None:
    posterior = pv.FlowPosterior([transforms.planar(3)])
    pair, x = VAE((4,), pv.MixtureOfGaussians(2, 3), pv.Gaussian(), posterior), torch.randn(5, 4)
    draws = 4000
    loss = pv.analytic_loss(pair, x, num_particles=draws, mixture_kl=partial(pv.monte_carlo_kl, num_particles=draws))
    weights = pv.log_terms(pair, x, num_particles=draws).log_weights.detach()
    # The two have draws of their own.
    error = 2 * weights.std(0) / draws**0.5
    assert ((loss.total.detach() + weights.mean(0)).abs() <= 4 * error).all()
