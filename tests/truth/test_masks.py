"""Masked entries count nowhere, scaled sites are refused wherever a number is asked for."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.distributions.graph import InnerProductGraph
from pyro_vae.distributions.kl import kl_standard_normal
from pyro_vae.objectives.graph import BalancedGraphLoss
from pyro_vae.objectives.reconstruction import reconstruction

ROUNDING = {"rtol": 1e-10, "atol": 1e-10}
STEPS = 3


class Steps(pv.Pair):
    """z_t ~ N(0, 1), x_t ~ N(b z_t, 1/4) for the steps t < length; q(z_t | x) = N(m, 1/4)."""

    def __init__(self, where: str = "handler", guided: bool = True, reads: bool = False) -> None:
        super().__init__()
        self.x_shape, self.where, self.guided, self.reads = (STEPS,), where, guided, reads
        self.b, self.m = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.tensor(2.0))

    def draw(self, t: int, q: Any, length: Tensor, masked: bool = True) -> Tensor:
        mask = t < length
        if not masked:
            return pyro.sample(f"z_{t}", q)
        if self.where == "handler":
            with poutine.mask(mask=mask):
                return pyro.sample(f"z_{t}", q)
        return pyro.sample(f"z_{t}", q.mask(mask))

    def model(self, x: Tensor, length: Tensor) -> None:
        with pyro.plate("data", len(x)):
            zs = [self.draw(t, dist.Normal(x.new_zeros(len(x)), 1.0), length) for t in range(STEPS)]
            z = torch.stack(torch.broadcast_tensors(*zs), -1)
            z = z if not self.reads else z.sum(-1, keepdim=True).expand_as(z)
            entries = dist.Normal(self.b * z, 0.5)
            pyro.sample("x", entries.mask(torch.arange(STEPS) < length[:, None]).to_event(1), obs=x)

    def guide(self, x: Tensor, length: Tensor) -> None:
        with pyro.plate("data", len(x)):
            for t in range(STEPS):
                self.draw(t, dist.Normal(self.m + 0 * x[:, t], 0.5), length, self.guided)


def steps(count: int = 400) -> tuple[Tensor, Tensor]:
    """Return data of which a tenth has three steps, the others one."""
    length = torch.where(torch.arange(count) < count // 10, STEPS, 1)
    return torch.randn(count, STEPS) * (torch.arange(STEPS) < length[:, None]), length


# KL(N(2, 1/4) ‖ N(0, 1)).
KL = math.log(2) + 1.625


@pytest.mark.parametrize("where", ["handler", "distribution"])
def test_the_report_counts_the_steps_that_a_datum_has(where: str) -> None:
    pair, batch = Steps(where), steps()
    report = pv.collapse_report(pair, *batch, num_particles=20, seed=0)
    shares = [1.0, 0.1, 0.1]
    for t, share in enumerate(shares):
        site = report.sites[f"z_{t}"]
        assert site.kl == pytest.approx(KL * share, rel=1e-10)
        assert site.kl_per_dimension is not None
        assert float(site.kl_per_dimension) == pytest.approx(KL * share, rel=1e-10)
        assert site.active is not None
        assert not site.active.any()
    # The densities of two data with other masks are of other entries, and no mixture of them is one.
    assert report.mutual_information is None
    terms = pv.site_terms(pair, *batch, num_particles=4000)
    for t, share in enumerate(shares):
        log_ratio = (terms[f"z_{t}"].log_guide - terms[f"z_{t}"].log_model).mean(0)
        # A draw's log q − log p is log 2 + 2 + e − 3e²/8, of deviation below 1.5; there are 4000 × 40 draws or more.
        assert float(log_ratio.mean().detach()) == pytest.approx(KL * share, abs=4 * 1.5 / math.sqrt(4000 * 40))


class Varied(pv.Pair):
    """One unit whose posterior mean is x for data that have it, and 100 x, unread, for those that have not."""

    x_shape = (1,)

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(1.0))

    def model(self, x: Tensor, has: Tensor) -> None:
        with pyro.plate("data", len(x)), poutine.mask(mask=has):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor, has: Tensor) -> None:
        loc = torch.where(has[:, None], self.gain * x, 100 * x)
        with pyro.plate("data", len(x)), poutine.mask(mask=has):
            pyro.sample("z", dist.Normal(loc, 0.5).to_event(1))


def test_units_are_active_by_the_data_that_have_them() -> None:
    x, has = torch.randn(200, 1), torch.arange(200) < 50
    report = pv.collapse_report(Varied(), x, has, num_particles=5, seed=0).sites["z"]
    assert report.mean_variance is not None
    torch.testing.assert_close(report.mean_variance, x[has].var(0), **ROUNDING)


def test_log_likelihoods_are_of_the_entries_that_are_scored() -> None:
    batch = steps(20)
    variance = 1 + 0.25
    exact = (dist.Normal(0.0, math.sqrt(variance)).log_prob(batch[0]) * (torch.arange(STEPS) < batch[1][:, None])).sum(
        -1
    )
    pair = Steps()
    with torch.no_grad():
        pair.m.zero_()
    for estimate in (pv.log_likelihood, pv.naive_log_likelihood):
        ll = estimate(pair, *batch, num_particles=1000, seed=0, progress=False)
        # Five errors: 40 comparisons, and a delta-method error of weights with light tails.
        assert ((ll.per_datum - exact).abs() <= 5 * ll.standard_error + 1e-9).all()
    annealed = pv.annealed_log_likelihood(pair, *(part[:4] for part in batch), num_temperatures=40, seed=0)
    assert ((annealed.per_datum - exact[:4]).abs() <= 5 * annealed.standard_error + 1e-9).all()


@pytest.mark.parametrize(("where", "guided"), [("handler", False), ("distribution", False)])
def test_a_mask_in_one_program_alone_is_refused(where: str, guided: bool) -> None:
    for call in (
        lambda pair, *batch: pv.log_likelihood(pair, *batch, num_particles=5, progress=False),
        lambda pair, *batch: pv.objectives.elbo(pv.log_terms(pair, *batch)),
    ):
        with pytest.raises(ValueError, match="site 'z_1' is masked otherwise in the guide than in the model"):
            call(Steps(where, guided), *steps(20))


def test_latents_that_a_mask_leaves_out_must_not_be_read() -> None:
    with pytest.raises(ValueError, match="site 'x' reads latents that a mask leaves out"):
        pv.fit(Steps(reads=True), steps(20), epochs=1, batch_size=10, progress=False)


class Pixels(pv.Pair):
    """Four fair coins without a latent that matters; a datum's first ``length`` entries are scored."""

    x_shape = (4,)

    def __init__(self, whole: bool = False) -> None:
        super().__init__()
        self.whole, self.logit = whole, nn.Parameter(torch.tensor(0.0))

    def model(self, x: Tensor, length: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            seen = torch.arange(4) < length[:, None]
            coins = dist.Bernoulli(logits=self.logit + 0 * z.expand(*z.shape[:-1], 4))
            if self.whole:
                with poutine.mask(mask=length > 0):
                    pyro.sample("x", coins.to_event(1), obs=x)
            else:
                pyro.sample("x", coins.mask(seen).to_event(1), obs=x)

    def guide(self, x: Tensor, length: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0 * x[:, :1], 1.0).to_event(1))


