"""The ways in which code for latent-variable models goes wrong: a wrong version of each, an exact case, and ours.

Rows 1 to 15 of the table in ``test_pitfalls_table.py``, without those on programs. Each test writes the mistake
down as it is found in real code, shows by a case with a known answer that it is one, and holds ours to the same case.
Where ours refuses, that is what is tested.
"""

from __future__ import annotations

import copy
import math
import runpy
import warnings
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.importance import vectorized_importance_weights
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.conditionals.scales import LearnedScale
from pyro_vae.inspection import inspect
from pyro_vae.models import VAE, LinearGaussianMixtureVAE, LinearGaussianVAE
from pyro_vae.objectives.bounds import elbo, iwae
from pyro_vae.objectives.loss import check_loss
from pyro_vae.training.run_folder import load_state
from tests.support.off_guides import WrongScale

DRAWN = runpy.run_path(str(Path(__file__).resolve().parents[2] / "examples" / "evaluation" / "plot_pitfalls.py"))
ROUNDING = {"rtol": 1e-9, "atol": 1e-9}


def exact(pair: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        return pair.exact_log_likelihood(x)


def weights_of(pair: pv.Pair, x: Tensor, particles: int) -> Tensor:
    with torch.no_grad():
        return pv.log_terms(pair, x, num_particles=particles).log_weights


class Unit(pv.Pair):
    """y = c · mean(x) in a unit c, x ~ N(y/c, σ² I); the guide fixes y, or draws it from its exact posterior."""

    def __init__(self, unit: float, fixed: bool) -> None:
        super().__init__()
        self.x_shape, self.unit, self.fixed = (4,), unit, fixed

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Normal(0.0, self.unit / 2))
            pyro.sample("x", dist.Normal((y / self.unit).unsqueeze(-1).expand(*y.shape, 4), 0.9).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        variance = 1 / (4 / 0.9**2 + 4)
        mean = self.unit * variance * x.sum(-1) / 0.9**2
        q = dist.Delta(self.unit * x.mean(-1)) if self.fixed else dist.Normal(mean, self.unit * variance**0.5)
        with pyro.plate("data", len(x)):
            pyro.sample("y", q)


def test_01_a_point_mass_on_a_continuous_site_does_not_bound_log_p_of_x() -> None:
    x = torch.randn(50, 4)
    covariance = torch.full((4, 4), 0.25) + 0.9**2 * torch.eye(4)
    truth = dist.MultivariateNormal(torch.zeros(4), covariance).log_prob(x)
    # Wrong: the log-weights called log p(x). In another unit the same model gets any number, here one above the truth.
    coarse, fine = (weights_of(Unit(unit, fixed=True), x, 1)[0] for unit in (1.0, 1e-3))
    torch.testing.assert_close(fine - coarse, torch.full((50,), math.log(1000)), **ROUNDING)
    assert (fine > truth).all()
    # Ours: it is named for what it is; with a density on y it is log p(x), in every unit.
    assert pv.log_likelihood(Unit(1e-3, fixed=True), x, num_particles=1).quantity == "log p(x, y)"
    for unit in (1.0, 1e-3):
        ll = pv.log_likelihood(Unit(unit, fixed=False), x, num_particles=3)
        assert ll.quantity == "log p(x)"
        torch.testing.assert_close(ll.per_datum, truth, **ROUNDING)


def test_02_a_subsampling_plate_scales_inside_the_logsumexp() -> None:
    class Subsampled(WrongScale):
        def model(self, x: Tensor) -> None:
            with pyro.plate("data", 20 * len(x), subsample_size=len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(z @ self.weight.mT + self.bias, self.scale()).to_event(1), obs=x)

        def guide(self, x: Tensor) -> None:
            q = self.exact_posterior(x)
            with pyro.plate("data", 20 * len(x), subsample_size=len(x)):
                pyro.sample("z", dist.Normal(q.mean, self.factor * q.stddev).to_event(1))

    pair, x = Subsampled(1.4), torch.randn(1, 3)
    loss = RenyiELBO(alpha=0, num_particles=2000, vectorize_particles=True, max_plate_nesting=1)
    # Wrong: log-mean of w^20 in place of 20 log-mean of w. By Jensen it lies above, here above 20 log p(x) by nats.
    assert -loss.loss(pair.model, pair.guide, x) > 20 * float(exact(pair, x)) + 3
    with pytest.raises(ValueError, match=r"plate 'data' subsamples"):
        pv.log_terms(pair, x)
    # Ours: no scale in the pair, so that the bound stays one.
    whole = WrongScale(1.4)
    ll = pv.log_likelihood(whole, x, num_particles=2000, seed=0, proposal="guide")
    assert abs(float(ll.per_datum - exact(whole, x))) <= 4 * float(ll.standard_error)


def test_03_importance_weights_of_a_batch_are_not_weights_of_its_data() -> None:
    pair, x = WrongScale(1.4), torch.randn(1000, 3)
    with torch.no_grad():
        joint, _, _ = vectorized_importance_weights(pair.model, pair.guide, x, num_samples=200, max_plate_nesting=1)
    assert joint.shape == (200,)
    truth = float(exact(pair, x).sum())
    # Wrong: one weight for a thousand latents has the variance of their product.
    assert float(torch.logsumexp(joint, 0)) - math.log(200) < truth - 3
    ll = pv.log_likelihood(pair, x, num_particles=200, seed=0, proposal="guide")
    error = float((ll.standard_error**2).sum().sqrt())
    assert abs(float(ll.per_datum.sum()) - truth) <= 4 * error


class BottomUp(pv.Pair):
    """z₁ → z₂ → x with the exact posterior factorised the other way, q(z₂ | x) q(z₁ | z₂)."""

    def __init__(self) -> None:
        super().__init__()
        self.x_shape = ()

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            first = pyro.sample("z1", dist.Normal(0.0, 1.0))
            second = pyro.sample("z2", dist.Normal(first, 1.0))
            pyro.sample("x", dist.Normal(second, 1.0), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            second = pyro.sample("z2", dist.Normal(2 * x / 3, (2 / 3) ** 0.5))
            pyro.sample("z1", dist.Normal(second / 2, 0.5**0.5))


def test_04_closed_divergences_are_wrong_for_bottom_up_guides() -> None:
    pair, x = BottomUp(), torch.randn(5)
    truth = dist.Normal(0.0, 3**0.5).log_prob(x)
    torch.testing.assert_close(weights_of(pair, x, 4), truth.expand(4, 5), **ROUNDING)
    assert Trace_ELBO().loss(pair.model, pair.guide, x) == pytest.approx(-float(truth.sum()), rel=1e-9)
    # Wrong: it takes z₂'s prior at a z₁ drawn from z₂'s own posterior, as if z₁ had come first.
    wrong = TraceMeanField_ELBO(num_particles=2000, vectorize_particles=True, max_plate_nesting=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss = wrong.loss(pair.model, pair.guide, x)
    assert abs(loss + float(truth.sum())) > 1


def test_05_a_plain_module_is_not_trained_by_svi() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loc = nn.Parameter(torch.zeros(()))

        def model(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(self.loc, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        def guide(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(x / 2 + self.loc, 1.0))

    class AsPair(Plain, pv.Pair):
        model, guide = Plain.model, Plain.guide

    x = torch.randn(20) + 3
    for module, moves in ((Plain(), False), (AsPair(), True)):
        with warnings.catch_warnings():
            # Pyro says that it found no parameters, and goes on.
            warnings.simplefilter("ignore")
            SVI(module.model, module.guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO()).step(x)
        assert (float(module.loc.detach()) != 0) == moves


class Switch(pv.Pair):
    """c ~ Bernoulli(½), x ~ N(2c, 1), with q(c = 1) = σ(φ) for every x."""

    def __init__(self) -> None:
        super().__init__()
        self.x_shape = ()
        self.logit = nn.Parameter(torch.tensor(-1.0))

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(2 * c, 1.0), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("c", dist.Bernoulli(logits=self.logit))

    def exact_elbo(self, x: Tensor) -> Tensor:
        on = torch.sigmoid(self.logit)
        log_joint = [math.log(0.5) + dist.Normal(mean, 1.0).log_prob(x) for mean in (0.0, 2.0)]
        entropy = -(on * on.log() + (1 - on) * (1 - on).log())
        return (1 - on) * log_joint[0] + on * log_joint[1] + entropy


def test_08_autograd_through_the_weights_misses_how_discrete_draws_change() -> None:
    pair, x = Switch(), torch.full((4000,), 1.8)
    (truth,) = torch.autograd.grad(pair.exact_elbo(x[:1]).sum(), pair.logit)
    (wrong,) = torch.autograd.grad(elbo(pv.log_terms(pair, x)).mean(), pair.logit)
    # Wrong: all that is left is −E ∂ log q, which is zero; its draws spread by √(σ(1 − σ)).
    assert abs(float(wrong)) <= 4 * 0.45 / 4000**0.5
    assert float(truth) > 0.3
    with pytest.raises(ValueError, match=r"site 'c' \(Bernoulli\) has no rsample.*TraceGraph_ELBO"):
        pv.fit(pair, x, epochs=1, loss=elbo, progress=False)


def test_09_a_mixture_in_the_guide_gives_its_parameters_no_path() -> None:
    class MixtureGuide(LinearGaussianVAE):
        def __init__(self) -> None:
            super().__init__(3, 2)
            self.q = pv.MixtureOfGaussians(2, 2)

        def guide(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("z", self.q())

    pair, x = MixtureGuide(), torch.randn(6, 3)
    # Wrong: the draws do not depend on the means, as far as autograd knows.
    assert not pair.q().sample((3,)).requires_grad
    assert pair.q().component_distribution.rsample((3,)).requires_grad
    with pytest.raises(ValueError, match=r"site 'z' \(GaussianMixture\) has no rsample"):
        check_loss(inspect(pair, (x,)), iwae, (x,), num_particles=2, uses_beta=False)
    assert any("make its component a site" in f.message for f in pv.testing.check_pair(pair, x))


@pytest.mark.parametrize("name", DRAWN["WRONG"])
def test_10_estimators_of_the_likelihood(name: str) -> None:
    # As the example draws them: one exact case, on which every formula that was found in use is wrong.
    pair = DRAWN["Wide"](6, 2)
    x = pv.generate(pair, 100).x
    ours = pv.log_likelihood(pair, x, num_particles=2000, proposal="guide")
    with torch.no_grad():
        terms = pv.log_terms(pair, x, num_particles=2000)
        truth, wrong = float(exact(pair, x).mean()), float(DRAWN["WRONG"][name](terms.log_weights, terms))
    assert abs(ours.mean - truth) <= 4 * ours.mean_monte_carlo_error
    assert abs(wrong - truth) > 20 * ours.mean_monte_carlo_error
    # The wrong sign of the result: a "negative log-likelihood" that grows as the model improves.
    assert abs(-ours.mean - truth) > 1


def test_10_rounding_the_number_of_samples_and_dividing_by_the_one_asked_for() -> None:
    pair, x = LinearGaussianVAE(4, 2), torch.randn(6, 4)
    used = torch.cat([weights_of(pair, x, 4) for _ in range(10 // 4)])
    wrong = torch.logsumexp(used, 0) - math.log(10)
    torch.testing.assert_close(wrong, exact(pair, x) - math.log(10 / 8), **ROUNDING)
    ours = pv.log_likelihood(pair, x, num_particles=10, memory=6000)
    torch.testing.assert_close(ours.per_datum, exact(pair, x), **ROUNDING)


def test_10_a_prior_written_into_the_estimator() -> None:
    pair, x = LinearGaussianMixtureVAE(4, pv.MixtureOfGaussians(3, 2, means=torch.randn(3, 2) * 3)), torch.randn(6, 4)
    terms = pv.site_terms(pair, x, num_particles=2000)
    z = pv.posterior(pair, x, num_particles=2000, seed=0).latents["z"]
    standard = dist.Normal(torch.zeros(2), 1.0).to_event(1).log_prob(z)
    with torch.no_grad():
        log_weights = standard + terms["x"].log_model - terms["c"].log_guide - terms["z"].log_guide
    wrong = torch.logsumexp(log_weights, 0) - math.log(2000)
    assert (wrong - exact(pair, x)).abs().min() > 0.05
    ours = pv.log_likelihood(pair, x, num_particles=3)
    torch.testing.assert_close(ours.per_datum, exact(pair, x), **ROUNDING)


def test_10_evaluating_through_svi_step_trains_on_the_test_data() -> None:
    pair, x = VAE((4,), pv.StandardNormal(2)), torch.randn(6, 4)
    before = copy.deepcopy(pair.state_dict())
    pv.log_likelihood(pair, x, num_particles=3)
    assert all(torch.equal(before[name], value) for name, value in pair.state_dict().items())
    SVI(pair.model, pair.guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO()).step(x)
    assert not all(torch.equal(before[name], value) for name, value in pair.state_dict().items())


def test_11_a_mean_over_pixels_is_another_beta() -> None:
    pair, x = VAE((6,), pv.StandardNormal(2)), torch.randn(5, 6)
    loss = pv.analytic_loss(pair, x)._asdict()
    wrong = loss["x"] / 6 + loss["z"]
    # It is a sixth of the loss at β = 6, and no bound on anything at β = 1.
    torch.testing.assert_close(6 * wrong, loss["x"] + 6 * loss["z"], **ROUNDING)
    oracle, data = LinearGaussianVAE(6, 2), torch.randn(5, 6)
    terms = pv.log_terms(oracle, data)
    torch.testing.assert_close(elbo(terms), oracle.exact_log_likelihood(data), **ROUNDING)
    averaged = (terms.log_lik / 6 + terms.log_prior - terms.log_guide)[0]
    assert (averaged - oracle.exact_log_likelihood(data)).abs().min() > 0.01


def test_12_gray_values_have_no_bernoulli_likelihood() -> None:
    gray = torch.linspace(0, 1, 2001)
    for logits in (-2.0, 0.0, 0.7):
        wrong = dist.Bernoulli(logits=torch.tensor(logits), validate_args=False).log_prob(gray).exp()
        ours = dist.ContinuousBernoulli(logits=torch.tensor(logits)).log_prob(gray).exp()
        # ∫ p(x) dx over [0, 1] by the trapezoidal rule, whose error here is below 1e-6.
        assert float(torch.trapezoid(wrong, gray)) < 0.9
        assert float(torch.trapezoid(ours, gray)) == pytest.approx(1, abs=1e-6)
    pair = VAE((4,), pv.StandardNormal(2), pv.Bernoulli())
    with pytest.raises(ValueError, match="outside the support of site 'x'"):
        pv.fit(pair, torch.rand(8, 4), epochs=1, batch_size=4, progress=False)


def test_13_a_learned_scale_without_a_floor_runs_to_zero() -> None:
    # A perfect fit: −log N(0; 0, γ²) falls without end with log γ; a floor stops it.
    raw = torch.tensor([-10.0, -100.0, -1000.0])
    wrong = dist.Normal(0.0, raw.exp(), validate_args=False).log_prob(torch.zeros(()))
    assert float(wrong[1]) > 90
    assert not torch.isfinite(wrong[2])
    scale = LearnedScale(0.5, floor=1e-3)
    for value in raw:
        for parameter in scale.parameters():
            nn.init.constant_(parameter, float(value))
        assert float(scale().detach()) >= 1e-3


class _Runs:
    """What a downloaded checkpoint may hold: a call that unpickling makes."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_14_loading_a_pickle_runs_it(tmp_path: Path) -> None:
    mark, file = tmp_path / "mark", tmp_path / "state.pt"
    torch.save({"model": _Runs(mark)}, file)
    with pytest.raises(ValueError, match=r"damaged, or no checkpoint"):
        load_state(file, "VAE")
    assert not mark.exists()
    # Wrong.
    torch.load(file, weights_only=False)
    assert mark.exists()


def test_15_batch_statistics_couple_the_data() -> None:
    encoder = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
    pair, x = VAE((4,), pv.StandardNormal(2), encoder=encoder), torch.randn(6, 4)
    others = torch.cat([x[:1], 5 * x[1:]])
    # Wrong: the first datum's posterior changes with its neighbours.
    assert not torch.allclose(pair.q_z(x).mean[0], pair.q_z(others).mean[0], rtol=1e-3)
    assert any("BatchNorm" in finding.message for finding in pv.testing.check_pair(pair, x))
    ours = [pv.log_likelihood(pair, data, num_particles=1, seed=0).per_datum[0] for data in (x, others)]
    torch.testing.assert_close(*ours, **ROUNDING)
