"""What latents carry, against closed forms: divergences, active units, components in use."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.transforms import AffineTransform
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.distributions.kl import kl_full, kl_standard_normal
from pyro_vae.models import SRVAE, VAE, LinearGaussianMixtureVAE, LinearGaussianVAE

ROUNDING = {"rtol": 1e-10, "atol": 1e-10}


class Units(pv.Pair):
    """Three units whose posterior means are 2 x₁, 0.05 x₂ and 0."""

    def __init__(self, flow: bool = False) -> None:
        super().__init__()
        self.x_shape, self.flow = (3,), flow
        self.gain = nn.Parameter(torch.tensor([2.0, 0.05, 0.0]))

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        q = dist.Normal(self.gain * x, torch.tensor([0.2, 0.9, 1.0])).to_event(1)
        if self.flow:
            q = dist.TransformedDistribution(dist.Normal(torch.zeros_like(x), 0.5).to_event(1), [self.shift(x)])
        with pyro.plate("data", len(x)):
            pyro.sample("z", q)

    def shift(self, x: Tensor) -> Any:
        return AffineTransform(self.gain * x, torch.tensor([0.4, 1.8, 2.0]), event_dim=1)


def test_divergence_and_activity_unit_by_unit() -> None:
    pair, x = Units(), torch.randn(300, 3)
    report = pv.collapse_report(pair, x).sites["z"]
    mean, scale = (pair.gain * x).detach(), torch.tensor([0.2, 0.9, 1.0])
    expected = torch.stack([kl_standard_normal(mean[:, [j]], scale[[j]]) for j in range(3)], 1)
    torch.testing.assert_close(report.kl_per_dimension, expected.mean(0), **ROUNDING)
    assert report.kl == pytest.approx(float(expected.sum(1).mean()), rel=1e-12)
    assert report.kl_standard_error == pytest.approx(float(expected.sum(1).std()) / 300**0.5, rel=1e-12)
    torch.testing.assert_close(report.mean_variance, mean.var(0), **ROUNDING)
    assert report.active is not None
    assert report.active.tolist() == [True, False, False]


def test_without_a_closed_form_the_numbers_are_sampled() -> None:
    x = torch.randn(2000, 3)
    closed, sampled = (pv.collapse_report(Units(flow), x, seed=0).sites["z"] for flow in (False, True))
    assert sampled.kl_per_dimension is None
    # The flow is the same Gaussian: its scales 0.5 · (0.4, 1.8, 2). Means now are those of ten draws.
    assert abs(sampled.kl - closed.kl) <= 4 * math.hypot(sampled.kl_standard_error, closed.kl_standard_error)
    assert sampled.mean_variance is not None
    assert closed.mean_variance is not None
    noise = torch.tensor([0.2, 0.9, 1.0]) ** 2 / 10
    error = (closed.mean_variance + noise) * (2 / 2000) ** 0.5
    assert ((sampled.mean_variance - closed.mean_variance).abs() <= 4 * error).all()
    # Without the correction the idle unit would count as active: its draws' means vary by a tenth.
    assert sampled.active is not None
    assert float(noise[2]) > 0.01
    assert not sampled.active[2]


def test_a_full_covariance_is_sampled_too() -> None:
    pair, x = LinearGaussianVAE(5, 2), torch.randn(500, 5)
    report = pv.collapse_report(pair, x, num_particles=20, seed=0).sites["z"]
    q = pair.exact_posterior(x)
    exact = kl_full(q.mean, q.scale_tril, torch.zeros(2), torch.eye(2)).detach()
    # Data and draws both add to the error, which the report counts; the data are the same here.
    assert abs(report.kl - float(exact.mean())) <= 4 * report.kl_standard_error
    torch.testing.assert_close(report.mean_variance, q.mean.detach().var(0), **ROUNDING)


def test_a_collapsed_guide_is_said_to_be_one() -> None:
    pair = VAE((4,), pv.StandardNormal(3), encoder=nn.Linear(4, 6))
    for parameter in pair.q_z.parameters():
        nn.init.zeros_(parameter)
    report = pv.collapse_report(pair, torch.randn(20, 4))
    assert "0 of 3 units active" in repr(report)
    assert "posterior collapse" in repr(report)
    assert "posterior collapse" not in repr(pv.collapse_report(Units(), torch.randn(20, 3)))


def test_components_in_use() -> None:
    # Four far components; the guide visits the first two, twice as often the first.
    means = torch.tensor([[-30.0], [-10.0], [10.0], [30.0]])
    prior = pv.MixtureOfGaussians(4, 1, means=means, learned=False)
    pair = VAE((1,), prior, encoder=nn.Linear(1, 2))
    with torch.no_grad():
        pair.q_z.network.weight.copy_(torch.tensor([[1.0], [0.0]]))
        pair.q_z.network.bias.zero_()
    x = torch.cat([torch.full((20, 1), -30.0), torch.full((10, 1), -10.0)])
    report = pv.collapse_report(pair, x).sites["z"]
    torch.testing.assert_close(report.usage, torch.tensor([2 / 3, 1 / 3, 0.0, 0.0]), rtol=1e-9, atol=1e-9)
    assert report.perplexity == pytest.approx(3 / 2 ** (2 / 3), rel=1e-9)


def test_a_categorical_site_has_components_and_no_units() -> None:
    pair, x = LinearGaussianMixtureVAE(4, pv.MixtureOfGaussians(3, 2)), torch.randn(200, 4)
    report = pv.collapse_report(pair, x, seed=0)
    assert report.sites["c"].active is None
    log_marginals, _ = pair.exact_components(x)
    weights = (pair.prior.logits.log_softmax(-1) + log_marginals).softmax(-1).mean(0).detach()
    torch.testing.assert_close(report.sites["c"].usage, weights, **ROUNDING)
    assert f"{report.sites['c'].perplexity:.1f} of 3 components" in repr(report)


def test_sites_that_depend_on_earlier_ones() -> None:
    pair = SRVAE((1, 4, 4), 2, pv.MixtureOfGaussians(3, 2), "delta", z_size=3)
    x = torch.rand(150, 1, 4, 4)
    report = pv.collapse_report(pair, x, num_particles=30, seed=0)
    # The point mass on y is data.
    assert set(report.sites) == {"u", "z"}
    assert report.sites["z"].kl_per_dimension is not None
    closed = pv.analytic_loss(pair, x)._asdict()["z"].detach().mean()
    assert abs(float(closed) - report.sites["z"].kl) <= 4 * report.sites["z"].kl_standard_error
    assert report.sites["u"].usage is not None
    assert float(report.sites["u"].usage.sum()) == pytest.approx(1)


def test_nothing_is_changed_and_seeds_repeat() -> None:
    pair, x = VAE((4,), pv.MixtureOfGaussians(3, 2)), torch.randn(9, 4)
    rng = torch.get_rng_state()
    first, again, other = (pv.collapse_report(pair, x, seed=seed).sites["z"].kl for seed in (1, 1, 2))
    assert first == again != other
    assert torch.equal(rng, torch.get_rng_state())
    assert all(module.training for module in pair.modules())
    assert all(parameter.grad is None for parameter in pair.parameters())


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="need two of each"):
        pv.collapse_report(Units(), torch.randn(1, 3))
    with pytest.raises(ValueError, match="need two of each"):
        pv.collapse_report(Units(), torch.randn(5, 3), num_particles=1)
    with pytest.raises(ValueError, match=r"expects \(N, 3\)"):
        pv.collapse_report(Units(), torch.randn(5, 2))
