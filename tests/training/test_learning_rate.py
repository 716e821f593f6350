"""Learning-rate schedules of torch in ``fit``: they move the optimiser, epoch by epoch, and outlive an interruption."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LambdaLR,
    LRScheduler,
    MultiStepLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

import pyro_vae as pv


def pair() -> pv.Pair:
    torch.manual_seed(0)
    return pv.models.VAE((4,), pv.StandardNormal(2), encoder=nn.Linear(4, 4), decoder=nn.Linear(2, 4))


def data() -> Tensor:
    return torch.randn(64, 4, generator=torch.Generator().manual_seed(1))


def fit(pair: pv.Pair, **settings: Any) -> pv.Run:
    options = {"batch_size": 16, "validation": 0.25, "lr": 0.1, "progress": False, "device": "cpu"}
    return pv.fit(pair, data(), **options | settings)


SCHEDULES: dict[str, Callable[[torch.optim.Optimizer], LRScheduler]] = {
    "steps": lambda optimizer: MultiStepLR(optimizer, [1, 3], 0.5),
    "cosine": lambda optimizer: CosineAnnealingLR(optimizer, 4),
    "by a function": lambda optimizer: LambdaLR(optimizer, lambda epoch: 1 / (1 + epoch)),
    "plateau": lambda optimizer: ReduceLROnPlateau(optimizer, "min", 0.5, 0, 1e3, "abs"),
}


def test_a_schedule_moves_the_rate_after_each_epoch() -> None:
    run = fit(pair(), epochs=4, scheduler=SCHEDULES["steps"])
    assert [record["lr"] for record in run.metrics] == [0.1, 0.05, 0.05, 0.025]


def test_a_plateau_is_one_of_the_validation_loss() -> None:
    # Nothing improves on the first loss by the threshold, so that every later epoch halves the rate.
    run = fit(pair(), epochs=4, scheduler=SCHEDULES["plateau"])
    assert [record["lr"] for record in run.metrics] == [0.1, 0.1, 0.05, 0.025]


def test_a_rate_of_zero_trains_no_further() -> None:
    still, once = pair(), pair()
    fit(still, epochs=3, scheduler=lambda optimizer: LambdaLR(optimizer, lambda epoch: float(epoch < 1)))
    fit(once, epochs=1)
    assert all(torch.equal(p, q) for p, q in zip(still.parameters(), once.parameters(), strict=True))


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_recorded_run_follows_a_schedule_as_an_eager_one(name: str) -> None:
    eager, captured = pair(), pair()
    for trained, capture in ((eager, False), (captured, True)):
        fit(trained, epochs=4, scheduler=SCHEDULES[name], capture=capture)
    assert all(torch.equal(p, q) for p, q in zip(eager.parameters(), captured.parameters(), strict=True))


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_resumed_run_goes_on_with_its_schedule(name: str, tmp_path: Path) -> None:
    whole, parts = pair(), pair()
    fit(whole, epochs=4, scheduler=SCHEDULES[name])
    for epochs in (2, 4):
        fit(parts, epochs=epochs, scheduler=SCHEDULES[name], run_dir=tmp_path / "run", resume=epochs == 4)
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), parts.parameters(), strict=True))


def test_a_run_is_not_resumed_under_another_schedule(tmp_path: Path) -> None:
    fit(pair(), epochs=1, scheduler=SCHEDULES["steps"], run_dir=tmp_path / "run")
    with pytest.raises(ValueError, match="other settings: scheduler"):
        fit(pair(), epochs=2, run_dir=tmp_path / "run", resume=True)


@pytest.mark.parametrize(("factor", "milestone"), [(0.5, 2), (0.1, 3)])
def test_the_parts_of_a_schedule_are_compared_too(factor: float, milestone: int, tmp_path: Path) -> None:
    def schedule(factor: float, milestone: int) -> Callable[[torch.optim.Optimizer], LRScheduler]:
        return lambda adam: SequentialLR(adam, [StepLR(adam, 1), StepLR(adam, 1, factor)], [milestone])

    fit(pair(), epochs=1, scheduler=schedule(0.1, 2), run_dir=tmp_path / "run")
    fit(pair(), epochs=2, scheduler=schedule(0.1, 2), run_dir=tmp_path / "run", resume=True)
    with pytest.raises(ValueError, match="other settings: scheduler"):
        fit(pair(), epochs=3, scheduler=schedule(factor, milestone), run_dir=tmp_path / "run", resume=True)


def test_what_no_schedule_can_follow_is_refused() -> None:
    with pytest.raises(ValueError, match="ReduceLROnPlateau follows the validation loss: pass validation data"):
        fit(pair(), epochs=1, validation=None, scheduler=SCHEDULES["plateau"])
    not_one: Any = lambda optimizer: None  # noqa: E731
    with pytest.raises(ValueError, match="scheduler gives function; it must make a scheduler"):
        fit(pair(), epochs=1, scheduler=not_one)
    optimizer: Any = torch.optim.Adam(pair().parameters())
    made: Any = CosineAnnealingLR(optimizer, 4)
    with pytest.raises(ValueError, match="scheduler gives CosineAnnealingLR; it must make a scheduler"):
        fit(pair(), epochs=1, scheduler=made)
    with pytest.raises(ValueError, match="optimizer is Adam; it must be a function that makes one"):
        fit(pair(), epochs=1, optimizer=optimizer)
