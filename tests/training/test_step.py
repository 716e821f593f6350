"""One training step: what it maximises, what it refuses, and what it leaves when a loss is not finite."""

from __future__ import annotations

import copy
import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import ELBO, RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.inspection import inspect
from pyro_vae.models import VAE, LinearGaussianMixtureVAE, LinearGaussianVAE
from pyro_vae.objectives.bounds import elbo, iwae
from pyro_vae.objectives.loss import check_loss
from pyro_vae.pair.handlers import scaled_latents
from pyro_vae.pair.terms import LogTerms
from pyro_vae.pair.trace import log_terms, site_terms
from pyro_vae.training.step import NonFiniteLossError, eager_step, non_finite_sites

# Sums of a few hundred float64 terms: rounding stays below 1e-12 relative.
ROUNDING = {"rtol": 1e-11, "atol": 1e-11}
ELBOS = [Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO]


def loss_of(loss: ELBO, pair: pv.Pair, *batch: Tensor, beta: float = 1.0, seed: int = 0) -> float:
    torch.manual_seed(seed)
    with scaled_latents(beta):
        return float(loss.loss(pair.model, pair.guide, *batch))  # type: ignore[attr-defined]


def gradients(pair: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in pair.named_parameters() if p.grad is not None}


def small_vae(**kwargs: Any) -> VAE:
    return VAE((5,), pv.StandardNormal(2), **kwargs)


def small_srvae(transition: str = "delta") -> pv.models.SRVAE:
    return pv.models.SRVAE((1, 4, 4), scale=2, prior=pv.MixtureOfGaussians(3, 2), transition=transition)  # type: ignore[arg-type]


# β


@pytest.mark.parametrize("loss", ELBOS)
def test_beta_one_is_the_elbo(loss: type[ELBO]) -> None:
    pair, x = small_vae(), torch.randn(4, 5)
    torch.manual_seed(0)
    plain = loss().loss(pair.model, pair.guide, x)  # type: ignore[attr-defined]
    assert loss_of(loss(), pair, x) == plain


@pytest.mark.parametrize("beta", [0.0, 0.3, 4.0])
def test_beta_weighs_the_closed_divergence(beta: float) -> None:
    pair, x = small_vae(), torch.randn(4, 5)
    q = pair.q_z(x)
    divergence = float(torch.distributions.kl_divergence(q, pair.prior().expand([4])).sum().detach())
    plain = loss_of(TraceMeanField_ELBO(), pair, x)
    # −ELBO_β = −ELBO + (β − 1) KL, at the same draws.
    torch.testing.assert_close(
        loss_of(TraceMeanField_ELBO(), pair, x, beta=beta), plain + (beta - 1) * divergence, **ROUNDING
    )


@pytest.mark.parametrize("beta", [0.0, 0.3, 4.0])
@pytest.mark.parametrize("loss", [Trace_ELBO, TraceGraph_ELBO])
def test_beta_weighs_the_sampled_divergence(loss: type[ELBO], beta: float) -> None:
    pair, x = small_vae(), torch.randn(4, 5)
    torch.manual_seed(0)
    terms = log_terms(pair, x)
    expected = -float((terms.log_lik + beta * (terms.log_prior - terms.log_guide)).sum().detach())
    torch.testing.assert_close(loss_of(loss(), pair, x, beta=beta), expected, **ROUNDING)


@pytest.mark.parametrize("beta", [0.0, 2.0])
@pytest.mark.parametrize("transition", ["delta", "gaussian"])
def test_beta_leaves_a_point_mass_its_weight(transition: str, beta: float) -> None:
    pair, x = small_srvae(transition), torch.rand(3, 1, 4, 4)
    torch.manual_seed(0)
    terms = {name: float((t.log_guide - t.log_model).sum().detach()) for name, t in site_terms(pair, x).items()}
    kept = {"x", "y"} if transition == "delta" else {"x"}
    expected = sum(value * (1 if name in kept else beta) for name, value in terms.items())
    torch.testing.assert_close(loss_of(Trace_ELBO(), pair, x, beta=beta), expected, **ROUNDING)


def test_beta_ends_with_its_context() -> None:
    pair, x = small_vae(), torch.randn(4, 5)
    before = loss_of(Trace_ELBO(), pair, x)
    with pytest.raises(RuntimeError), scaled_latents(0.0):
        raise RuntimeError
    assert loss_of(Trace_ELBO(), pair, x) == before