@pytest.mark.parametrize("whole", [False, True])
def test_bits_per_dimension_are_those_of_the_scored_entries(whole: bool) -> None:
    x, length = torch.randint(2, (300, 4)).double(), torch.arange(300) % 5
    ll = pv.log_likelihood(Pixels(whole), x, length, num_particles=3, seed=0, progress=False)
    # A fair coin has one bit.
    assert ll.bits_per_dimension == pytest.approx(1.0, rel=1e-10)
    assert "bits per dimension" in repr(ll)


def test_data_without_a_scored_entry_have_no_bits_per_dimension() -> None:
    ll = pv.log_likelihood(Pixels(), torch.zeros(3, 4), torch.zeros(3), num_particles=3, seed=0, progress=False)
    assert not ll.has_bits
    with pytest.raises(ValueError, match="no entry of the data is scored"):
        _ = ll.bits_per_dimension


@pytest.mark.parametrize("outer", [False, True])
def test_reconstruction_terms_are_those_of_log_prob(outer: bool) -> None:
    x, seen = torch.rand(5, 4), torch.rand(5, 4) < 0.5
    loc = torch.randn(3, 5, 4)
    for entries in (dist.Normal(loc, 0.1), dist.Bernoulli(logits=loc), dist.ContinuousBernoulli(logits=loc)):
        masked = entries.to_event(1).mask(seen[:, 0]) if outer else entries.mask(seen).to_event(1)
        torch.testing.assert_close(reconstruction(masked, x.round()), -masked.log_prob(x.round()), **ROUNDING)


