"""Facts about a pair come from one run of its programs, and data are checked once."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.models import VAE, CategoricalVAE
from pyro_vae.pair import checks
from pyro_vae.pair.inspection import inspect


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


def test_each_program_runs_once_and_nothing_is_left_changed() -> None:
    pair, x = Counted(), torch.randn(6, 4)
    state, before = torch.get_rng_state(), {name: value.clone() for name, value in pair.state_dict().items()}
    inspection = inspect(pair, (x,))
    assert pair.runs == {("guide", False): 1, ("model", False): 1}
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


@pytest.mark.parametrize("call", ["fit", "log_likelihood"])
def test_data_are_scanned_for_nan_once(monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    scanned: Counter[int] = Counter()
    check = checks._check_finite

    def counted(x: Tensor, argument: str) -> None:
        scanned[len(x)] += 1
        check(x, argument)

    monkeypatch.setattr(checks, "_check_finite", counted)
    pair, x = Counted(), torch.randn(64, 4)
    if call == "fit":
        pv.fit(pair, x, epochs=1, batch_size=16, validation=0.25, progress=False)
    else:
        pv.log_likelihood(pair, x, num_particles=2)
    assert scanned == {64: 1}
