"""What would give a wrong number, or a right one under a wrong name, is refused in words."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import JitTrace_ELBO, ReweightedWakeSleep, TraceMeanField_ELBO, TraceTMC_ELBO
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.models import SRVAE, VAE, LinearGaussianVAE
from pyro_vae.testing import check_pair


def gray(size: int = 3) -> Tensor:
    return torch.full((size, 1, 4, 4), 0.4)


def bernoulli_vae() -> VAE:
    return VAE((1, 4, 4), pv.StandardNormal(2), pv.Bernoulli())


@pytest.mark.parametrize(
    "use",
    [
        pv.log_likelihood,
        pv.naive_log_likelihood,
        pv.reconstruct,
        pv.posterior,
        lambda pair, x: pv.impute(pair, x, torch.ones_like(x, dtype=torch.bool)),
        lambda pair, x: pv.fit(pair, x, batch_size=3),
    ],
)
def test_data_outside_the_support_are_refused_wherever_they_enter(use: Any) -> None:
    with pytest.raises(ValueError, match=r"48 values outside the support of site 'x' .* 0\.4 at index \(0, 0, 0, 0\)"):
        use(bernoulli_vae(), gray())


@pytest.mark.parametrize("entries", [1, 16, 40, 2**20])
def test_data_looked_at_in_parts_are_counted_as_a_whole(entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyro_vae.inspection.data.ENTRIES", entries)
    x = torch.ones(5, 1, 4, 4)
    x[2, 0, 1, 3] = x[4, 0, 0, 0] = 0.4
    with pytest.raises(ValueError, match=r"2 values outside .* 0\.4 at index \(2, 0, 1, 3\)"):
        pv.log_likelihood(bernoulli_vae(), x)
    # Entries that are not seen do not count, in whichever part.
    with pytest.raises(ValueError, match=r"1 values outside .* 0\.4 at index \(4, 0, 0, 0\)"):
        pv.impute(bernoulli_vae(), x, torch.arange(5).view(5, 1, 1, 1).expand_as(x) > 2)
    x[3, 0, 2, 2], x[4, 0, 0, 0] = math.nan, math.inf
    with pytest.raises(ValueError, match=r"2 NaN or infinite values, the first at index \(3, 0, 2, 2\)"):
        pv.log_likelihood(bernoulli_vae(), x)


def test_missing_entries_may_hold_anything() -> None:
    x, seen = gray(), torch.zeros(3, 1, 4, 4, dtype=torch.bool)
    assert set(pv.impute(bernoulli_vae(), x, seen, num_samples=2, sweeps=1, seed=0).samples.unique().tolist()) <= {0, 1}


def test_data_off_their_grid_are_refused() -> None:
    pair = VAE((1, 4, 4), pv.StandardNormal(2), pv.DiscretisedLogistic(17))
    with pytest.raises(ValueError, match="the 17 levels"):
        pv.log_likelihood(pair, gray())


def test_a_low_resolution_image_off_its_grid_is_refused() -> None:
    pair = SRVAE((1, 4, 4), 2, pv.StandardNormal(2), "discretised", levels=17)
    with pytest.raises(ValueError, match="y has 12 values outside the support of site 'y'"):
        pv.super_resolve(pair, torch.full((3, 1, 2, 2), 0.4))


@pytest.mark.parametrize("transition", ["delta", "gaussian"])
def test_a_mass_over_a_density_is_no_weight(transition: Any) -> None:
    pair = SRVAE((1, 4, 4), 2, pv.StandardNormal(2), transition, y_likelihood=pv.DiscretisedLogistic(17))
    message = "outside the model's support" if transition == "delta" else "a mass over a density"
    for use in (pv.log_likelihood, check_pair, lambda p, x: pv.fit(p, x, batch_size=3)):
        with pytest.raises(ValueError, match=message):
            use(pair, torch.rand(3, 1, 4, 4))


class Labelled(LinearGaussianVAE):
    """x and then a label w are observed."""

    def model(self, x: Tensor, w: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), torch.ones(2)).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.weight.mT + self.bias, self.scale()).to_event(1), obs=x)
            pyro.sample("w", dist.Bernoulli(logits=z.sum(-1)), obs=w)

    def guide(self, x: Tensor, w: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.exact_posterior(x))


def test_x_is_found_among_several_observed_sites() -> None:
    pair, x, w = Labelled(4, 2), torch.randn(5, 4), torch.tensor([0.0, 1, 0, 1, 1])
    # The label depends on the latent: draws given it would need a posterior.
    assert pv.generate(pair, 5, w, draw=("w",), seed=0).x.shape == (5, 4)
    assert pv.reconstruct(pair, x, w, seed=0).mean.shape == (1, 5, 4)
    mask = torch.tensor([True, True, True, False])
    samples = pv.impute(pair, x, mask, w, num_samples=2, sweeps=1, seed=0).samples
    assert torch.equal(samples[..., :3], x[:, :3].expand(2, 5, 3))
    assert check_pair(pair, (x, w)) == []
    for estimate in (pv.log_likelihood, pv.naive_log_likelihood):
        assert estimate(pair, x, w, num_particles=2).quantity == "log p(x, w)"


def test_one_candidate_is_enough_for_an_exact_sweep() -> None:
    # K = 1 is an independent Metropolis step: slower than K = 8, and as right.
    pair = LinearGaussianVAE(3, 1)
    x, seen = torch.randn(1, 3), torch.tensor([True, True, False])
    weight, bias = pair.weight.detach(), pair.bias.detach()
    covariance = weight @ weight.mT + float(pair.scale().detach()) ** 2 * torch.eye(3)
    gain = covariance[2:, :2] @ torch.linalg.inv(covariance[:2, :2])
    mean = float(bias[2] + gain @ (x[0, :2] - bias[:2]))
    deviation = float(covariance[2, 2] - gain @ covariance[:2, 2]) ** 0.5
    chains = 10_000
    drawn = pv.impute(pair, x, seen, num_samples=chains, num_particles=1, sweeps=40, seed=0).samples[:, 0, 2]
    assert abs(float(drawn.mean()) - mean) < 4 * deviation / chains**0.5


def test_the_closed_form_freezes_a_batch_optimal_scale_too() -> None:
    pair = VAE((1, 4, 4), pv.StandardNormal(2), pv.Gaussian(pv.BatchOptimalScale()))
    x = torch.rand(6, 1, 4, 4)
    pv.analytic_loss(pair, x)
    scale = pair.p_x.head.scale
    assert (float(scale.seen), float(scale.variance)) != (0.0, 1.0)


def test_closed_divergences_are_refused_where_a_site_depends_on_an_earlier_draw() -> None:
    pair = SRVAE((1, 4, 4), 2, pv.StandardNormal(2), "gaussian")
    with pytest.raises(
        ValueError, match=r"the guide samples \['y', 'u', 'z'\], the model \['u', 'y', 'z'\]: use Trace"
    ):
        pv.fit(pair, torch.rand(4, 1, 4, 4), batch_size=4, loss=TraceMeanField_ELBO())


@pytest.mark.parametrize("loss", [JitTrace_ELBO(), ReweightedWakeSleep()])
def test_losses_that_cannot_see_the_parameters_are_refused(loss: Any) -> None:
    with pytest.raises(ValueError, match="in a loop of your own"):
        pv.fit(LinearGaussianVAE(3, 1), torch.randn(4, 3), batch_size=4, loss=loss)


def test_beta_is_for_elbos_without_a_logsumexp() -> None:
    with pytest.raises(ValueError, match="TraceTMC_ELBO has no such term"):
        pv.fit(LinearGaussianVAE(3, 1), torch.randn(4, 3), batch_size=4, loss=TraceTMC_ELBO(), beta=0.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": math.nan}, "beta is nan"),
        ({"clip_norm": math.nan}, "clip_norm is nan"),
        ({"clip_norm": 0.0}, "clip_norm is 0"),
        ({"device": "meta"}, "device 'meta' is not supported"),
        ({"optimizer": torch.optim.LBFGS}, "LBFGS evaluates its loss several times"),
    ],
)
def test_settings_that_would_train_nothing(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        pv.fit(LinearGaussianVAE(3, 1), torch.randn(4, 3), batch_size=4, run_dir=tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


def test_a_pair_without_parameters_has_nothing_to_train_and_nothing_wrong() -> None:
    class Fixed(pv.Pair):
        x_shape = ()

        def model(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=x)

        def guide(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    x = torch.randn(4)
    assert check_pair(Fixed(), x) == []
    exact = dist.Normal(0.0, 2**0.5).log_prob(x)
    torch.testing.assert_close(pv.log_likelihood(Fixed(), x, num_particles=3).per_datum, exact)
    with pytest.raises(ValueError, match="no parameters to train"):
        pv.fit(Fixed(), x, batch_size=4)


def test_programs_from_a_mixin_are_programs() -> None:
    class Mixin:
        def model(self, x: Tensor) -> None:
            LinearGaussianVAE.model(self, x)

    class Mixed(Mixin, LinearGaussianVAE):
        pass

    pair = Mixed(3, 1)
    before = pair.weight.detach().clone()
    svi = pyro.infer.SVI(pair.model, pair.guide, pyro.optim.Adam({"lr": 0.1}), pyro.infer.Trace_ELBO())
    svi.step(torch.randn(4, 3))
    assert not torch.equal(before, pair.weight.detach())


def test_a_scale_inside_a_pair_is_wrong() -> None:
    class Scaled(LinearGaussianVAE):
        def model(self, x: Tensor) -> None:
            with poutine.scale(scale=10.0):
                LinearGaussianVAE.model(self, x)

    with pytest.raises(ValueError, match="scaled inside the pair"):
        check_pair(Scaled(3, 1), torch.randn(4, 3))


def test_weights_that_are_all_zero_name_their_datum() -> None:
    class Bounded(LinearGaussianVAE):
        def model(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(1), torch.ones(1)).to_event(1))
                inside = torch.where(x.abs().sum(-1) < 10, 0.0, -math.inf)
                pyro.factor("wall", inside, has_rsample=False)
                pyro.sample("x", dist.Normal(z @ self.weight.mT, 1.0).to_event(1), obs=x)

    x = torch.zeros(3, 3)
    x[1] = 100.0
    with pytest.raises(ValueError, match=r"weights of datum 1 are zero: .* site 'wall' rules"):
        pv.log_likelihood(Bounded(3, 1), x, num_particles=4)


def test_a_run_is_not_continued_on_other_data(tmp_path: Path) -> None:
    start = {"batch_size": 4, "run_dir": tmp_path, "progress": False}
    pv.fit(LinearGaussianVAE(3, 1), torch.randn(8, 3), epochs=1, config={"data": "a"}, **start)
    with pytest.raises(ValueError, match="other settings: data"):
        pv.fit(LinearGaussianVAE(3, 1), torch.randn(8, 3), epochs=2, resume=True, **start)


def test_frozen_statistics_are_not_touched_by_a_refusal() -> None:
    encoder = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(16), nn.Linear(16, 4))
    pair = VAE((1, 4, 4), pv.StandardNormal(2), pv.Bernoulli(), encoder=encoder)
    with pytest.raises(ValueError, match="outside the support"):
        pv.fit(pair, gray(), batch_size=3)
    assert int(encoder[1].num_batches_tracked) == 0