class Noisy(pv.Pair):
    """x = z + noise of the batch's scale, over the entries that a datum has; q(z) = N(0, 1e-6)."""

    x_shape = (4,)

    def __init__(self, outer: bool = False) -> None:
        super().__init__()
        self.outer, self.scale, self.loc = outer, pv.BatchOptimalScale(), nn.Parameter(torch.zeros(4))

    def model(self, x: Tensor, length: Tensor) -> None:
        seen = torch.arange(4) < length[:, None]
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            entries = self.scale.normal(self.loc + 0 * z)
            p_x = entries.to_event(1).mask(length > 0) if self.outer else entries.mask(seen).to_event(1)
            pyro.sample("x", p_x, obs=x)

    def guide(self, x: Tensor, length: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0 * x[:, :1], 1.0).to_event(1))


def test_a_batch_optimal_scale_is_that_of_the_scored_entries() -> None:
    x, length = torch.randn(50, 4) * torch.tensor([1.0, 1.0, 9.0, 9.0]), torch.full((50,), 2)
    pair = Noisy()
    log_lik = pv.log_terms(pair, x, length).log_lik
    variance = x[:, :2].square().mean() + pair.scale.floor**2
    expected = dist.Normal(0.0, variance.sqrt()).log_prob(x[:, :2]).sum(-1)
    torch.testing.assert_close(log_lik[0], expected, **ROUNDING)
    assert float(pair.scale()) == pytest.approx(float(variance.sqrt()), rel=1e-10)
    entries = pair.scale.normal(torch.zeros(50, 4)).mask(torch.arange(4) < 2).to_event(1)
    torch.testing.assert_close(reconstruction(entries, x), -expected, **ROUNDING)


def test_a_mask_around_a_batch_optimal_scale_is_refused() -> None:
    x, length = torch.randn(20, 4), torch.arange(20) % 2
    with pytest.raises(ValueError, match="site 'x' is masked around its batch-optimal scale"):
        pv.fit(Noisy(outer=True), (x, length), epochs=1, batch_size=10, progress=False)
    outer = pv.BatchOptimalScale().normal(x).to_event(1).mask(length > 0)
    with pytest.raises(ValueError, match="the likelihood is masked around"):
        reconstruction(outer, x)


