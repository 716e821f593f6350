"""Small pairs of every kind, and how a captured step is held against the eager one."""

from __future__ import annotations

import copy
import dataclasses
import typing
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.cli.recipes import RECIPES
from pyro_vae.cli.recipes.recipe import ImageRecipe
from pyro_vae.models import (
    VAE,
    VGAE,
    GaussianMixture,
    LinearGaussianMixtureVAE,
    LinearGaussianVAE,
    LinearTwoStageVAE,
)
from pyro_vae.training.captured_step import captured_step
from pyro_vae.training.step import eager_step

IMAGE = (1, 4, 4)


def binary(size: int, *shape: int, seed: int = 1) -> Tensor:
    return torch.rand(size, *shape, generator=torch.Generator().manual_seed(seed)).gt(0.5).to(torch.get_default_dtype())


def built(options: Any) -> Callable[[], pv.Pair]:
    # 0 and 1 lie in every likelihood's support.
    return lambda: options.build(pv.data.DataSet("blank", binary(32, *IMAGE), binary(8, *IMAGE), None, None, levels=17))


def option_cases() -> dict[str, Callable[[], pv.Pair]]:
    """Return each model of the command line, for every value of its options that are choices."""
    cases = {}
    for name, options in RECIPES.items():
        if not issubclass(options, ImageRecipe):
            # It takes other data than images, and is among CASES by itself.
            continue
        cases[name] = built(options())
        for field, kind in typing.get_type_hints(options).items():
            for value in typing.get_args(kind) if typing.get_origin(kind) is Literal else ():
                # Only a Gaussian likelihood has a scale.
                changes = {field: value} | ({"likelihood": "gaussian"} if field == "scale" else {})
                chosen = dataclasses.replace(options(), **changes)
                if chosen != options():
                    cases[f"{name}-{field}-{value}"] = built(chosen)
    return cases


def mixture(size: int = 2) -> pv.MixtureOfGaussians:
    return pv.MixtureOfGaussians(3, size)


CASES: dict[str, Callable[[], pv.Pair]] = option_cases() | {
    "linear": lambda: LinearGaussianVAE(4, 2),
    "linear-mixture": lambda: LinearGaussianMixtureVAE(4, mixture()),
    "linear-two-stage": lambda: LinearTwoStageVAE(4, 2, mixture(), 2),
    "vae-mixture": lambda: VAE((5,), mixture()),
    "vae-free": lambda: VAE((5,), pv.StandardNormal(2), posterior=pv.FreeGaussian(8, 2), decoder=nn.Linear(2, 5)),
    "gaussian-mixture": lambda: GaussianMixture(mixture()),
    "vgae": lambda: VGAE(4, pv.StandardNormal(2)),
}


def batches(pair: pv.Pair, sizes: tuple[int, ...] = (6, 6, 2)) -> list[tuple[Tensor, ...]]:
    x = [binary(size, *pair.x_shape, seed=i) for i, size in enumerate(sizes)]
    if isinstance(pair, VGAE):
        # Graphs: symmetric, without loops.
        x = [(upper + upper.mT).bool() for upper in (tensor.triu(1) for tensor in x)]
    free = any(isinstance(module, pv.FreeGaussian) for module in pair.modules())
    return [(tensor, torch.arange(len(tensor))) if free else (tensor,) for tensor in x]


class Kept(torch.optim.SGD):
    """Keep the gradients of every step."""

    def step(self, closure: Any = None) -> None:
        self.gradients = getattr(self, "gradients", [])
        self.gradients.append(
            [p.grad.clone() for group in self.param_groups for p in group["params"] if p.grad is not None]
        )
        super().step(closure)


class Result(typing.NamedTuple):
    losses: list[float]
    gradients: list[list[Tensor]]
    state: dict[str, Tensor]
    generator: Tensor


def run(
    make: Any, pair: pv.Pair, loss: Any, data: list[Any], betas: tuple[float, ...] = (1.0,), steps: int = 4, **kw: Any
) -> Result:
    pair, loss = copy.deepcopy(pair), copy.deepcopy(loss)
    optimizer = Kept(pair.parameters(), lr=1e-3, momentum=0.5)
    step = make(pair, loss, optimizer, **kw)
    torch.manual_seed(0)
    losses = [step(*data[i % len(data)], beta=betas[i % len(betas)]) for i in range(steps)]
    return Result(losses, optimizer.gradients, dict(pair.state_dict()), torch.get_rng_state())


def assert_same(ours: Result, theirs: Result, rtol: float = 1e-10) -> None:
    assert ours.losses == pytest.approx(theirs.losses, rel=rtol)
    assert torch.equal(ours.generator, theirs.generator)
    for a, b in zip(ours.gradients, theirs.gradients, strict=True):
        # Relative to the whole gradient: single entries may cancel.
        size = torch.stack([g.norm() for g in b]).norm()
        assert len(a) == len(b)
        assert all((g - h).norm() <= rtol * size for g, h in zip(a, b, strict=True))
    assert ours.state.keys() == theirs.state.keys()
    for name, value in theirs.state.items():
        torch.testing.assert_close(ours.state[name], value, rtol=rtol, atol=rtol)


def assert_captured_is_eager(pair: pv.Pair, loss: Any, data: list[Any] | None = None, **kw: Any) -> None:
    data = batches(pair) if data is None else data
    assert_same(run(captured_step, pair, loss, data, **kw), run(eager_step, pair, loss, data, **kw))


def small_vae(**networks: nn.Module) -> VAE:
    defaults = {"encoder": nn.Linear(5, 4), "decoder": nn.Linear(2, 10)}
    return VAE((5,), pv.StandardNormal(2), pv.DiscretisedLogistic(17), **(defaults | networks))  # type: ignore[arg-type]