# What is refused


def mixture_pair() -> LinearGaussianMixtureVAE:
    return LinearGaussianMixtureVAE(4, pv.MixtureOfGaussians(3, 2))


@pytest.mark.parametrize("objective", [elbo, iwae])
def test_objectives_need_reparameterised_guides(objective: Any) -> None:
    batch = (torch.randn(3, 4),)
    message = r"guide's site 'c' \(Categorical\) has no rsample.*Trace_ELBO, TraceGraph_ELBO .*or TraceEnum_ELBO"
    with pytest.raises(ValueError, match=message):
        check_loss(inspect(mixture_pair(), batch), objective, batch, num_particles=1, uses_beta=False)
    for loss in (Trace_ELBO(), TraceGraph_ELBO(), TraceEnum_ELBO()):
        check_loss(inspect(mixture_pair(), batch), loss, batch, num_particles=1, uses_beta=False)
    check_loss(inspect(LinearGaussianVAE(4, 2), batch), objective, batch, num_particles=3, uses_beta=False)


@pytest.mark.parametrize("loss", [elbo, iwae, RenyiELBO(num_particles=2)])
def test_beta_is_refused_where_there_is_no_divergence_term(loss: Any) -> None:
    with pytest.raises(ValueError, match=r"beta weighs the divergence of Pyro's ELBOs"):
        check_loss(
            inspect(small_vae(), (torch.randn(3, 5),)), loss, (torch.randn(3, 5),), num_particles=1, uses_beta=True
        )


@pytest.mark.parametrize("loss", [Trace_ELBO(num_particles=4), RenyiELBO(num_particles=2)])
def test_particles_are_counted_once(loss: Any) -> None:
    with pytest.raises(ValueError, match=r"num_particles is 4; a Pyro ELBO holds its own"):
        check_loss(
            inspect(small_vae(), (torch.randn(3, 5),)), loss, (torch.randn(3, 5),), num_particles=4, uses_beta=False
        )


# The step


def sgd(pair: nn.Module, lr: float = 1.0) -> torch.optim.Optimizer:
    return torch.optim.SGD(pair.parameters(), lr=lr)