def test_the_gap_of_masked_latents_is_that_of_the_steps() -> None:
    """The posterior of z_t is N(4x/5, 1/5), and of the guide's family: the approximation's part is zero."""
    x, length = (part[:4] for part in steps(20))
    batch = (x / 2, length)
    for where in ("handler", "distribution"):
        pair = Steps(where)
        with torch.no_grad():
            pair.m.zero_()
        gap = pv.inference_gap(pair, *batch, num_particles=200, steps=200, seed=0)
        mask = torch.arange(STEPS) < batch[1][:, None]
        posterior = dist.Normal(0.8 * batch[0], math.sqrt(0.2))
        exact = (torch.distributions.kl_divergence(dist.Normal(0.0, 0.5), posterior) * mask).sum(-1)
        # The best member is found to the ascent's precision.
        assert (gap.approximation.abs() <= 4 * gap.approximation_error + 1e-3).all()
        assert ((gap.amortisation - exact).abs() <= 5 * gap.amortisation_error + 1e-3).all()


def test_imputation_weighs_by_the_scored_entries() -> None:
    """x_2 = z + noise given x_1, where the mask of the model leaves x_1 out: the prior predictive N(0, 1 + 1/4)."""

    class Line(pv.Pair):
        x_shape = (2,)

        def __init__(self, outer: bool) -> None:
            super().__init__()
            self.outer, self.w = outer, nn.Parameter(torch.ones(()))

        def model(self, x: Tensor, has: Tensor) -> None:
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
                p_x = dist.Normal(self.w * z.expand(*z.shape[:-1], 2), 0.5).to_event(1)
                if self.outer:
                    pyro.sample("x", p_x.mask(has), obs=x)
                else:
                    with poutine.mask(mask=has):
                        pyro.sample("x", p_x, obs=x)

        def guide(self, x: Tensor, has: Tensor) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(0 * x[:, :1], 1.0).to_event(1))

    x, has = torch.tensor([[3.0, 0.0]]), torch.zeros(1, dtype=torch.bool)
    for outer in (False, True):
        found = pv.impute(
            Line(outer), x, torch.tensor([True, False]), has, num_samples=2000, num_particles=4, sweeps=2, seed=0
        )
        drawn = found.samples[:, 0, 1]
        assert abs(float(drawn.mean())) <= 4 * math.sqrt(1.25 / 2000)
        assert float(drawn.var()) == pytest.approx(1.25, abs=4 * 1.25 * math.sqrt(2 / 2000))


def test_divergences_of_masked_latents_are_refused_where_they_are_split_or_closed() -> None:
    x, has = torch.randn(20, 1), torch.arange(20) < 9
    with pytest.raises(ValueError, match="site 'z' is masked"):
        pv.divergence_split(Varied(), x, has)
    q = dist.Normal(torch.zeros(3, 2), 1.0).mask(torch.tensor([True, False])).to_event(1)
    mixture = pv.MixtureOfGaussians(2, 2)()
    for divergence in (pv.monte_carlo_kl, pv.convex_kl_bound, pv.variational_kl_bound):
        with pytest.raises(ValueError, match="the guide's distribution of a latent is masked"):
            divergence(q, mixture)


class Handled(pv.models.VAE):
    """A VAE whose model masks or scales the data term, which its closed form knows nothing of."""

    closed_form = pv.models.VAE.closed_form

    def __init__(self, handler: Any) -> None:
        super().__init__((4,), pv.StandardNormal(2), encoder=nn.Linear(4, 4), decoder=nn.Linear(2, 4))
        self.handler = handler

    def model(self, x: Tensor, *conditions: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.prior())
            with self.handler:
                pyro.sample("x", self.p_x(z), obs=x)


