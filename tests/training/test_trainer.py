"""Losses that are read back late, and epochs that are saved late, cost neither a number nor a checkpoint."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.models import VAE, LinearGaussianVAE
from pyro_vae.training.captured_step import captured_step
from pyro_vae.training.run_folder import load_parameters, load_state, save_state
from pyro_vae.training.step import NonFiniteLossError


@pytest.fixture
def read_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat the CPU as a device whose numbers are not read back at every step."""
    monkeypatch.setattr("pyro_vae.training.step.READ_LATER", {"cpu"})


def vae() -> VAE:
    return VAE((4,), pv.StandardNormal(2), encoder=nn.Linear(4, 4), decoder=nn.Linear(2, 4))


def data() -> Tensor:
    return torch.randn(64, 4, generator=torch.Generator().manual_seed(1))


def fit(pair: pv.Pair, x: Tensor, **kwargs: Any) -> pv.Run:
    options = {"epochs": 4, "batch_size": 16, "progress": False, "device": "cpu", "capture": True}
    return pv.fit(pair, x, **options | kwargs)


def without_time(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in record.items() if name != "seconds"} for record in metrics]


# Reading losses back


@pytest.mark.parametrize("clip_norm", [None, 0.5])
@pytest.mark.parametrize("steps_between", [2, 1000])
def test_losses_read_late_are_the_same(
    steps_between: int, clip_norm: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = vae()
    twin = copy.deepcopy(pair)
    at_once = fit(pair, data(), clip_norm=clip_norm)
    monkeypatch.setattr("pyro_vae.training.step.READ_LATER", {"cpu"})
    monkeypatch.setattr("pyro_vae.training.trainer.STEPS_BETWEEN_READINGS", steps_between)
    late = fit(twin, data(), clip_norm=clip_norm)
    assert without_time(late.metrics) == without_time(at_once.metrics)
    assert all(torch.equal(a, b) for a, b in zip(pair.parameters(), twin.parameters(), strict=True))


@pytest.mark.usefixtures("read_later")
@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_a_loss_that_is_not_finite_is_returned_and_moves_nothing(clip_norm: float | None) -> None:
    pair, x = LinearGaussianVAE(4, 2), data()[:8]
    step = captured_step(pair, pv.objectives.elbo, torch.optim.SGD(pair.parameters(), lr=0.01), clip_norm=clip_norm)
    loss = step(x)
    assert isinstance(loss, Tensor)
    assert loss.shape == ()
    assert not loss.requires_grad
    assert torch.isfinite(loss)
    before = copy.deepcopy(pair.state_dict())
    bad = x.clone()
    bad[3] = 1e200
    assert math.isnan(step(bad))
    assert all(torch.equal(before[name], value) for name, value in pair.state_dict().items())
    # Nor does the next step meet what the bad one left.
    assert math.isfinite(step(x))


class Overflowing(LinearGaussianVAE):
    """From its fifth training step on, the datum that is marked overflows."""

    marked: Tensor
    steps: Tensor

    def __init__(self, marked: Tensor) -> None:
        super().__init__(4, 2)
        self.register_buffer("marked", marked)
        self.register_buffer("steps", torch.zeros(()))

    def model(self, x: Tensor) -> None:
        if self.training:
            self.steps += 1
        overflows = (x == self.marked).all(-1, keepdim=True) & (self.steps > 4)
        super().model(torch.where(overflows, 1e200, x))


@pytest.mark.usefixtures("read_later")
def test_the_read_back_finds_the_batch_and_spares_the_checkpoint(tmp_path: Path) -> None:
    # In the third batch of the second epoch; its first is eager.
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    marked = data()[order[40]]
    pair = Overflowing(marked)
    with pytest.raises(NonFiniteLossError, match=r"not finite in epoch 2, at .*x.*the checkpoint is that of epoch 1"):
        fit(pair, data(), run_dir=tmp_path)
    (kept,) = torch.load(tmp_path / "non_finite_batch.pt", weights_only=True)["batch"]
    assert torch.equal(kept, data()[order[32:48]])
    state = load_state(tmp_path / "checkpoint" / "state.pt", "Overflowing")
    assert state["epoch"] == 1
    unbroken = Overflowing(marked)
    load_parameters(unbroken, tmp_path / "checkpoint" / "pair.safetensors")
    assert all(value.isfinite().all() for value in unbroken.state_dict().values())
    # The steps between the bad one and the reading moved by momentum at most.
    assert all(parameter.isfinite().all() for parameter in pair.parameters())


# Saving


def count_saves(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    epochs: list[int] = []

    def counted(state: dict[str, Any], path: Path) -> None:
        epochs.append(state["epoch"])
        save_state(state, path)

    monkeypatch.setattr("pyro_vae.training.run_folder.save_state", counted)
    return epochs


@pytest.mark.parametrize(("share", "saved"), [(1e-9, [0, 6]), (1.0, [0, 1, 2, 3, 4, 5, 6])])
def test_saving_takes_no_more_than_its_share_of_time(
    share: float, saved: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pyro_vae.training.run_folder.SHARE_OF_SAVING", share)
    epochs = count_saves(monkeypatch)
    run = fit(vae(), data(), epochs=6, run_dir=tmp_path)
    assert epochs == saved
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == run.metrics


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_epoch_held_in_memory_is_written_when_a_run_breaks_off(
    error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pyro_vae.training.run_folder.SHARE_OF_SAVING", 1e-9)
    start = vae()
    whole, broken, rest = (copy.deepcopy(start) for _ in range(3))
    # Two calls are those of the checks before the first step.
    calls = iter(range(2 + 4 * 3 + 1))

    def breaking(terms: pv.LogTerms) -> Tensor:
        if next(calls, None) is None:
            raise error("broken off")
        return terms.log_weights.mean(0)

    def elbo(terms: pv.LogTerms) -> Tensor:
        return terms.log_weights.mean(0)

    elbo.__name__ = "breaking"
    fit(whole, data(), loss=elbo, capture=False)
    with pytest.raises(error, match="broken off"):
        # In the middle of the fourth epoch.
        fit(broken, data(), loss=breaking, capture=False, run_dir=tmp_path)
    assert load_state(tmp_path / "checkpoint" / "state.pt", "VAE")["epoch"] == 3
    held = vae()
    load_parameters(held, tmp_path / "checkpoint" / "pair.safetensors")
    assert not all(torch.equal(a, b) for a, b in zip(held.parameters(), broken.parameters(), strict=True))
    fit(rest, data(), loss=elbo, capture=False, run_dir=tmp_path, resume=True)
    assert all(torch.equal(a, b) for a, b in zip(rest.parameters(), whole.parameters(), strict=True))
