"""The VAE with categorical latents keeps the contract, and where z can be summed over everything is exact."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn
from torch.distributions import kl_divergence

import pyro_vae as pv
from pyro_vae.cli.recipes.categorical_vae import CategoricalVAERecipe
from pyro_vae.data import DataSet
from pyro_vae.distributions.one_hot import OneHots, RelaxedOneHots
from pyro_vae.inspection import inspect
from pyro_vae.models import CategoricalVAE
from pyro_vae.objectives.bounds import elbo
from pyro_vae.objectives.loss import check_loss

# Sums of a few hundred terms of order ten in float64.
ROUNDING = {"rtol": 1e-10, "atol": 1e-10}


def bits(size: int = 4) -> Tensor:
    return torch.rand(size, 6).gt(0.5).to(torch.get_default_dtype())


def small(relaxation: pv.GumbelSoftmax | None = None, groups: int = 2, enumerated: bool = False) -> CategoricalVAE:
    prior = pv.OneHotPrior(groups, 3, torch.tensor([0.2, 0.5, 0.3]))
    decoder = nn.Sequential(nn.Flatten(-2), nn.Linear(3 * groups, 6))
    networks: Any = {"encoder": nn.Linear(6, 3 * groups), "decoder": decoder}
    return CategoricalVAE((6,), prior, pv.Bernoulli(), relaxation, enumerated=enumerated, **networks)


class TestRelaxed(pv.testing.PairContract):
    def make_pair(self) -> pv.Pair:
        return small(pv.GumbelSoftmax(0.7))

    def make_batch(self) -> tuple[Tensor, ...]:
        return (bits(),)


class TestStraightThrough(TestRelaxed):
    def make_pair(self) -> pv.Pair:
        return small(pv.GumbelSoftmax(0.7, straight_through=True))


class TestDiscrete(TestRelaxed):
    expected_findings = (("not trainable this way", "z"),)

    def make_pair(self) -> pv.Pair:
        return small()


def enumerated_elbo(pair: CategoricalVAE, x: Tensor) -> Tensor:
    """Return Σ_z q(z | x) [log p(x, z) − log q(z | x)], (B,), written out."""
    q = OneHots(pair.encoder(x).unflatten(-1, (pair.prior.groups, pair.prior.categories)))
    z = q.enumerate_support()
    log_q = q.log_prob(z)
    return (log_q.exp() * (pair.prior().log_prob(z) + pair.p_x(z).log_prob(x) - log_q)).sum(0)


def gradients(pair: nn.Module, loss: Tensor) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(pair.parameters()))])


def sampled_gradient(pair: CategoricalVAE, loss: Any, x: Tensor) -> Tensor:
    return gradients(pair, loss.differentiable_loss(pair.model, pair.guide, x))


def test_the_masses_of_all_configurations_sum_to_one() -> None:
    rows = OneHots(torch.randn(4, 3, 5))
    z = rows.enumerate_support()
    assert z.shape == (125, 4, 3, 5)
    torch.testing.assert_close(rows.log_prob(z).exp().sum(0), torch.ones(4), **ROUNDING)
    torch.testing.assert_close((rows.log_prob(z).exp()[..., None, None] * z).sum(0), rows.mean, **ROUNDING)


def test_a_sum_over_all_data_of_their_exact_likelihood_is_one() -> None:
    pair = small()
    every = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 6)
    torch.testing.assert_close(pair.exact_log_likelihood(every).exp().sum(), torch.tensor(1.0), **ROUNDING)


def test_enumeration_gives_the_elbo_and_its_gradient_exactly_and_below_log_p() -> None:
    pair, x = small(enumerated=True), bits()
    loss: Any = TraceEnum_ELBO(max_plate_nesting=1)
    bound = enumerated_elbo(pair, x)
    torch.testing.assert_close(torch.tensor(-loss.loss(pair.model, pair.guide, x)), bound.sum().detach(), **ROUNDING)
    torch.testing.assert_close(sampled_gradient(pair, loss, x), gradients(pair, -bound.sum()), **ROUNDING)
    assert (bound <= pair.exact_log_likelihood(x)).all()


class Exact(nn.Module):
    """The logits of p(z | x) for one group, up to a constant."""

    def __init__(self, pair: CategoricalVAE) -> None:
        super().__init__()
        self.pair = [pair]

    def forward(self, x: Tensor) -> Tensor:
        (pair,) = self.pair
        z = torch.eye(3).reshape(3, 1, 1, 3)
        return (pair.prior().log_prob(z) + pair.p_x(z).log_prob(x)).mT


def test_the_exact_posterior_makes_every_weight_and_the_enumerated_bound_log_p() -> None:
    pair, x = small(groups=1), bits()
    pair.encoder = Exact(pair)
    exact = pair.exact_log_likelihood(x)
    weights = pv.log_terms(pair, x, num_particles=7).log_weights
    torch.testing.assert_close(weights, exact.expand(7, 4), **ROUNDING)
    pair.enumerated = True
    ours = sampled_gradient(pair, TraceEnum_ELBO(max_plate_nesting=1), x)
    torch.testing.assert_close(ours, gradients(pair, -exact.sum()), **ROUNDING)


def test_the_score_functions_gradient_has_the_enumerated_one_as_its_mean() -> None:
    pair, x = small(groups=1), bits(2)
    draws = torch.stack([sampled_gradient(pair, Trace_ELBO(), x) for _ in range(1000)])
    exact = gradients(pair, -enumerated_elbo(pair, x).sum())
    # Some thirty entries at once: five standard errors, not four.
    assert ((draws.mean(0) - exact).abs() <= 5 * draws.std(0) / 1000**0.5 + 1e-10).all()


@pytest.mark.parametrize("temperature", [0.1, 1.0, 3.0])
def test_the_largest_entry_of_a_relaxed_draw_follows_the_probabilities(temperature: float) -> None:
    probabilities = torch.tensor([[0.1, 0.6, 0.3]])
    draws = RelaxedOneHots(probabilities.log(), torch.tensor(temperature)).rsample((20_000,))
    share = nn.functional.one_hot(draws.argmax(-1), 3).to(draws.dtype).mean(0)
    assert ((share - probabilities).abs() <= 4 * (probabilities * (1 - probabilities) / 20_000).sqrt()).all()


def test_straight_through_draws_are_one_hot_with_the_relaxed_draws_gradient() -> None:
    logits, weights = torch.randn(5, 2, 3, requires_grad=True), torch.randn(5, 2, 3)
    grads = []
    for straight in (True, False):
        torch.manual_seed(0)
        z = RelaxedOneHots(logits, torch.tensor(0.5), straight).rsample()
        grads.append(torch.autograd.grad((weights * z).sum(), logits)[0])
        if straight:
            assert torch.equal(z, nn.functional.one_hot(z.argmax(-1), 3).to(z.dtype))
            torch.testing.assert_close(
                RelaxedOneHots(logits, torch.tensor(0.5)).log_prob(z), OneHots(logits).log_prob(z.detach()), **ROUNDING
            )
    assert torch.equal(*grads)


def test_relaxed_training_closes_the_divergence_of_the_masses() -> None:
    pair, x = small(pv.GumbelSoftmax(0.7)).train(), bits()
    torch.manual_seed(0)
    closed = TraceMeanField_ELBO().loss(pair.model, pair.guide, x)
    torch.manual_seed(0)
    reconstruction = pv.site_terms(pair, x)["x"].log_model.sum()
    masses = OneHots(pair.encoder(x).unflatten(-1, (2, 3)))
    divergence = kl_divergence(masses.base_dist, pair.prior().base_dist).sum()
    torch.testing.assert_close(torch.tensor(closed), (divergence - reconstruction).detach(), **ROUNDING)


def test_what_is_reported_is_of_the_discrete_model_however_it_was_trained() -> None:
    pair = small(pv.GumbelSoftmax(1.0))
    x = bits(64)
    run = pv.fit(pair, x, epochs=2, batch_size=32, loss=TraceMeanField_ELBO(), validation=x[:16], progress=False)
    assert pair.train().training
    ll = pv.log_likelihood(pair, x[:16], num_particles=4000, seed=1)
    assert ((ll.per_datum - pair.exact_log_likelihood(x[:16])).abs() <= 4 * ll.standard_error + 1e-10).all()
    assert (ll.quantity, ll.discrete) == ("log p(x)", True)
    # The record holds one draw per datum: its mean over 16 has a quarter of one draw's standard deviation.
    weights = pv.log_terms(pair.eval(), x[:16], num_particles=1000).log_weights
    spread = float(weights.detach().var(0).mean().sqrt()) / 4
    exact = float(enumerated_elbo(pair, x[:16]).mean().detach())
    assert abs(-run.metrics[-1]["validation_loss"] - exact) <= 4 * spread
    assert all(torch.equal(z, z.round()) for z in pv.posterior(pair, x[:4], num_particles=3).latents.values())


def test_a_relaxed_guide_takes_objectives_and_a_discrete_one_does_not() -> None:
    x = (bits(),)
    check_loss(inspect(small(pv.GumbelSoftmax(0.5)), x), elbo, x, num_particles=1, uses_beta=False)
    with pytest.raises(ValueError, match=r"guide's site 'z' .*has no rsample"):
        check_loss(inspect(small(), x), elbo, x, num_particles=1, uses_beta=False)


def test_the_temperature_falls_while_training_and_the_recorded_step_sees_it() -> None:
    torch.manual_seed(0)
    pair = small(pv.GumbelSoftmax(pv.Annealed(1.0, 0.25, 2, geometric=True)))
    state = {name: value.clone() for name, value in pair.state_dict().items()}
    x, finals = bits(96), []
    for capture in (True, False):
        pair.load_state_dict(state)
        options: dict[str, Any] = {"lr": 1e-2, "loss": TraceMeanField_ELBO(), "seed": 0, "progress": False}
        pv.fit(pair, x, epochs=3, batch_size=16, capture=capture, **options)
        assert float(pair.relaxation.temperature()) == pytest.approx(0.25, rel=1e-12)
        finals.append(torch.cat([p.detach().flatten().clone() for p in pair.parameters()]))
    torch.testing.assert_close(*finals, **ROUNDING)


def test_annealed_numbers_go_where_they_should() -> None:
    linear, geometric = pv.Annealed(1.0, 3.0, 4), pv.Annealed(1.0, 4.0, 4, geometric=True)
    both = nn.ModuleList([linear, geometric])
    for epochs, values in ((0, (1.0, 1.0)), (2, (2.0, 2.0)), (4, (3.0, 4.0)), (9, (3.0, 4.0))):
        pv.advance(both, epochs)
        assert (float(linear()), float(geometric())) == pytest.approx(values, rel=1e-12)
    assert float(pv.Annealed(1.0, 3.0, 0)()) == 3.0


@pytest.mark.parametrize("gradient", ["relaxed", "straight-through", "score-function", "enumeration"])
def test_every_way_to_a_gradient_trains(gradient: Any) -> None:
    torch.manual_seed(0)
    enumerated = gradient == "enumeration"
    options = CategoricalVAERecipe(latent=2, categories=3, likelihood="bernoulli")
    options = options if enumerated else dataclasses.replace(options, gradient=gradient)
    # Two kinds of data, so that one categorical variable explains them.
    x = torch.ones(64, 1, 3, 3) * torch.arange(64).remainder(2).reshape(-1, 1, 1, 1)
    pair: Any = options.build(DataSet("blank", x, x, None, None, levels=2))
    loss = options.loss(pair, 64)
    if enumerated:
        pair, loss = CategoricalVAE(pair.x_shape, pair.prior, enumerated=True), TraceEnum_ELBO(max_plate_nesting=1)
    before = pair.exact_log_likelihood(x).mean()
    pv.fit(pair, x, epochs=20, batch_size=32, lr=3e-3, loss=loss, progress=False)
    assert pair.exact_log_likelihood(x).mean() > before
    assert pair.exact_log_likelihood(x).max() <= 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: pv.GumbelSoftmax(0.0), r"temperature goes from 0.0 to 0.0; it must be positive"),
        (lambda: pv.GumbelSoftmax(-1.0), r"it must be positive"),
        (lambda: pv.GumbelSoftmax(pv.Annealed(1.0, 0.0, 5)), r"from 1.0 to 0.0; it must be positive"),
        (lambda: pv.Annealed(1.0, 0.0, 5, geometric=True), r"from one positive number to another"),
        (lambda: pv.Annealed(1.0, math.nan, 5), r"all finite"),
        (lambda: pv.Annealed(1.0, 2.0, -1), r"epochs not negative"),
        (lambda: pv.OneHotPrior(0, 3), r"at least one group of two categories"),
        (lambda: pv.OneHotPrior(2, 1), r"at least one group of two categories"),
        (lambda: pv.OneHotPrior(2, 3, torch.tensor([0.5, 0.5, 0.5])), r"sum to 1; they sum to \[1.5\]"),
        (lambda: pv.OneHotPrior(2, 2, torch.tensor([1.5, -0.5])), r"must be positive"),
        (lambda: pv.OneHotPrior(2, 2, torch.tensor([math.nan, 0.5])), r"must be positive"),
        (lambda: pv.OneHotPrior(2, 3, torch.ones(3, 2) / 2), r"expected \(3,\) or \(2, 3\)"),
    ],
)
def test_bad_numbers_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_too_many_configurations_are_refused_before_any_step() -> None:
    pair, x = small(groups=9), bits()
    with pytest.raises(ValueError, match=r"3\^9 configurations are too many"):
        pair.exact_log_likelihood(x)
    with pytest.raises(ValueError, match=r"10\^20 configurations are too many"):
        CategoricalVAE((6,), pv.OneHotPrior(20, 10), enumerated=True)
    with pytest.raises(ValueError, match=r"leave one of them out"):
        CategoricalVAE((6,), pv.OneHotPrior(1, 2), relaxation=pv.GumbelSoftmax(), enumerated=True)
    assert len(pyro.get_param_store()) == 0