SCALED = {
    "log_terms": lambda pair, x: pv.log_terms(pair, x),
    "elbo": lambda pair, x: pv.objectives.elbo(pv.log_terms(pair, x)),
    "site_terms": lambda pair, x: pv.site_terms(pair, x),
    "divergence_split": lambda pair, x: pv.divergence_split(pair, x),
    "analytic_loss": lambda pair, x: pv.analytic_loss(pair, x),
    "collapse_report": lambda pair, x: pv.collapse_report(pair, x),
    "fit": lambda pair, x: pv.fit(pair, x, epochs=1, batch_size=4, progress=False),
    "log_likelihood": lambda pair, x: pv.log_likelihood(pair, x, num_particles=3, progress=False),
    "naive_log_likelihood": lambda pair, x: pv.naive_log_likelihood(pair, x, num_particles=3, progress=False),
    "annealed_log_likelihood": lambda pair, x: pv.annealed_log_likelihood(pair, x, num_temperatures=3),
    "bidirectional_log_likelihood": lambda pair, x: pv.bidirectional_log_likelihood(pair, 3, num_temperatures=3),
    "inference_gap": lambda pair, x: pv.inference_gap(pair, x, num_particles=3, steps=1),
    "generate": lambda pair, x: pv.generate(pair, 3),
    "reconstruct": lambda pair, x: pv.reconstruct(pair, x),
    "posterior": lambda pair, x: pv.posterior(pair, x),
    "impute": lambda pair, x: pv.impute(pair, x, torch.tensor([True, False, True, True])),
    "latent_means": lambda pair, x: pv.latent_means(pair, x),
    "to_arviz": lambda pair, x: pv.to_arviz(pair, x, num_particles=5, num_draws=2),
    "check_pair": lambda pair, x: pv.testing.check_pair(pair, x),
}


@pytest.mark.parametrize("name", SCALED)
def test_scaled_sites_are_refused_by_every_function(name: str) -> None:
    with pytest.raises(ValueError, match="site 'x' is scaled inside the pair or around the call"):
        SCALED[name](Handled(poutine.scale(scale=0.5)), torch.randn(6, 4))


def test_a_closed_form_that_knows_nothing_of_a_mask_is_refused() -> None:
    pair = Handled(poutine.mask(mask=torch.tensor(False)))
    with pytest.raises(ValueError, match=r"site 'x' is masked by poutine\.mask, which closed_form does not see"):
        pv.analytic_loss(pair, torch.randn(6, 4))


def test_exact_steps_that_know_nothing_of_a_mask_are_refused() -> None:
    class Masked(pv.models.LinearGaussianVAE):
        e_step = pv.models.LinearGaussianVAE.e_step
        elbo = pv.models.LinearGaussianVAE.elbo
        m_step = pv.models.LinearGaussianVAE.m_step

        def model(self, x: Tensor) -> None:
            with poutine.mask(mask=torch.tensor(False)):
                super().model(x)

        def guide(self, x: Tensor) -> None:
            with poutine.mask(mask=torch.tensor(False)):
                super().guide(x)

    with pytest.raises(ValueError, match="masked, which exact steps do not see"):
        pv.em(Masked(4, 2), torch.randn(9, 4), steps=1)


# Observed beside x: a label at the root, a second kind of data, a label read off x.


class Labelled(pv.Pair):
    """z ~ N(0, 1), x ~ N(5 y + z, 1/4) with a label y: at the root, of the latent, or of x."""

    x_shape = (1,)

    def __init__(self, label: str = "root") -> None:
        super().__init__()
        self.label, self.shift = label, nn.Parameter(torch.tensor(5.0))

    def model(self, x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x)):
            if self.label == "root":
                # After a latent in the program: its distribution counts, not its place.
                z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
                y = pyro.sample("y", dist.Bernoulli(x.new_tensor(0.1)), obs=y)
                pyro.sample("x", dist.Normal(self.shift * y.unsqueeze(-1) + z, 0.5).to_event(1), obs=x)
                return
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            x = pyro.sample("x", dist.Normal(z + 0 * self.shift, 0.5).to_event(1), obs=x)
            logit = 3 * (z if self.label == "latent" else x).squeeze(-1)
            pyro.sample("y", dist.Bernoulli(logits=logit), obs=y)

    def guide(self, x: Tensor, y: Tensor) -> None:
        shift = self.shift * y.unsqueeze(-1) if self.label == "root" else 0.0
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.8 * (x - shift), math.sqrt(0.2)).to_event(1))


