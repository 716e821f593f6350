"""Handlers weight, hold and replace a pair's sites."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyro_vae as pv
from pyro_vae.pair.handlers import HoldLatents, ReplaceLikelihood, scaled_latents
from pyro_vae.pair.site import sites_of


class Given(pv.Pair):
    """z ~ N(0, 1), a label y that the guide fixes, x ~ N(z, 1)."""

    x_shape = ()

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(0.0, 2.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.7))
            pyro.sample("y", dist.Delta(x))


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0, 3.0])
def test_beta_weights_the_divergence_and_no_point_mass(beta: float) -> None:
    pair, x, loss = Given(), torch.randn(4), pyro.infer.Trace_ELBO()
    torch.manual_seed(0)
    with scaled_latents(beta):
        weighted = loss.loss(pair.model, pair.guide, x)
    torch.manual_seed(0)
    terms = pv.log_terms(pair, x)
    expected = pv.objectives.beta_elbo(beta)(terms).sum()
    torch.testing.assert_close(torch.tensor(-weighted), expected, rtol=1e-12, atol=1e-12)


def test_held_latents_stay_latent_and_data_stay_observed() -> None:
    pair, x = Given(), torch.randn(4)
    values = {"z": torch.full((4,), 2.0), "x": torch.zeros(4)}
    sites = sites_of(pyro.poutine.trace(HoldLatents(values)(pair.model)).get_trace(x))
    assert torch.equal(sites["z"].drawn, values["z"])
    assert not sites["z"].is_observed
    assert torch.equal(sites["x"].drawn, x)
    assert torch.equal(sites["z"].log_prob, dist.Normal(0.0, 1.0).log_prob(values["z"]))


def test_only_the_likelihood_is_replaced() -> None:
    def wider(likelihood: Any) -> Any:
        return dist.Normal(likelihood.loc, 10.0)

    pair, x = Given(), torch.randn(4)
    sites = sites_of(pyro.poutine.trace(ReplaceLikelihood(wider)(pair.model)).get_trace(x))
    assert (float(sites["x"].fn.scale[0]), float(sites["z"].fn.scale[0])) == (10.0, 1.0)
    same = sites_of(pyro.poutine.trace(ReplaceLikelihood(lambda _: None)(pair.model)).get_trace(x))
    assert float(same["x"].fn.scale[0]) == 1.0
