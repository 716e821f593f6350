"""Which proposal a datum's draws come from: own programs, tolerances, chains, and what cannot be answered."""

from __future__ import annotations

import math
import re
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as transforms
import pytest
import torch
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.distributions.flow import FlowDistribution
from pyro_vae.likelihood.fitting import choice
from pyro_vae.models import LinearGaussianVAE


class Counted(pv.Pair):
    """z ~ N(0, 1), x ~ Poisson(exp(z)), and a guide of some width around a rough mean."""

    x_shape = ()

    def __init__(self, scale: float = 0.5, shift: float = 0.0) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.zeros(()))
        self.scale, self.shift = scale, shift

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Poisson((self.rate + z).exp()), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            # The posterior's standard deviation is about that of 1 / (1 + x).
            width = (1 + x).rsqrt()
            pyro.sample("z", dist.Normal(x.clamp(min=0.5).log() * x / (1 + x) + self.shift, self.scale * width))

    def exact(self, x: Tensor) -> Tensor:
        z = torch.linspace(-12, 8, 40_001)
        joint = dist.Normal(0.0, 1.0).log_prob(z) + dist.Poisson(z.exp()).log_prob(x.unsqueeze(-1))
        return torch.logsumexp(joint, -1).detach() + math.log(float(z[1] - z[0]))


def counts(number: int) -> Tensor:
    torch.manual_seed(3)
    return torch.poisson(torch.randn(number).exp())


@pytest.mark.parametrize("scale", [0.6, 0.8, 1.1])
def test_intervals_cover_whatever_the_guides_width(scale: float) -> None:
    # Equal data have equal draws: the data are made unequal by a shift of the guide, and tell as many estimates.
    x = counts(60)
    covered, settled, total = 0, 0, 0
    for seed in range(4):
        pair = Counted(scale, 0.1 * seed)
        ll = pv.log_likelihood(pair, x.unique(), num_particles=400, seed=seed, progress=False)
        settled += int(ll.settled.sum())
        covered += int(((ll.per_datum - pair.exact(x.unique())).abs() < 1.96 * ll.standard_error).sum())
        total += len(ll.per_datum)
    # A pilot may promise more than the estimate keeps.
    assert settled >= 0.95 * total
    # Binomial: four standard errors below 95 %.
    assert covered / total > 0.95 - 4 * math.sqrt(0.95 * 0.05 / total)


def test_an_own_program_is_a_proposal() -> None:
    pair, x = Counted(0.01), counts(6)
    wide = Counted(1.3)
    own = pv.log_likelihood(pair, x, num_particles=2000, seed=0, progress=False, proposal=wide.guide)
    again = pv.log_likelihood(wide, x, num_particles=2000, seed=0, progress=False, proposal="guide")
    assert torch.equal(own.per_datum, again.per_datum)
    assert set(own.proposals) == {"own"}
    assert "6 of 6 (own 6)" in repr(own)
    assert bool(((own.per_datum - pair.exact(x)).abs() < 4 * own.standard_error).all())


def test_a_proposal_that_lacks_a_site_is_refused() -> None:
    def empty(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pass

    with pytest.raises(ValueError, match=r"the proposal, in the guide's place, does not fit the pair's model: .*'z'"):
        pv.log_likelihood(Counted(), counts(3), proposal=empty)


def test_the_priors_draws_are_the_naive_estimate() -> None:
    pair, x = Counted(), counts(4)
    settings: dict[str, Any] = {"num_particles": 50, "seed": 1, "progress": False}
    prior, naive = (
        pv.log_likelihood(pair, x, proposal="prior", **settings),
        pv.naive_log_likelihood(pair, x, **settings),
    )
    assert torch.equal(prior.per_datum, naive.per_datum)
    assert prior.proposals == ["prior"] * 4


@pytest.mark.parametrize("proposal", ["guide", "auto"])
def test_a_tolerance_gives_each_datum_the_draws_that_it_needs(proposal: Any) -> None:
    pair, x = Counted(1.2), torch.tensor([0.0, 1.0, 3.0, 9.0])
    settings: dict[str, Any] = {"seed": 0, "progress": False, "proposal": proposal}
    ll = pv.log_likelihood(pair, x, num_particles=64_000, tolerance=0.01, **settings)
    assert ll.draws is not None
    # Halvings of K, and not all of them.
    assert bool((torch.tensor(64_000) % ll.draws == 0).all())
    assert int(ll.draws.max()) < 64_000
    # Twice the draws that the pilot asks for: the errors are below the tolerance, and not far.
    assert float(ll.standard_error.max()) < 0.01
    assert float(ll.standard_error.max()) > 0.002
    assert re.search(r"error at most 0.01 nats +4 of 4 data", repr(ll))
    assert re.search(r"K +64000 at most; mean \d+", repr(ll))
    assert bool(((ll.per_datum - pair.exact(x)).abs() < 4 * ll.standard_error).all())
    # A curve as long as K's; a datum's last entries repeat.
    assert len(ll.curve) == 16
    assert torch.equal(ll.curve[-1], ll.curve[-2])
    few = pv.log_likelihood(pair, x, num_particles=64_000, tolerance=1e-6, **settings)
    assert bool((few.draws == 64_000).all())


def test_a_tolerance_must_be_positive() -> None:
    for tolerance in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=r"tolerance is .*; it is an error in nats per datum and must be positive"):
            pv.log_likelihood(Counted(), counts(2), tolerance=tolerance)