def test_a_label_that_draws_are_given_stays() -> None:
    y = torch.ones(500)
    new = pv.generate(Labelled(), 500, y, seed=0)
    assert torch.equal(new.latents["y"], y)
    # Drawn anew, nine tenths of the labels would be 0, and the mean 0.5.
    assert abs(float(new.x.mean()) - 5) <= 4 * math.sqrt(1.25 / 500)
    held = pv.generate(Labelled(), 500, torch.zeros(500), given={"y": y}, seed=0)
    torch.testing.assert_close(held.x, new.x, **ROUNDING)
    drawn = pv.generate(Labelled(), 2000, torch.ones(2000), draw=("y",), seed=0).latents["y"]
    assert abs(float(drawn.mean()) - 0.1) <= 4 * math.sqrt(0.09 / 2000)


def test_a_pair_with_an_observed_label_gives_its_joint_density() -> None:
    """log p(x, y) = log p(y) + log N(x; 5 y, 5/4); the guide is the posterior."""
    y = torch.arange(6) % 2.0
    x = torch.randn(6, 1) + 5 * y[:, None]
    exact = torch.where(y == 1, math.log(0.1), math.log(0.9)) + dist.Normal(5 * y, math.sqrt(1.25)).log_prob(x[:, 0])
    pair = Labelled()
    ll = pv.log_likelihood(pair, x, y, num_particles=30, seed=0, progress=False)
    torch.testing.assert_close(ll.per_datum, exact, **ROUNDING)
    assert ll.quantity == "log p(x, y)"
    assert pv.testing.check_pair(pair, (x, y)) == []
    bounds = pv.bidirectional_log_likelihood(pair, 4, y[:4], num_temperatures=60, num_chains=32, seed=0)
    truth = exact.new_tensor([0.9, 0.1, 0.9, 0.1]).log() + dist.Normal(5 * y[:4], math.sqrt(1.25)).log_prob(
        bounds.x[:, 0]
    )
    assert ((bounds.low <= truth) & (truth <= bounds.high)).all()
    assert repr(bounds).startswith("log p(x, y) between")


def test_predictions_keep_the_label_of_their_datum() -> None:
    y = torch.arange(6) % 2.0
    x = torch.randn(6, 1) / 4 + 5 * y[:, None]
    found = pv.to_arviz(Labelled(), x, y, num_particles=200, num_draws=100, seed=0)
    assert list(found["posterior_predictive"]) == ["x"]
    assert list(found["log_likelihood"]) == ["x"]
    drawn = torch.as_tensor(found["posterior_predictive"]["x"].values)[0, ..., 0]
    # x~ given x has mean 5 y + 0.8 (x − 5 y) and variance 0.45.
    expected = 5 * y + 0.8 * (x[:, 0] - 5 * y)
    assert ((drawn.mean(0) - expected).abs() <= 5 * math.sqrt(0.45 / 100)).all()


@pytest.mark.parametrize("label", ["latent", "x"])
def test_a_label_that_depends_on_draws_is_not_a_condition_of_them(label: str) -> None:
    pair, count = Labelled(label), 4000
    with pytest.raises(ValueError, match=r"the model observes \['y'\], whose distribution depends on latents or on x"):
        pv.generate(pair, 5, torch.ones(5))
    with pytest.raises(ValueError, match="depends on latents or on x"):
        pv.bidirectional_log_likelihood(pair, 5, torch.ones(5), num_temperatures=5)
    new = pv.generate(pair, count, torch.ones(count), draw=("y",), seed=0)
    # E[s y] for y ~ Bernoulli(σ(3 s)), s ~ N(0, v), by quadrature.
    source, variance = (new.latents["z"], 1.0) if label == "latent" else (new.x, 1.25)
    grid = torch.linspace(-9, 9, 4001)
    density = dist.Normal(0.0, math.sqrt(variance)).log_prob(grid).exp() * (grid[1] - grid[0])
    exact = float((density * grid * torch.sigmoid(3 * grid)).sum())
    products = source[:, 0] * new.latents["y"]
    assert abs(float(products.mean()) - exact) <= 4 * float(products.std()) / math.sqrt(count)
    x, y = new.x[:5], new.latents["y"][:5]
    assert set(pv.to_arviz(pair, x, y, num_particles=20, num_draws=5)["posterior_predictive"]) == {"x", "y"}


