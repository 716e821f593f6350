"""A step that replays graphs is the step that it was made of; what no graph can hold is launched kernel by kernel."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any, ClassVar

import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import nn

import pyro_vae as pv
from pyro_vae.capture import cuda_graph as cuda_graphs
from pyro_vae.capture.cuda_graph import WARM_UPS, GraphedStep
from pyro_vae.models import VAE
from pyro_vae.runtime.batches import Rows
from pyro_vae.training.captured_step import captured_step
from tests.support.capture_cases import CASES, batches, binary, small_vae
from tests.support.taken_down import RATE, StandIn, assert_graphed_is_not, assert_same, fused_adam, sgd, taken
from tests.training.test_captured_step import Averaged, Tempered

# The same numbers


@pytest.mark.usefixtures("graphs")
@pytest.mark.parametrize("make", [fused_adam, sgd, partial(torch.optim.SGD, lr=RATE, momentum=0.5, fused=True)])
@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_graphs_take_the_same_steps(make: Any, clip_norm: float | None) -> None:
    # Two shapes, each with and without β: four graphs of five steps or more each.
    pair = small_vae()
    device = assert_graphed_is_not(
        pair, batches(pair, (6, 2)), make, steps=24, betas=(1.0, 1.0, 0.5, 0.25), clip_norm=clip_norm
    )
    assert len(device.graphs) == 4
    # One more step of each kind was taken while it was recorded first.
    assert device.replays + device.asides <= 24
    assert device.replays >= 24 - 4 * (WARM_UPS + 1)


# Recordings that draw numbers in all ways, hold buffers and freeze parameters.
KINDS = ["srvae", "beta-vae-penalty-total-correlation", "categorical-vae", "denoising-vae", "ladder-vae", "vae-free"]


@pytest.mark.usefixtures("graphs")
@pytest.mark.parametrize("name", KINDS)
def test_graphs_of_every_kind_of_pair(name: str) -> None:
    pair = CASES[name]()
    device = assert_graphed_is_not(pair, batches(pair, (6,)), fused_adam, steps=6)
    assert len(device.graphs) == 1


@pytest.mark.usefixtures("graphs")
@pytest.mark.parametrize(
    "encoder",
    [
        lambda: nn.Sequential(nn.Linear(5, 6), nn.Dropout(0.5), nn.BatchNorm1d(6), nn.Linear(6, 4)),
        Averaged,
        lambda: nn.Sequential(nn.Linear(5, 6).requires_grad_(False), nn.Linear(6, 4)),
    ],
    ids=["batch norm", "assigned", "frozen"],
)
def test_buffers_are_written_in_place(encoder: Callable[[], nn.Module]) -> None:
    pair = small_vae(encoder=encoder())
    device = assert_graphed_is_not(pair, batches(pair, (6,)), fused_adam)
    assert len(device.graphs) == 1


@pytest.mark.usefixtures("graphs")
def test_draws_differ_between_replays() -> None:
    pair, x = small_vae(), binary(6, 5)
    device = StandIn(torch.device("cpu"))
    losses, *_ = taken(pair, [(x,)], partial(torch.optim.SGD, lr=0.0), device)
    assert device.replays >= 8
    assert len(set(losses)) == len(losses)


@pytest.mark.usefixtures("graphs")
def test_rows_are_gathered_in_the_graph() -> None:
    pair, x = small_vae(), binary(40, 5)
    device, parts = StandIn(torch.device("cpu")), torch.randperm(40).split(6)
    theirs = taken(pair, [(x[part],) for part in parts], fused_adam, steps=21)
    cuda_graphs.DEVICES["cpu"] = lambda _: device
    optimizer = fused_adam(pair.parameters())
    step, data = captured_step(pair, Trace_ELBO(), optimizer), (x,)
    assert isinstance(step, GraphedStep)
    torch.manual_seed(0)
    losses = [float(step(Rows(data, parts[i % 7]))) for i in range(21)]
    assert losses == theirs[0]
    assert all(torch.equal(value, theirs[1][name]) for name, value in pair.state_dict().items())
    assert len(device.graphs) == 1
    # The last part, of four, came three times: recorded, launched and launched.
    assert device.replays == 18 - WARM_UPS - 1 + max(0, 3 - WARM_UPS - 1)


# What changes between steps


@pytest.mark.usefixtures("graphs")
@pytest.mark.parametrize(("make", "count"), [(fused_adam, 1), (sgd, 3)])
def test_learning_rates_may_change(make: Any, count: int) -> None:
    # In numbers that single precision holds. Plain SGD's are part of a graph, which is made anew.
    def halved(i: int, pair: pv.Pair, optimizer: torch.optim.Optimizer) -> None:
        if i in (6, 12):
            optimizer.param_groups[0]["lr"] /= 2
        assert isinstance(optimizer.param_groups[0]["lr"], float)
        assert optimizer.param_groups[0].get("capturable", False) is False

    pair = small_vae()
    device = assert_graphed_is_not(pair, batches(pair, (6,)), make, steps=18, between=halved)
    assert len(device.graphs) == count


@pytest.mark.usefixtures("graphs")
def test_a_schedule_of_torchs_needs_one_graph() -> None:
    pair = small_vae()

    def make(parameters: Any) -> torch.optim.Optimizer:
        optimizer = fused_adam(parameters)
        optimizer.schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)  # type: ignore[attr-defined]
        return optimizer

    def move(i: int, pair: pv.Pair, optimizer: Any) -> None:
        if i:
            optimizer.schedule.step()

    device = assert_graphed_is_not(pair, batches(pair, (6,)), make, between=move)
    assert len(device.graphs) == 1


@pytest.mark.usefixtures("graphs")
def test_tensors_that_were_replaced_are_seen() -> None:
    def replace(i: int, pair: pv.Pair, optimizer: torch.optim.Optimizer) -> None:
        first = next(pair.parameters())
        if i == 5:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        elif i == 10:
            first.data = first.data.clone()
        elif i == 15:
            optimizer.state.clear()

    pair = small_vae()
    device = assert_graphed_is_not(pair, batches(pair, (6,)), fused_adam, steps=20, between=replace)
    assert len(device.graphs) == 4


@pytest.mark.usefixtures("graphs")
def test_flags_and_attributes_have_graphs_of_their_own() -> None:
    def change(i: int, pair: Any, optimizer: torch.optim.Optimizer) -> None:
        pair.q_z.network.temperature = 1.0 + (i // 4) % 2
        pair.p_x.requires_grad_(i // 4 != 3)

    pair = small_vae(encoder=Tempered())
    device = assert_graphed_is_not(pair, batches(pair, (6,)), fused_adam, steps=24, between=change)
    assert len(device.graphs) == 3


@pytest.mark.usefixtures("graphs")
def test_gradients_that_others_left_do_not_enter() -> None:
    def leave(i: int, pair: pv.Pair, optimizer: torch.optim.Optimizer) -> None:
        for parameter in pair.parameters():
            parameter.grad = torch.ones_like(parameter) if i == 9 else None

    pair = small_vae()
    assert_graphed_is_not(pair, batches(pair, (6,)), fused_adam, between=leave)


# Losses that are not finite


@pytest.mark.usefixtures("graphs")
@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_a_loss_that_is_not_finite_is_returned_and_moves_by_momentum_alone(clip_norm: float | None) -> None:
    networks: Any = {"encoder": nn.Linear(4, 4), "decoder": nn.Linear(2, 4)}
    pair, x = VAE((4,), pv.StandardNormal(2), **networks), torch.randn(8, 4)
    bad = x.clone()
    bad[3] = 1e200
    data = [(x,)] * 6 + [(bad,), (x,)]
    device, states = StandIn(torch.device("cpu")), []

    def note(i: int, pair: pv.Pair, optimizer: torch.optim.Optimizer) -> None:
        states.append(copy.deepcopy(pair.state_dict()))

    make = partial(torch.optim.SGD, lr=RATE)
    losses, *_ = taken(pair, data, make, device, steps=8, between=note, clip_norm=clip_norm)
    assert [math.isnan(loss) for loss in losses] == [False] * 6 + [True, False]
    assert device.replays >= 5
    # Without momentum, by nothing.
    assert all(torch.equal(value, states[7][name]) for name, value in states[6].items())
    plain = taken(pair, data, fused_adam, steps=8, clip_norm=clip_norm)
    ours = taken(pair, data, fused_adam, StandIn(torch.device("cpu")), steps=8, clip_norm=clip_norm)
    assert ours[0][:6] == plain[0][:6]
    assert all(torch.equal(value, plain[1][name]) for name, value in ours[1].items())


# What no graph can hold


class Own(torch.optim.SGD):
    """An optimiser of a user's own."""