class Ring(pv.Pair):
    """z ~ N(0, I) in the plane, x ~ N(|z|, s²): the posterior is a ring, which no few Gaussians fill."""

    x_shape = ()

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.shift, self.scale = nn.Parameter(torch.zeros(())), scale

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.norm(dim=-1) + self.shift, self.scale), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.stack([x, 0 * x], -1), 0.1).to_event(1))

    def exact(self, x: Tensor) -> Tensor:
        # |z| has density r exp(−r² / 2).
        r = torch.linspace(1e-6, 10, 100_001)
        joint = r.log() - r**2 / 2 + dist.Normal(r, self.scale).log_prob(x.unsqueeze(-1))
        return torch.logsumexp(joint, -1).detach() + math.log(float(r[1] - r[0]))


def test_a_ring_is_settled_or_called_not_settled() -> None:
    for scale in (0.02, 0.1, 0.3):
        pair, x = Ring(scale), torch.tensor([1.0, 2.0])
        ll = pv.log_likelihood(pair, x, num_particles=2000, seed=0, progress=False)
        off = (ll.per_datum - pair.exact(x)).abs() > 4 * ll.standard_error
        assert not bool((off & ll.settled).any())


def test_chains_start_where_components_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    # A threshold that no pilot passes sends every datum to the chains.
    monkeypatch.setattr(choice, "trust_threshold", lambda count: -math.inf)
    monkeypatch.setattr(choice, "ENOUGH", -math.inf)
    pair, x = Counted(0.2), torch.tensor([0.0, 2.0, 7.0])
    ll = pv.log_likelihood(pair, x, num_particles=1000, seed=0, progress=False)
    assert ll.proposals == ["annealed"] * 3
    assert ll.draws.tolist() == [choice.CHAINS] * 3  # type: ignore[union-attr]
    assert bool(((ll.per_datum - pair.exact(x)).abs() < 4 * ll.standard_error).all())
    again = pv.log_likelihood(pair, x.flip(0), num_particles=1000, seed=0, progress=False)
    assert torch.equal(again.per_datum.flip(0), ll.per_datum)


@pytest.mark.parametrize(("shift", "scale"), [(3.0, 1.0), (0.0, 0.1)])
def test_a_wrong_guide_is_repaired(shift: float, scale: float) -> None:
    pair, x = Counted(scale, shift), torch.tensor([0.0, 1.0, 4.0, 30.0])
    guide, ll = (
        pv.log_likelihood(pair, x, num_particles=1000, seed=0, progress=False, proposal=proposal)
        for proposal in ("guide", "auto")
    )
    assert float((guide.per_datum - pair.exact(x)).abs().max()) > 0.05
    assert ll.settled.all()
    assert bool(((ll.per_datum - pair.exact(x)).abs() < 4 * ll.standard_error).all())


class Improper(LinearGaussianVAE):
    """A linear pair whose likelihood grows without end along the first latent."""

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), self.latent), 1.0).to_event(1))
            pyro.factor("run away", 50 * z[..., 0] ** 2)
            pyro.sample("x", dist.Normal(z @ self.weight.mT, self.scale()).to_event(1), obs=x)


def test_a_mode_that_runs_away_is_not_settled() -> None:
    torch.manual_seed(0)
    pair = LinearGaussianVAE(4, 2)
    pair.latent = 2
    pair.__class__ = Improper
    ll = pv.log_likelihood(pair, torch.randn(3, 4), num_particles=500, seed=0, progress=False)
    assert not ll.settled.any()


class PlanarGuide(LinearGaussianVAE):
    """A linear pair with a guide under a planar flow, which scores its own draws only."""

    def __init__(self) -> None:
        super().__init__(4, 2)
        self.planar = transforms.Planar(2)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            base = dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1)
            pyro.sample("z", FlowDistribution(base, [self.planar]))


def test_a_guide_that_scores_its_own_draws_only_is_left_out() -> None:
    torch.manual_seed(0)
    # Far from the guide, which is near the prior.
    pair, x = PlanarGuide(), 5 * torch.randn(3, 4)
    ll = pv.log_likelihood(pair, x, num_particles=50, seed=0, progress=False)
    torch.testing.assert_close(ll.per_datum, pair.exact_log_likelihood(x).detach(), rtol=0, atol=1e-9)
    assert pv.posterior(pair, x, seed=0, proposal="auto").latents["z"].shape == (100, 3, 2)
