"""EM is coordinate ascent on the ELBO: the bound touches log p(x) after every E-step and never falls."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.mixture import GaussianMixture as SklearnMixture
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.models import GaussianMixture, LinearGaussianVAE
from pyro_vae.training.em import HasExactSteps

# Sums over a few hundred data and small Cholesky factors.
ROUNDING = {"rtol": 1e-9, "atol": 1e-9}


def correlated(size: int = 200) -> Tensor:
    return torch.randn(size, 5) @ torch.randn(5, 5) + torch.randn(5)


def clustered(size: int = 300) -> Tensor:
    centres = torch.tensor([[-2.0, 0], [2, 1], [0, 3]])
    return centres[torch.arange(size) % 3] + torch.randn(size, 2) * torch.tensor([0.7, 1.1])


def mixture(x: Tensor, components: int = 3) -> GaussianMixture:
    return GaussianMixture(pv.MixtureOfGaussians(components, x.shape[1], means=x[:components]), floor=0.0)


CASES = {"pca": (lambda x: LinearGaussianVAE(5, 2), correlated), "mixture": (mixture, clustered)}


@pytest.mark.parametrize("case", CASES)
def test_the_elbo_is_the_log_likelihood_after_every_e_step(case: str) -> None:
    make, draw = CASES[case]
    x = draw()
    pair = make(x)
    for _ in range(10):
        q = pair.e_step(x)
        torch.testing.assert_close(pair.elbo(x, q), pair.exact_log_likelihood(x), **ROUNDING)
        torch.testing.assert_close(pv.log_terms(pair, x).log_weights[0], pair.exact_log_likelihood(x), **ROUNDING)
        pair.m_step(x, q)


@pytest.mark.parametrize("case", CASES)
def test_no_step_lowers_the_elbo(case: str) -> None:
    make, draw = CASES[case]
    x = draw()
    run = pv.em(make(x), x, steps=40, tolerance=0)
    assert len(run.after_e) == len(run.after_m) + 1 == len(run.seconds) == 41
    path = [value for both in zip(run.after_e, run.after_m, strict=False) for value in both] + [run.after_e[-1]]
    # Both kinds of step: E closes the gap, M climbs. Rounding of a mean of a few nats.
    assert all(after - before > -1e-12 for before, after in pairwise(path))
    assert run.after_m[0] - run.after_e[0] > 0.01
    assert run.after_e[1] - run.after_m[0] > 1e-4
    assert run.after_e[-1] == pytest.approx(float(run.pair.exact_log_likelihood(x).detach().mean()), rel=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_an_m_step_leaves_no_gradient_of_the_elbo(case: str) -> None:
    make, draw = CASES[case]
    x = draw()
    pair = make(x)
    with torch.no_grad():
        q = pair.e_step(x)
    pair.m_step(x, q)
    gradients = torch.autograd.grad(pair.elbo(x, q).mean(), list(pair.parameters()))
    for gradient in gradients:
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), **ROUNDING)


@pytest.mark.parametrize("case", CASES)
def test_any_other_q_is_below_the_likelihood(case: str) -> None:
    make, draw = CASES[case]
    x = draw()
    pair = make(x)
    with torch.no_grad():
        other = make(x)
        for parameter in other.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        assert (pair.elbo(x, other.e_step(x)) < pair.exact_log_likelihood(x)).all()


def test_probabilistic_pca_ends_at_sklearns_maximum() -> None:
    x = correlated()
    run = pv.em(LinearGaussianVAE(5, 2), x, steps=5000, tolerance=1e-13)
    assert run.converged
    oracle = PCA(2).fit(x.numpy())
    # scikit-learn divides by N − 1; with the covariance of the maximum, over N, its score is the maximum itself.
    oracle.explained_variance_ *= (len(x) - 1) / len(x)
    oracle.noise_variance_ *= (len(x) - 1) / len(x)
    assert run.after_e[-1] == pytest.approx(oracle.score(x.numpy()), abs=1e-9)
    covariance = run.pair.weight @ run.pair.weight.mT + run.pair.scale() ** 2 * torch.eye(5)
    # A gain of 1e-13 per step leaves the parameters within its root, times the rate of convergence.
    torch.testing.assert_close(covariance.detach(), torch.from_numpy(oracle.get_covariance()), rtol=1e-4, atol=1e-4)


def test_each_step_on_a_mixture_is_sklearns() -> None:
    x = clustered()
    pair = mixture(x)
    with torch.no_grad():
        start = pair.components
        oracle = SklearnMixture(
            3,
            covariance_type="diag",
            reg_covar=0.0,
            tol=0.0,
            max_iter=25,
            weights_init=start.logits.softmax(-1).numpy(),
            means_init=start.means.numpy().copy(),
            precisions_init=np.exp(-2 * start.log_scales.numpy()),
        )
        # It stops at its limit of steps, as it is meant to, and says so.
        with pytest.warns(UserWarning, match="did not converge"):
            oracle.fit(x.numpy())
    run = pv.em(pair, x, steps=25, tolerance=0)
    components = pair.components
    torch.testing.assert_close(components.logits.softmax(-1).detach(), torch.from_numpy(oracle.weights_), **ROUNDING)
    torch.testing.assert_close(components.means.detach(), torch.from_numpy(oracle.means_), **ROUNDING)
    variances = (2 * components.log_scales).exp().detach()
    torch.testing.assert_close(variances, torch.from_numpy(oracle.covariances_), **ROUNDING)
    assert run.after_e[-1] == pytest.approx(oracle.score(x.numpy()), abs=1e-10)


def test_a_component_that_no_datum_belongs_to_stays_where_it_is() -> None:
    x = clustered()
    pair = GaussianMixture(pv.MixtureOfGaussians(2, 2, means=torch.tensor([[0.0, 0], [1e6, 0]])))
    run = pv.em(pair, x, steps=5)
    assert math.isfinite(run.after_e[-1])
    torch.testing.assert_close(pair.components.means[1].detach(), torch.tensor([1e6, 0]))
    torch.testing.assert_close(pair.components.means[0].detach(), x.mean(0), **ROUNDING)


def test_one_component_is_a_gaussian_after_one_step() -> None:
    x = clustered()
    pair = mixture(x, 1)
    run = pv.em(pair, x, steps=50)
    assert run.converged
    assert len(run.after_m) == 2
    torch.testing.assert_close(pair.components.means[0].detach(), x.mean(0), **ROUNDING)
    torch.testing.assert_close((2 * pair.components.log_scales[0]).exp().detach(), x.var(0, correction=0), **ROUNDING)


def test_a_component_on_one_datum_is_kept_from_a_point() -> None:
    x = torch.cat([torch.zeros(20, 2), torch.full((1, 2), 50.0)])
    pair = GaussianMixture(pv.MixtureOfGaussians(2, 2, means=torch.tensor([[0.0, 0], [50, 50]])), floor=1e-4)
    pv.em(pair, x, steps=5)
    variances = (2 * pair.components.log_scales).exp().detach()
    torch.testing.assert_close(variances, torch.full((2, 2), 1e-4), **ROUNDING)


def test_a_collapse_without_a_floor_is_told() -> None:
    x = torch.cat([torch.zeros(20, 2), torch.full((1, 2), 50.0)])
    pair = GaussianMixture(pv.MixtureOfGaussians(2, 2, means=torch.tensor([[0.0, 0], [50, 50]])), floor=0.0)
    with pytest.raises(ValueError, match="collapsed onto a point"):
        pv.em(pair, x, steps=5)


class GaussianOfUnitScale(pv.Pair):
    """A user's own pair, x ~ N(m, I) with an idle latent: it has what em asks for, and nothing else of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.x_shape, self.mean = (2,), nn.Parameter(torch.zeros(2))

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(self.mean, 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    def e_step(self, x: Tensor) -> None:
        return None

    def elbo(self, x: Tensor, q: None) -> Tensor:
        return dist.Normal(self.mean, 1.0).to_event(1).log_prob(x)

    def m_step(self, x: Tensor, q: None) -> None:
        self.mean.copy_(x.mean(0))


def test_em_asks_for_three_methods_and_no_class() -> None:
    pair, x = GaussianOfUnitScale(), clustered()
    assert isinstance(pair, HasExactSteps)
    run = pv.em(pair, x)
    torch.testing.assert_close(pair.mean.detach(), x.mean(0))
    assert run.after_e[-1] == pytest.approx(float(pv.log_terms(pair, x).log_weights.detach().mean()), rel=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pair": pv.models.VAE((5,), pv.StandardNormal(2))}, "has no exact steps"),
        ({"steps": 0}, "steps is 0"),
        ({"tolerance": -1.0}, "tolerance is -1.0"),
        ({"tolerance": math.nan}, "tolerance is nan"),
        ({"x": torch.zeros(3, 4, dtype=torch.float64)}, "expects"),
        ({"x": torch.full((3, 5), math.nan, dtype=torch.float64)}, "NaN or infinite"),
    ],
)
def test_what_em_cannot_do_is_refused(change: dict, message: str) -> None:
    arguments = {"pair": LinearGaussianVAE(5, 2), "x": torch.randn(6, 5), **change}
    before = {name: value.clone() for name, value in arguments["pair"].state_dict().items()}
    with pytest.raises(ValueError, match=message):
        pv.em(**arguments)
    torch.testing.assert_close(arguments["pair"].state_dict(), before, rtol=0, atol=0)


def test_a_negative_floor_is_refused() -> None:
    with pytest.raises(ValueError, match="floor is -1"):
        GaussianMixture(pv.MixtureOfGaussians(2, 2), floor=-1)
