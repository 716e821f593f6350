"""Facts about a pair come from a fixed number of runs on three data, and data are checked once."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.inspection import data, inspect
from pyro_vae.models import VAE, CategoricalVAE


class Counted(VAE):
    """A VAE that counts how often its programs run, by program and training flag."""

    def __init__(self) -> None:
        super().__init__((4,), pv.StandardNormal(2), encoder=nn.Linear(4, 4), decoder=nn.Linear(2, 4))
        self.runs: Counter[Any] = Counter()

    def model(self, x: Tensor, *conditions: Tensor) -> None:
        self.runs["model", self.training] += 1
        super().model(x, *conditions)

    def guide(self, x: Tensor, *conditions: Tensor) -> None:
        self.runs["guide", self.training] += 1
        super().guide(x, *conditions)


# For facts, for the leaves and for the reference once each, once without particles, for each of three data alone; the
# guide once more to draw, the model twice more on other data.
INSPECTED = {("guide", False): 8, ("model", False): 9}


@pytest.mark.parametrize("count", [6, 2000])
def test_a_pair_runs_a_fixed_number_of_times_and_nothing_is_left_changed(count: int) -> None:
    pair, x = Counted(), torch.randn(count, 4)
    state, before = torch.get_rng_state(), {name: value.clone() for name, value in pair.state_dict().items()}
    inspection = inspect(pair, (x,))
    assert pair.runs == INSPECTED
    assert pair.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in pair.state_dict().items())
    assert (inspection.quantity, inspection.is_discrete) == ("log p(x)", False)
    assert {pair.q_z.network, pair.p_x.network} <= set(inspection.networks)  # type: ignore[union-attr]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in pair.modules())


def test_training_is_looked_at_where_it_is_asked_for() -> None:
    pair = CategoricalVAE((4,), pv.OneHotPrior(2, 3), pv.Bernoulli(), pv.GumbelSoftmax(0.5))
    inspection = inspect(pair, (torch.randn(3, 4).gt(0).to(torch.get_default_dtype()),))
    assert not inspection.trace.guide["z"].is_reparameterised
    assert inspection.training.guide["z"].is_reparameterised


class PointMasses(pv.Pair):
    """A pair whose guide fixes a bit c, a number y, both or neither."""

    x_shape = ()

    def __init__(self, fixed: str) -> None:
        super().__init__()
        self.fixed = fixed

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Bernoulli(0.5 * torch.ones(())))
            y = pyro.sample("y", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(c + y, 1.0), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("c", dist.Delta((x > 0).to(x.dtype)) if "c" in self.fixed else dist.Bernoulli(0.5 + 0 * x))
            pyro.sample("y", dist.Delta(x) if "y" in self.fixed else dist.Normal(x, 1.0))


@pytest.mark.parametrize(
    ("fixed", "quantity"),
    [
        ("", "log p(x)"),
        ("c", "lower bound on log p(x)"),
        ("y", "log p(x, y)"),
        ("cy", "lower bound on log p(x, y)"),
    ],
)
def test_point_masses_name_the_quantity(fixed: str, quantity: str) -> None:
    inspection = inspect(PointMasses(fixed), (torch.randn(3),))
    assert (inspection.quantity, inspection.prior_quantity) == (quantity, "log p(x)")


CALLS: dict[str, Any] = {
    "fit": lambda pair, x: pv.fit(pair, x, epochs=1, batch_size=16, validation=0.25, progress=False),
    "log_likelihood": lambda pair, x: pv.log_likelihood(pair, x, num_particles=2),
    "posterior": lambda pair, x: pv.posterior(pair, x, num_particles=2),
    "reconstruct": lambda pair, x: pv.reconstruct(pair, x),
    "impute": lambda pair, x: pv.impute(pair, x, x > 0, num_samples=1, num_particles=2, sweeps=1),
    "collapse_report": lambda pair, x: pv.collapse_report(pair, x, num_particles=2),
    "to_arviz": lambda pair, x: pv.to_arviz(pair, x, num_particles=2, num_draws=1),
    "inference_gap": lambda pair, x: pv.inference_gap(pair, x, num_particles=2, steps=1),
    "latent_means": lambda pair, x: pv.latent_means(pair, x),
    "check_pair": lambda pair, x: pv.testing.check_pair(pair, x),
}


@pytest.mark.parametrize("call", CALLS)
def test_data_are_scanned_for_nan_once(monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    scanned: Counter[int] = Counter()
    check = data.check_finite

    def counted(x: Tensor, argument: str) -> None:
        scanned[len(x)] += 1
        check(x, argument)

    monkeypatch.setattr(data, "check_finite", counted)
    CALLS[call](Counted(), torch.randn(64, 4))
    assert scanned == {64: 1}


def test_a_check_runs_the_pair_in_training_mode_a_few_times() -> None:
    pair = Counted()
    assert pv.testing.check_pair(pair, torch.randn(6, 4)) == []
    # Facts, and two scores: of the data, and of copies of the first beside other latents, drawn by two more guides.
    assert {mode: count for mode, count in pair.runs.items() if mode[1]} == {("guide", True): 5, ("model", True): 3}


def test_means_come_from_the_guide_alone() -> None:
    pair = Counted()
    pv.latent_means(pair, torch.randn(300, 4))
    # Three chunks of at most 128 data, after the inspection.
    assert pair.runs == {**INSPECTED, ("guide", False): INSPECTED["guide", False] + 3}