class Growing(torch.optim.SGD):
    """Put a new tensor in the place of an old one at each step."""

    def step(self, closure: Any = None) -> None:
        super().step(closure)
        for held in self.state.values():
            held["momentum_buffer"] = held["momentum_buffer"].clone()


def hooked(parameters: Any) -> torch.optim.Optimizer:
    optimizer = fused_adam(parameters)
    optimizer.register_step_post_hook(lambda *_: None)
    return optimizer


def replaced(parameters: Any) -> torch.optim.Optimizer:
    optimizer: Any = fused_adam(parameters)
    step = optimizer.step
    optimizer.step = MethodType(lambda self: step(), optimizer)
    # A scheduler's wrapper does not hide it.
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    return optimizer


@pytest.mark.usefixtures("graphs")
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (
            partial(torch.optim.Adam, lr=RATE),
            "Adam counts its steps on the CPU: make it with fused=True or capturable=",
        ),
        (partial(Own, lr=RATE), "Own is not known to be capturable"),
        (partial(torch.optim.Adagrad, lr=RATE), "Adagrad is not known to be capturable"),
        (hooked, "Adam has hooks around its step"),
        (replaced, "Adam has a step that was put in the place of its own"),
    ],
)
def test_optimisers_that_are_not_capturable_are_told_once(make: Any, reason: str) -> None:
    pair, device = small_vae(), StandIn(torch.device("cpu"))
    data = batches(pair)
    ours = taken(pair, data, make, device)
    assert_same(ours, taken(pair, data, make))
    assert not device.graphs
    (line,) = ours[2]
    assert line.startswith(f"steps are launched kernel by kernel, not as one CUDA graph: {reason}")


