"""An argument of ``fit`` has its effect, or is refused in one sentence; none is taken and dropped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch
from torch import Tensor, nn

import pyro_vae as pv


def vae() -> pv.models.VAE:
    torch.manual_seed(0)
    return pv.models.VAE((4,), pv.StandardNormal(2), encoder=nn.Linear(4, 4), decoder=nn.Linear(2, 4))


def data(size: int = 64) -> Tensor:
    return torch.randn(size, 4, generator=torch.Generator().manual_seed(1))


def fit(pair: pv.Pair, x: Any, **kwargs: Any) -> pv.Run:
    return pv.fit(pair, x, **{"epochs": 1, "batch_size": 16, "progress": False, "device": "cpu"} | kwargs)


def weights(pair: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in pair.parameters()])


# The learning rate


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD])
def test_an_optimiser_class_has_the_learning_rate_asked_for(optimizer: Any, tmp_path: Path) -> None:
    pair, by_hand = vae(), vae()
    run = fit(pair, data(), optimizer=optimizer, lr=0.05, run_dir=tmp_path)
    fit(by_hand, data(), optimizer=lambda parameters: optimizer(parameters, lr=0.05))
    assert run.metrics[-1]["lr"] == 0.05
    assert json.loads((tmp_path / "config.json").read_text())["fit"]["lr"] == 0.05
    assert torch.equal(weights(pair), weights(by_hand))


def test_the_run_folder_holds_the_rate_that_a_function_sets(tmp_path: Path) -> None:
    fit(vae(), data(), optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.02), run_dir=tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["fit"]["lr"] == 0.02


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"lr": 0.1, "optimizer": lambda p: torch.optim.SGD(p, lr=1.0)}, "lr is 0.1, and optimizer is a function"),
        ({"optimizer": lambda p: None}, "optimizer gives NoneType; it must make a torch optimiser"),
        ({"optimizer": pyro.optim.Adam({"lr": 1e-3})}, "optimizer is Pyro's Adam; it must be a function"),
        ({"optimizer": pyro.optim.ClippedAdam({"lr": 1e-3})}, "optimizer is Pyro's ClippedAdam"),
        ({"optimizer": lambda p: torch.optim.Adam(p[2:])}, "leaves out 2 trainable parameters, the first 'p_x"),
        ({"optimizer": lambda p: torch.optim.Adam([*p, nn.Parameter(p[0] + 1)])}, "no parameters of the pair"),
        ({"config": {"note": 1}}, "config adds entries to a run folder's config.json: give run_dir too"),
        ({"beta": 0.0, "warmup": 3}, "warmup is 3, and beta 0"),
    ],
)
def test_an_argument_without_effect_is_refused(kwargs: dict[str, Any], message: str) -> None:
    pair = vae()
    before = weights(pair)
    with pytest.raises(ValueError, match=message):
        fit(pair, data(), **kwargs)
    assert torch.equal(before, weights(pair))
