"""An update from a list of gradients: that of ``optimizer.step()``, by its kernel alone where that is all it does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import LambdaLR, StepLR
from torch.optim.optimizer import register_optimizer_step_pre_hook

from pyro_vae.capture import fused_adam as updates
from pyro_vae.capture.fused_adam import update

MAKE: dict[str, tuple[Callable[[list[nn.Parameter]], torch.optim.Optimizer], bool]] = {
    # Whether the kernel is called alone, once there is state.
    "fused Adam": (lambda p: Adam(p, lr=0.1, fused=True), True),
    "fused Adam, every number": (
        lambda p: Adam(p, lr=0.1, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.1, maximize=True, fused=True),
        True,
    ),
    "Adam": (lambda p: Adam(p, lr=0.1), False),
    "AMSGrad": (lambda p: Adam(p, lr=0.1, amsgrad=True, fused=True), False),
    "AdamW": (lambda p: AdamW(p, lr=0.1, fused=True), False),
    "two groups": (lambda p: Adam([{"params": p[:1]}, {"params": p[1:], "lr": 0.01}], lr=0.1, fused=True), False),
    "SGD": (lambda p: SGD(p, lr=0.1, momentum=0.9), False),
}


def parameters() -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape)) for shape in ((3, 2), (4,), (1,))]


def gradients(step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=generator) for shape in ((3, 2), (4,), (1,))]


def by_torch(optimizer: torch.optim.Optimizer, trained: list[nn.Parameter], values: list[Tensor]) -> None:
    for parameter, value in zip(trained, values, strict=True):
        parameter.grad = value
    optimizer.step()
    optimizer.zero_grad()


def same(one: Any, other: Any) -> bool:
    """Compare optimisers' states whole: moments, steps and numbers."""
    flat, spec = torch.utils._pytree.tree_flatten(one)
    others, its = torch.utils._pytree.tree_flatten(other)
    return spec == its and all(
        torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(flat, others, strict=True)
    )


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the calls of the kernel alone."""
    calls: list[int] = []
    alone = updates._fused_adam

    def counted(*arguments: Any) -> None:
        calls.append(1)
        alone(*arguments)

    monkeypatch.setattr(updates, "_fused_adam", counted)
    return calls


@pytest.mark.parametrize("name", MAKE)
def test_an_update_is_the_optimisers_step(name: str, kernels: list[int]) -> None:
    make, alone = MAKE[name]
    ours, theirs = parameters(), parameters()
    updating, stepping = make(ours), make(theirs)
    for step in range(5):
        # The last parameter has no gradient in some steps.
        count = 2 if step == 3 else 3
        update(updating, ours[:count], gradients(step)[:count])
        by_torch(stepping, theirs[:count], gradients(step)[:count])
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))
    assert same(updating.state_dict(), stepping.state_dict())
    # The first makes the state.
    assert len(kernels) == (4 if alone else 0)


def test_a_schedule_and_a_loaded_state_are_followed(kernels: list[int]) -> None:
    make = MAKE["fused Adam"][0]
    ours, theirs = parameters(), parameters()
    updating, stepping = make(ours), make(theirs)
    schedules = [LambdaLR(each, lambda epoch: 1 / (1 + epoch)) for each in (updating, stepping)]
    for step in range(6):
        if step == 3:
            updating.load_state_dict(copy.deepcopy(updating.state_dict()))
        update(updating, ours, gradients(step))
        by_torch(stepping, theirs, gradients(step))
        for schedule in schedules:
            schedule.step()
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))
    assert same(updating.state_dict(), stepping.state_dict())
    assert len(kernels) == 5


def test_what_was_hooked_to_a_step_still_happens(kernels: list[int]) -> None:
    trained = parameters()
    optimizer, seen = MAKE["fused Adam"][0](trained), []
    update(optimizer, trained, gradients(0))
    handle = optimizer.register_step_post_hook(lambda *_: seen.append("hook"))
    update(optimizer, trained, gradients(1))
    handle.remove()
    step = optimizer.step
    optimizer.step = MethodType(lambda self: (seen.append("own"), step()), optimizer)  # type: ignore[method-assign]
    update(optimizer, trained, gradients(2))
    # A scheduler's wrapper does not hide it.
    StepLR(optimizer, 1)
    update(optimizer, trained, gradients(3))
    handle = register_optimizer_step_pre_hook(lambda *_: seen.append("everyone's"))
    other = MAKE["fused Adam"][0](trained)
    for i in (4, 5):
        update(other, trained, gradients(i))
    handle.remove()
    assert seen == ["hook", "own", "own", "everyone's", "everyone's"]
    assert not kernels


def test_a_state_that_was_looked_up_too_early_is_made_all_the_same() -> None:
    trained = parameters()
    optimizer = MAKE["fused Adam"][0](trained)
    assert not optimizer.state[trained[0]]
    update(optimizer, trained, gradients(0))
    assert float(optimizer.state[trained[0]]["step"]) == 1


def test_gradients_that_others_left_do_not_enter() -> None:
    for name in ("fused Adam", "SGD"):
        ours, theirs = parameters(), parameters()
        updating, stepping = MAKE[name][0](ours), MAKE[name][0](theirs)
        for step in range(3):
            for parameter in ours:
                parameter.grad = torch.ones_like(parameter)
            update(updating, ours, gradients(step))
            by_torch(stepping, theirs, gradients(step))
        assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))
