"""A proposal fitted to each datum: exact where the posterior is Gaussian, whatever the guide, and honest elsewhere."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.likelihood import captured
from pyro_vae.models import LinearGaussianVAE


class OffGuide(LinearGaussianVAE):
    """Probabilistic PCA with a guide of another place and width than the posterior's."""

    def __init__(self, shift: float, scale: float) -> None:
        super().__init__(6, 3)
        self.moved, self.width = shift, scale

    def guide(self, x: Tensor) -> None:
        exact = self.exact_posterior(x)
        with pyro.plate("data", len(x)):
            loc = exact.mean + self.moved * exact.stddev
            pyro.sample("z", dist.Normal(loc, self.width * exact.stddev).to_event(1))


def settled(pair: pv.Pair, *batch: Tensor, num_particles: int = 1000, **settings: Any) -> pv.LogLikelihood:
    return pv.log_likelihood(
        pair, *batch, num_particles=num_particles, seed=0, proposal="auto", progress=False, **settings
    )


@pytest.mark.parametrize(("shift", "scale"), [(0.0, 0.1), (5.0, 1.0), (0.0, 10.0), (-30.0, 0.01)])
def test_a_gaussian_posterior_is_exact_whatever_the_guide(shift: float, scale: float) -> None:
    torch.manual_seed(0)
    pair, x = OffGuide(shift, scale), 1.5 * torch.randn(5, 6)
    ll = settled(pair, x, num_particles=50)
    # Every weight is p(x), up to the rounding of differences of gradients, which grow with the guide's distance.
    nats = 1e-9 * max(1.0, abs(shift)) / min(1.0, scale**0.5)
    torch.testing.assert_close(ll.per_datum, pair.exact_log_likelihood(x).detach(), rtol=0, atol=nats)
    torch.testing.assert_close(ll.curve[0], ll.per_datum, rtol=0, atol=nats)
    assert ll.proposals == ["fitted"] * 5


def test_a_guide_that_settles_a_datum_is_kept() -> None:
    torch.manual_seed(0)
    pair = pv.models.LinearGaussianVAE(5, 1)
    ll = settled(pair, torch.randn(4, 5))
    assert ll.proposals == ["guide"] * 4
    assert "4 of 4 (guide 4)" in repr(ll)


class Folded(pv.Pair):
    """z ~ N(0, 4), x ~ N(f(z), s²) for an f that many z share; the guide knows one of them."""

    x_shape = ()

    def __init__(self, fold: Callable[[Tensor], Tensor], noise: float, inverse: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(()))
        self.fold, self.noise, self.inverse = fold, noise, inverse

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 2.0))
            pyro.sample("x", dist.Normal(self.fold(z) + self.shift, self.noise), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.inverse(x))

    def exact(self, x: Tensor) -> Tensor:
        z = torch.linspace(-30, 30, 600_001)
        joint = dist.Normal(0.0, 2.0).log_prob(z) + dist.Normal(self.fold(z), self.noise).log_prob(x.unsqueeze(-1))
        return torch.logsumexp(joint, -1) + math.log(float(z[1] - z[0]))


def test_a_mode_that_the_guide_misses_is_found() -> None:
    pair = Folded(torch.abs, 0.3, lambda x: dist.Normal(x.abs(), 0.3))
    x = torch.tensor([2.0, 3.0, 4.0])
    guide = pv.log_likelihood(pair, x, num_particles=2000, seed=0, proposal="guide", progress=False)
    # The guide's estimate is log 2 low, with small errors and small k̂.
    torch.testing.assert_close(guide.per_datum, pair.exact(x) - math.log(2), rtol=0, atol=5e-3)
    assert guide.settled.all()
    ll = settled(pair, x)
    assert ll.settled.all()
    # The posterior's halves are Gaussian where |z| is.
    torch.testing.assert_close(ll.per_datum, pair.exact(x), rtol=0, atol=1e-6)


class Rate(pv.Pair):
    """z ~ Gamma(2, 1), x ~ Poisson(z), and a LogNormal guide far from the posterior."""

    x_shape = ()

    def __init__(self, prior: Callable[[], Any] = lambda: dist.Gamma(2.0, 1.0)) -> None:
        super().__init__()
        self.factor, self.prior = nn.Parameter(torch.ones(())), prior

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.prior())
            pyro.sample("x", dist.Poisson(self.factor * z), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.LogNormal(torch.zeros_like(x) - 1, 0.3))


def test_a_positive_latent_counts_its_jacobian() -> None:
    x = torch.tensor([0.0, 1.0, 5.0, 20.0])
    ll = settled(Rate(), x, num_particles=20_000)
    # The marginal is a negative binomial.
    exact = dist.GammaPoisson(2.0, 1.0).log_prob(x)
    assert bool(((ll.per_datum - exact).abs() < 4 * ll.standard_error).all())
    assert float(ll.standard_error.max()) < 0.01
    # Bounded weights whose largest ones rise steeply may look like a tail: one datum is called not settled.
    assert int(ll.settled.sum()) >= 3