class Watching(torch.optim.Adam):
    """Note whether torch would let the step into a graph."""

    seen: ClassVar[list[bool]] = []

    def step(self, closure: Any = None) -> None:
        self.seen.append(self.param_groups[0]["capturable"])
        super().step(closure)


@pytest.mark.usefixtures("graphs")
def test_a_fused_optimiser_is_capturable_while_it_is_captured_and_not_afterwards() -> None:
    pair, optimizers = small_vae(), list[Any]()
    Watching.seen.clear()

    def make(parameters: Any) -> torch.optim.Optimizer:
        optimizers.append(Watching(parameters, lr=RATE, fused=True))
        return optimizers[-1]

    device = StandIn(torch.device("cpu"))
    taken(pair, batches(pair, (6,)), make, device)
    assert device.replays > 0
    # Those of the warm-ups, and the one taken down.
    assert Watching.seen[-WARM_UPS - 1 :] == [True] * (WARM_UPS + 1)
    assert not optimizers[0].param_groups[0]["capturable"]


@pytest.mark.usefixtures("graphs")
def test_a_hook_that_comes_later_ends_the_graph() -> None:
    pair, device, calls = small_vae(), StandIn(torch.device("cpu")), list[int]()

    def hook(i: int, pair: pv.Pair, optimizer: torch.optim.Optimizer) -> None:
        if i == 8:
            optimizer.register_step_post_hook(lambda *_: calls.append(i))

    taken(pair, batches(pair, (6,)), fused_adam, device, steps=12, between=hook)
    assert device.replays > 0
    assert len(calls) == 4


@pytest.mark.usefixtures("graphs")
def test_batches_with_gaps_between_their_rows_are_graphed_too() -> None:
    pair = small_vae()
    data = [tuple(torch.stack([tensor, tensor], -1)[..., 0] for tensor in batch) for batch in batches(pair, (6,))]
    assert not data[0][0].is_contiguous()
    assert assert_graphed_is_not(pair, data, fused_adam).replays > 0


@pytest.mark.usefixtures("graphs")
def test_tensors_that_are_replaced_at_each_step_are_no_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.optim, "SGD", Growing)
    pair, device = small_vae(), StandIn(torch.device("cpu"))
    make = partial(Growing, lr=RATE, momentum=0.5)
    ours = taken(pair, batches(pair, (6,)), make, device)
    assert_same(ours, taken(pair, batches(pair, (6,)), make))
    assert (len(device.graphs), device.replays) == (1, 0)
    (line,) = ours[2]
    assert "Growing puts new values in the place of old ones at each step" in line


class Asking(torch.optim.SGD):
    """Ask for a number of a gradient."""

    def step(self, closure: Any = None) -> None:
        for held in self.param_groups:
            if float(held["params"][-1].grad.sum()) > -math.inf:
                super().step(closure)


@pytest.mark.usefixtures("graphs")
def test_a_step_that_waits_for_the_device_is_taken_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.optim, "SGD", Asking)
    pair, device = small_vae(), StandIn(torch.device("cpu"))
    make = partial(Asking, lr=RATE, momentum=0.5)
    ours = taken(pair, batches(pair, (6,)), make, device)
    assert_same(ours, taken(pair, batches(pair, (6,)), make))
    assert device.replays == 0
    (line,) = ours[2]
    assert "operation not permitted when stream is capturing" in line


@pytest.mark.usefixtures("graphs")
def test_numbers_that_keep_changing_end_the_making_of_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyro_vae.capture.cuda_graph.MAX_GRAPHS", 2)

    def move(i: int, pair: pv.Pair, optimizer: torch.optim.Optimizer) -> None:
        optimizer.param_groups[0]["momentum"] = 0.5 / (1 + i // (WARM_UPS + 2))

    pair, device = small_vae(), StandIn(torch.device("cpu"))
    ours = taken(pair, batches(pair, (6,)), sgd, device, steps=16, between=move)
    assert_same(ours, taken(pair, batches(pair, (6,)), sgd, steps=16, between=move))
    assert len(device.graphs) == 2
    (line,) = ours[2]
    assert "2 graphs were made, since" in line
