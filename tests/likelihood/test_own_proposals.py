"""Weighted draws from proposals in the guide's place: fitted ones, and programs of a user."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyro_vae as pv
from pyro_vae.models import LinearGaussianVAE


class Narrow(LinearGaussianVAE):
    """Probabilistic PCA with a guide that is far too narrow, and beside the posterior."""

    def guide(self, x: Tensor) -> None:
        exact = self.exact_posterior(x)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(exact.mean + 0.3, 0.05 * exact.stddev).to_event(1))


class Wide(LinearGaussianVAE):
    """The same with the prior as its guide."""

    def guide(self, x: Tensor) -> None:
        prior(x)


def narrow() -> tuple[Narrow, Tensor]:
    torch.manual_seed(0)
    return Narrow(6, 2), torch.randn(4, 6)


def prior(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))


@pytest.mark.parametrize("proposal", ["auto", prior])
def test_weighted_draws_have_the_posteriors_mean(proposal: Any) -> None:
    pair, x = narrow()
    draws = pv.posterior(pair, x, num_particles=4000, seed=0, proposal=proposal)
    weights = draws.log_weights.softmax(0).unsqueeze(-1)
    mean = (weights * draws.latents["z"]).sum(0)
    exact = pair.exact_posterior(x)
    effective = 1 / weights.square().sum(0)
    assert bool(((mean - exact.mean).abs() < 5 * exact.stddev / effective.sqrt()).all())
    if proposal == "auto":
        # The posterior itself.
        assert float(effective.min()) > 3999


def test_arviz_gets_the_draws_of_a_fitted_proposal() -> None:
    pair, x = narrow()
    data = pv.to_arviz(pair, x, num_particles=400, num_draws=100, seed=0, proposal="auto")
    # Equal weights: no draw is taken twice, and nothing has a tail.
    assert float(data.sample_stats["ess"].min()) == pytest.approx(400)
    z = torch.as_tensor(data.posterior["z"].values[0])
    exact = pair.exact_posterior(x)
    assert bool(((z.mean(0) - exact.mean).abs() < 5 * exact.stddev / 10).all())
    guide = pv.to_arviz(pair, x, num_particles=400, num_draws=100, seed=0)
    assert float(guide.sample_stats["ess"].max()) < 100


def test_imputation_takes_a_program() -> None:
    pair, x = narrow()
    mask = torch.arange(6) < 3
    wide = pv.impute(pair, x, mask, seed=0, proposal=prior)
    assert torch.equal(wide.samples[..., :3], x[:, :3].expand(16, -1, -1))
    pair.__class__ = Wide
    assert torch.equal(pv.impute(pair, x, mask, seed=0).samples, wide.samples)


def test_the_gap_takes_the_settled_estimate() -> None:
    pair, x = narrow()
    gap = pv.inference_gap(pair, x, num_particles=500, steps=50, seed=0, proposal="auto")
    torch.testing.assert_close(gap.log_likelihood, pair.exact_log_likelihood(x).detach(), rtol=0, atol=1e-8)
    with pytest.raises(ValueError, match="proposal is 'guide'; it must be 'joint' or 'auto'"):
        pv.inference_gap(pair, x, proposal="guide")  # type: ignore[arg-type]


def test_what_cannot_be_drawn_from_is_refused() -> None:
    pair, x = narrow()
    with pytest.raises(ValueError, match="proposal is 'laplace'; it must be 'guide', 'auto' or a program"):
        pv.posterior(pair, x, proposal="laplace")  # type: ignore[arg-type]
    categorical = pv.models.CategoricalVAE((4,), pv.OneHotPrior(2, 3), pv.Bernoulli(), pv.GumbelSoftmax(0.5))
    data = torch.zeros(2, 4, dtype=torch.get_default_dtype())
    with pytest.raises(ValueError, match=r"no proposal can be fitted \(site 'z' is discrete\): use proposal='guide'"):
        pv.posterior(categorical, data, proposal="auto")