def mean_elbo_gradients(pair: pv.Pair, x: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(0)
    loss = -log_terms(pair, x).log_weights.mean()
    names, parameters = zip(*pair.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


@pytest.mark.parametrize("loss", [Trace_ELBO(), TraceGraph_ELBO(), elbo])
def test_the_gradient_is_that_of_the_mean_per_datum(loss: Any) -> None:
    pair, x = small_vae(), torch.randn(6, 5)
    expected = mean_elbo_gradients(pair, x)
    before = copy.deepcopy(dict(pair.named_parameters()))
    torch.manual_seed(0)
    value = eager_step(pair, loss, sgd(pair))(x)
    torch.manual_seed(0)
    # The parameters have moved by minus their gradient, at a learning rate of one.
    for name, parameter in pair.named_parameters():
        torch.testing.assert_close(before[name] - parameter, expected[name], **ROUNDING)
    torch.testing.assert_close(value, -float(log_terms(_with(pair, before), x).log_weights.mean().detach()), **ROUNDING)
    assert all(parameter.grad is None for parameter in pair.parameters())


def _with(pair: Any, parameters: dict[str, Tensor]) -> Any:
    other = copy.deepcopy(pair)
    other.load_state_dict(parameters, strict=False)
    return other


def test_a_step_with_beta_uses_it() -> None:
    pair, x = small_vae(), torch.randn(6, 5)
    first, second = copy.deepcopy(pair), copy.deepcopy(pair)
    losses = []
    for other, beta in ((first, 1.0), (second, 0.0)):
        torch.manual_seed(0)
        losses.append(eager_step(other, TraceMeanField_ELBO(), sgd(other))(x, beta=beta))
    divergence = float(torch.distributions.kl_divergence(pair.q_z(x), pair.prior().expand([6])).mean().detach())
    torch.testing.assert_close(losses[0] - losses[1], divergence, **ROUNDING)


@pytest.mark.parametrize("clip_norm", [0.1, 1e6])
def test_clipping_bounds_the_whole_update(clip_norm: float) -> None:
    pair, x = small_vae(), 10 * torch.randn(6, 5)
    expected = mean_elbo_gradients(pair, x)
    norm = float(torch.stack([g.norm() for g in expected.values()]).norm())
    assert 0.1 < norm < 1e6
    before = [p.detach().clone() for p in pair.parameters()]
    torch.manual_seed(0)
    eager_step(pair, Trace_ELBO(), sgd(pair), clip_norm=clip_norm)(x)
    moved = [b - p.detach() for b, p in zip(before, pair.parameters(), strict=True)]
    length = float(torch.stack([m.norm() for m in moved]).norm())
    # torch divides by the norm plus 1e-6.
    assert math.isclose(length, min(norm, clip_norm), rel_tol=2e-6)
    # One factor for all parameters keeps the direction.
    for step, gradient in zip(moved, expected.values(), strict=True):
        torch.testing.assert_close(step * norm / length, gradient, rtol=1e-9, atol=1e-9)


def test_renyi_of_one_datum_is_iwae() -> None:
    pair, x = small_vae(), torch.randn(1, 5)
    others = copy.deepcopy(pair), copy.deepcopy(pair)
    losses = []
    for other, loss, particles in (
        (others[0], RenyiELBO(alpha=0, num_particles=5, vectorize_particles=True, max_plate_nesting=1), 1),
        (others[1], iwae, 5),
    ):
        torch.manual_seed(0)
        losses.append(eager_step(other, loss, sgd(other), num_particles=particles)(x))
    torch.testing.assert_close(*losses, **ROUNDING)
    for ours, theirs in zip(*(other.parameters() for other in others), strict=True):
        torch.testing.assert_close(ours, theirs, **ROUNDING)


def test_renyi_is_divided_after_its_logsumexp() -> None:
    # Every weight of an exact pair is log p(x): a scale inside the logsumexp would show.
    pair, x = LinearGaussianVAE(5, 2), torch.randn(8, 5)
    exact = pair.exact_log_likelihood(x).mean()
    expected = torch.autograd.grad(exact, pair.bias)[0]
    bias = pair.bias.detach().clone()
    value = eager_step(pair, RenyiELBO(alpha=0, num_particles=3), sgd(pair))(x)
    torch.testing.assert_close(value, -float(exact.detach()), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(pair.bias.detach() - bias, expected, rtol=1e-9, atol=1e-9)


class Broken(LinearGaussianVAE):
    """Its loss is NaN wherever x is above 100, since the scale there is the logarithm of a negative number."""

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            zero = torch.zeros_like(self.weight[0])
            z = pyro.sample("z", dist.Normal(zero, torch.ones_like(zero)).to_event(1))
            with pyro.poutine.mask(mask=x[:, 0] < 100):
                pyro.sample("fine", dist.Normal(z.sum(-1), 1.0), obs=x[:, 0])
            loc = torch.log(100 - x[:, :1]) + z @ self.weight.mT + self.bias
            pyro.sample("x", dist.Normal(loc, self.scale()).to_event(1), obs=x)


# Pyro warns of the NaN too, before the step refuses it.
@pytest.mark.filterwarnings("ignore:Encountered NaN")
@pytest.mark.parametrize("loss", [Trace_ELBO(), elbo])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_loss_that_is_not_finite_moves_nothing(loss: Any, momentum: float) -> None:
    pair = Broken(5, 2)
    optimizer = torch.optim.SGD(pair.parameters(), lr=0.01, momentum=momentum)
    good, bad = torch.randn(4, 5), torch.randn(4, 5)
    bad[2, 0] = 200.0
    with pyro.validation_enabled(False):
        step = eager_step(pair, loss, optimizer)
        step(good)
        before = copy.deepcopy(pair.state_dict())
        state = copy.deepcopy(optimizer.state_dict())
        with pytest.raises(NonFiniteLossError, match="the loss is nan"):
            step(bad)
        assert all(torch.equal(before[name], value) for name, value in pair.state_dict().items())
        assert str(state) == str(optimizer.state_dict())
        assert non_finite_sites(pair, bad) == ["x"]
        assert non_finite_sites(pair, good) == []
        # Nor does a gradient of the bad batch wait for the next step.
        torch.manual_seed(3)
        step(good)
    twin = Broken(5, 2)
    twin.load_state_dict(before)
    other = torch.optim.SGD(twin.parameters(), lr=0.01, momentum=momentum)
    other.load_state_dict(state)
    with pyro.validation_enabled(False):
        torch.manual_seed(3)
        eager_step(twin, loss, other)(good)
    assert all(torch.equal(a, b) for a, b in zip(pair.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_a_gradient_that_is_not_finite_moves_nothing(clip_norm: float | None) -> None:
    def steep(terms: LogTerms) -> Tensor:
        # Its value is finite, its derivative at zero 0 · ∞.
        return terms.log_weights.mean(0) + torch.sqrt(0 * terms.log_lik.abs()).mean(0)

    pair, x = LinearGaussianVAE(4, 2), torch.randn(5, 4)
    before = copy.deepcopy(pair.state_dict())
    with pytest.raises(NonFiniteLossError):
        eager_step(pair, steep, sgd(pair), clip_norm=clip_norm)(x)
    assert all(torch.equal(before[name], value) for name, value in pair.state_dict().items())


def test_a_gradient_from_before_does_not_enter() -> None:
    pair, x = small_vae(), torch.randn(4, 5)
    twin = copy.deepcopy(pair)
    for parameter in pair.parameters():
        parameter.grad = torch.ones_like(parameter)
    for other in (pair, twin):
        torch.manual_seed(0)
        eager_step(other, Trace_ELBO(), sgd(other))(x)
    assert all(torch.equal(a, b) for a, b in zip(pair.parameters(), twin.parameters(), strict=True))


def test_a_frozen_parameter_stays() -> None:
    pair, x = small_vae(), torch.randn(4, 5)
    frozen = next(pair.p_x.parameters()).requires_grad_(False)
    before = frozen.clone()
    eager_step(pair, Trace_ELBO(), sgd(pair), clip_norm=1.0)(x)
    assert torch.equal(frozen, before)


# Objectives


def test_objectives_on_closed_cases() -> None:
    # Weights 1 and 3 for one datum, 2 and 2 for the other.
    log_weights = torch.tensor([[1.0, 2.0], [3.0, 2.0]]).log()
    terms = LogTerms(log_weights + 1, log_weights.new_full((2, 2), -3.0), log_weights.new_full((2, 2), -2.0))
    torch.testing.assert_close(elbo(terms), torch.tensor([math.log(3) / 2, math.log(2)]))
    torch.testing.assert_close(iwae(terms), torch.tensor([math.log(2), math.log(2)]))


def test_one_particle_makes_both_objectives_equal() -> None:
    terms = LogTerms(torch.randn(1, 5), torch.randn(1, 5), torch.randn(1, 5))
    assert torch.equal(elbo(terms), iwae(terms))


def test_iwae_is_never_below_the_elbo_of_the_same_weights() -> None:
    # Jensen, draw by draw; one rounding allowed where the weights are equal.
    terms = LogTerms(*(10 * torch.randn(3, 7, 50)))
    assert (iwae(terms) >= elbo(terms) - 1e-12).all()


def test_iwae_does_not_overflow() -> None:
    zero = torch.zeros(3, 2)
    torch.testing.assert_close(iwae(LogTerms(zero - 1e5, zero, zero)), torch.full((2,), -1e5))


class TrainsAnotherModel(pv.Pair):
    """The model has a second latent while training, which the guide lacks."""

    x_shape = ()

    def __init__(self) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(()))

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            if self.training:
                z = z + pyro.sample("u", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.loc, 1.0))


def test_a_latent_that_the_guide_lacks_in_training_only_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the model samples \['u'\], the guide does not"):
        pv.fit(TrainsAnotherModel(), torch.randn(8), epochs=1, batch_size=4, progress=False)


@pytest.mark.parametrize(
    "objective", [lambda t: t.log_weights.mean(), lambda t: t.log_weights, lambda t: float(t.log_weights.sum())]
)
def test_an_objective_returns_one_number_per_datum(objective: Any) -> None:
    with pytest.raises(ValueError, match=r"returns .* for 3 data; an objective returns one number per datum"):
        pv.fit(LinearGaussianVAE(4, 2), torch.randn(8, 4), epochs=1, batch_size=4, loss=objective, progress=False)