class Summed(pv.models.LinearGaussianMixtureVAE):
    """A linear decoder and a mixture prior with its components summed out; a guide that knows none of them."""

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.prior())
            pyro.sample("x", dist.Normal(z @ self.weight.mT + self.bias, self.scale()).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.new_zeros(len(x), self.prior.size), 0.5).to_event(1))


def test_a_mixture_prior_is_settled() -> None:
    torch.manual_seed(0)
    pair = Summed(4, pv.MixtureOfGaussians(3, 2))
    x = pv.generate(pair, 10, seed=0).x
    ll = settled(pair, x, num_particles=4000)
    error = (ll.per_datum - pair.exact_log_likelihood(x).detach()).abs()
    assert bool((error[ll.settled] < 4 * ll.standard_error[ll.settled] + 1e-9).all())
    assert int(ll.settled.sum()) >= 9


@pytest.fixture(scope="module")
def trained() -> tuple[pv.Pair, Tensor]:
    """Return a VAE of binary digits, trained a little, in float32, and data."""
    torch.manual_seed(0)
    x = (pv.data.load("digits").train > 0.5).float()
    pair = pv.models.VAE((1, 8, 8), pv.StandardNormal(10), pv.Bernoulli()).float()
    pv.fit(pair, x[:1000], epochs=20, lr=5e-3, seed=0, progress=False)
    return pair, x[1000:1012]


def test_a_trained_pair_is_settled_above_the_guides_estimate(trained: tuple[pv.Pair, Tensor]) -> None:
    pair, x = trained
    guide = pv.log_likelihood(pair, x, num_particles=1000, seed=0, proposal="guide", progress=False)
    ll = settled(pair, x)
    assert ll.share_above_threshold <= guide.share_above_threshold
    # One datum's pilot may promise more than its estimate keeps.
    assert int(ll.settled.sum()) >= len(x) - 1
    much = pv.log_likelihood(pair, x, num_particles=100_000, seed=1, proposal="guide", progress=False)
    error = torch.hypot(ll.standard_error, much.standard_error)
    assert bool(((ll.per_datum - much.per_datum).abs() < 5 * error).all())
    assert ll.mean_monte_carlo_error < guide.mean_monte_carlo_error


def test_bits_depend_on_neither_company_nor_memory_nor_recording(
    trained: tuple[pv.Pair, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    pair, x = trained
    ll = settled(pair, x, num_particles=200)
    assert torch.equal(settled(pair, x.flip(0)[:5], num_particles=200).per_datum, ll.per_datum.flip(0)[:5])
    assert torch.equal(settled(pair, x, num_particles=200, memory=2**27).per_datum, ll.per_datum)
    monkeypatch.setattr(captured, "BLOCKS_BEFORE_RECORDING", 1)
    assert torch.equal(settled(pair, x, num_particles=200).per_datum, ll.per_datum)


def test_an_interrupted_evaluation_goes_on(trained: tuple[pv.Pair, Tensor], tmp_path: Path) -> None:
    pair, x = trained
    first, second = (settled(pair, x, num_particles=50, run_dir=tmp_path) for _ in range(2))
    assert torch.equal(first.per_datum, second.per_datum)
    assert first.proposals == second.proposals


def test_latents_that_cannot_be_fitted_leave_the_guide_with_a_reason() -> None:
    pair = pv.models.CategoricalVAE((4,), pv.OneHotPrior(2, 3), pv.Bernoulli(), pv.GumbelSoftmax(0.5))
    x = torch.randn(3, 4).gt(0).to(torch.get_default_dtype())
    ll = settled(pair, x, num_particles=50)
    assert re.search(r"no proposal was fitted +site 'z' is discrete", repr(ll))
    guide = pv.log_likelihood(pair, x, num_particles=50, seed=0, proposal="guide", progress=False)
    assert torch.equal(ll.per_datum, guide.per_datum)
    assert ll.proposals == ["guide"] * 3


def test_wrong_settings_are_refused(trained: tuple[pv.Pair, Tensor]) -> None:
    pair, x = trained
    with pytest.raises(ValueError, match="proposal is 'laplace'; it must be 'auto', 'guide', 'prior' or a program"):
        pv.log_likelihood(pair, x, proposal="laplace")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"a proposal fitted to one datum takes \d+ bytes, more than memory, 1000"):
        settled(pair, x, memory=1000)


def test_modes_that_no_start_led_to_are_seen_by_the_priors_draws() -> None:
    # More modes than the search has starts.
    pair = Folded(lambda z: torch.sin(3 * z), 0.1, lambda x: dist.Normal(x / 3, 0.05))
    x = torch.tensor([0.0, 0.4, -0.4])
    guide = pv.log_likelihood(pair, x, num_particles=2000, seed=0, proposal="guide", progress=False)
    # The guide's draws see nothing of the others: a nat is missing, and k̂ is small.
    assert bool((pair.exact(x) - guide.per_datum > 1.0).all())
    assert guide.settled.all()
    ll = settled(pair, x, num_particles=2000)
    off = (ll.per_datum - pair.exact(x)).abs() > 4 * ll.standard_error + 1e-9
    assert not bool((off & ll.settled).any())