def test_a_likelihood_without_latents_does_not_read_x_outside_its_site() -> None:
    class Apart(Labelled):
        def model(self, x: Tensor, y: Tensor) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(self.shift.expand(1), 0.5).to_event(1), obs=x)

        def guide(self, x: Tensor, y: Tensor) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(0 * x, 1.0).to_event(1))

    x = torch.randn(5, 1)
    ll = pv.log_likelihood(Apart(), x, torch.zeros(5), num_particles=3, progress=False)
    torch.testing.assert_close(ll.per_datum, dist.Normal(5.0, 0.5).log_prob(x[:, 0]), **ROUNDING)


def test_a_label_of_x_is_no_reading_of_x_outside_its_site() -> None:
    """log p(x, y) = log N(x; 0, 5/4) + log Bernoulli(y; σ(3 x))."""
    x, y = torch.randn(5, 1), torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0])
    ll = pv.log_likelihood(Labelled("x"), x, y, num_particles=30, seed=0, progress=False)
    exact = dist.Normal(0.0, math.sqrt(1.25)).log_prob(x[:, 0]) + dist.Bernoulli(logits=3 * x[:, 0]).log_prob(y)
    torch.testing.assert_close(ll.per_datum, exact, **ROUNDING)
    with pytest.raises(ValueError, match=r"observed sites \['y'\] depend on x"):
        pv.impute(Labelled("x"), x, torch.tensor([False]), y, num_samples=2)


def test_imputation_counts_a_label_of_the_latent() -> None:
    """x missing, y = 1 seen: x has the mean of z given y, ∫ z σ(3 z) N(z) dz / ½."""
    y = torch.ones(1)
    found = pv.impute(Labelled("latent"), torch.zeros(1, 1), torch.tensor([False]), y, num_samples=3000, seed=0)
    grid = torch.linspace(-9, 9, 4001)
    density = dist.Normal(0.0, 1.0).log_prob(grid).exp() * (grid[1] - grid[0])
    exact = float((density * grid * torch.sigmoid(3 * grid)).sum() / 0.5)
    drawn = found.samples[:, 0, 0]
    assert abs(float(drawn.mean()) - exact) <= 4 * float(drawn.std()) / math.sqrt(3000)


def test_draws_of_a_model_with_a_latent_for_all_data_are_refused() -> None:
    class Shared(Labelled):
        def model(self, x: Tensor, y: Tensor) -> None:
            w = pyro.sample("w", dist.Normal(0.0, 1.0))
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(w * z, 0.5).to_event(1), obs=x)

    with pytest.raises(ValueError, match="site 'w' lies outside the data plate"):
        pv.generate(Shared(), 5, torch.ones(5))


def test_the_balanced_loss_of_graphs_keeps_a_mask() -> None:
    """Without a scored graph it is the divergence, which is closed."""

    class Masked(pv.models.VGAE):
        def model(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", self.prior().expand((self.num_nodes,)).to_event(1))
                pyro.sample("x", InnerProductGraph(z).mask(torch.tensor(False)), obs=x)

    pair = Masked(4, pv.StandardNormal(2))
    x = pv.data.make_graph(torch.tensor([[0, 1], [1, 2]]), 4).adjacency().unsqueeze(0)
    q = pair.q_z(x).base_dist
    exact = float(kl_standard_normal(q.loc, q.scale).sum().detach())
    assert BalancedGraphLoss().loss(pair.model, pair.guide, x) == pytest.approx(exact, rel=1e-10)
