"""What cannot be recorded names the line to blame; fit falls back; a compiled recording agrees up to rounding."""

from __future__ import annotations

import copy
import inspect
import random
import re
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceGraph_ELBO
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.capture import onednn as products
from pyro_vae.capture.tracer import CaptureError
from pyro_vae.models import VAE, LinearGaussianVAE
from pyro_vae.objectives.bounds import elbo
from pyro_vae.training.captured_step import captured_step
from pyro_vae.training.step import NonFiniteLossError, eager_step
from tests.support.capture_cases import (
    CASES,
    assert_same,
    batches,
    binary,
    run,
    small_vae,
)

# What is refused, and how


def linear(change: Callable[[Tensor], Tensor]) -> VAE:
    class Changed(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return change(super().forward(x))

    return small_vae(encoder=Changed(5, 4))


def branching(h: Tensor) -> Tensor:
    return -h if h.mean() > 100 else h


ZERO = torch.zeros(())


def outside(h: Tensor) -> Tensor:
    return h + ZERO


REFUSED: dict[Callable[[Tensor], Tensor], str] = {
    branching: "asks for a tensor's value \\(__bool__\\).*torch.where",
    lambda h: h * float(h.detach().abs().max() > -1): "asks for a tensor's value \\(__float__\\)",
    lambda h: h[: int((h > -1e9).all() * 6)]: "asks for a tensor's value \\(__int__\\)",
    lambda h: h * len(h.abs().nonzero() >= 0) / len(h.abs().nonzero()): "raises",
    lambda h: h + 0 * h.detach().numpy().sum(): "raises",
    outside: "raises .*neither a parameter, a buffer nor part of the batch: register it as a buffer",
}


@pytest.mark.parametrize("change", REFUSED, ids=range(len(REFUSED)))
def test_a_program_that_is_not_recorded_names_its_line(change: Any) -> None:
    pair = linear(change)
    line = inspect.getsourcelines(change)[1] + (change.__name__ != "<lambda>")
    step = captured_step(pair, Trace_ELBO(), torch.optim.SGD(pair.parameters(), lr=0.1))
    with pytest.raises(
        CaptureError,
        match=rf"Trace_ELBO of VAE is not recorded: .*test_captured_step_refusals.py:{line} {REFUSED[change]}",
    ):
        step(binary(6, 5))


@pytest.mark.parametrize("draw", [random.random, np.random.rand])
def test_foreign_random_numbers_are_refused(draw: Callable[[], float]) -> None:
    pair = linear(lambda h: h * draw())
    step = captured_step(pair, Trace_ELBO(), torch.optim.SGD(pair.parameters(), lr=0.1))
    with pytest.raises(CaptureError, match="draws from random or numpy"):
        step(binary(6, 5))


def test_a_program_that_sets_attributes_is_refused() -> None:
    class Counting(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            self.calls = getattr(self, "calls", 0) + 1
            return super().forward(x)

    pair = small_vae(encoder=Counting(5, 4))
    step = captured_step(pair, Trace_ELBO(), torch.optim.SGD(pair.parameters(), lr=0.1))
    step(binary(6, 5))
    assert pair.q_z.network.calls == 1
    with pytest.raises(CaptureError, match=r"sets 'calls' of VAE\.q_z\.network.*make it a buffer"):
        step(binary(6, 5))
    assert pair.q_z.network.calls == 1


CALLS = 0


def test_objectives_that_count_their_calls_are_refused() -> None:
    calls = 0

    def by_closure(terms: pv.LogTerms) -> Tensor:
        nonlocal calls
        calls += 1
        return elbo(terms) / calls

    def by_global(terms: pv.LogTerms) -> Tensor:
        global CALLS
        CALLS += 1
        return elbo(terms) / CALLS

    for objective, name in ((by_closure, "a variable outside by_closure"), (by_global, "'CALLS' of module")):
        pair = small_vae()
        step = captured_step(pair, objective, torch.optim.SGD(pair.parameters(), lr=1e-3))
        step(binary(6, 5))
        with pytest.raises(CaptureError, match=name):
            step(binary(6, 5))
    assert calls == CALLS == 1


def test_a_buffer_made_on_the_way_is_refused() -> None:
    class Growing(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            self.register_buffer("last", x, persistent=False)
            return super().forward(x)

    pair = small_vae(encoder=Growing(5, 4))
    step = captured_step(pair, elbo, torch.optim.SGD(pair.parameters(), lr=1e-3))
    with pytest.raises(CaptureError, match="adds a parameter or a buffer"):
        step(binary(6, 5))
    assert not list(pair.buffers()) or "last" not in dict(pair.named_buffers())


def test_too_many_kinds_of_batch_are_refused() -> None:
    pair = small_vae()
    step = captured_step(pair, elbo, torch.optim.SGD(pair.parameters(), lr=1e-3))
    for size in range(1, 9):
        step(binary(size, 5))
    with pytest.raises(CaptureError, match="the batches have 9 shapes"):
        step(binary(9, 5))


def test_trace_graph_of_a_discrete_guide_is_eager() -> None:
    pair, loss = CASES["linear-mixture"](), TraceGraph_ELBO()
    data = batches(pair)
    with pytest.warns(UserWarning, match="eager steps, which are slower: TraceGraph_ELBO .* eager by design") as seen:
        ours = run(captured_step, pair, loss, data, strict=False)
    assert len(seen) == 1
    assert_same(ours, run(eager_step, pair, loss, data))


def test_a_mistake_is_reported_in_its_own_words() -> None:
    def mistaken(h: Tensor) -> Tensor:
        raise ValueError("a mistake")

    pair = linear(mistaken)
    step = captured_step(pair, Trace_ELBO(), torch.optim.SGD(pair.parameters(), lr=1e-3), strict=False)
    # Pyro adds the shapes of the sites to it; a warning before it would be an error of its own.
    with pytest.raises(ValueError, match=r"^a mistake\s"):
        step(binary(6, 5))


def test_a_loss_that_is_not_finite_moves_nothing() -> None:
    pair = LinearGaussianVAE(4, 2)
    step = captured_step(pair, Trace_ELBO(), torch.optim.SGD(pair.parameters(), lr=1e-3))
    step(torch.randn(3, 4))
    before = copy.deepcopy(pair.state_dict())
    with pytest.raises(NonFiniteLossError, match="the loss is nan"):
        step(torch.full((3, 4), torch.nan))
    assert all(torch.equal(before[name], value) for name, value in pair.state_dict().items())
    assert all(p.grad is None for p in pair.parameters()) or step(torch.randn(3, 4))


def test_shapes_that_do_not_fit_are_refused_as_ever() -> None:
    pair = small_vae()
    step = captured_step(pair, Trace_ELBO(), torch.optim.SGD(pair.parameters(), lr=1e-3), strict=False)
    step(binary(6, 5))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        step(binary(6, 4))


# fit


def fitted(pair: pv.Pair, **kwargs: Any) -> tuple[pv.Run, dict[str, Tensor]]:
    pair = copy.deepcopy(pair)
    options: Any = {"epochs": 12, "batch_size": 6, "progress": False, "device": "cpu"} | kwargs
    return pv.fit(pair, binary(63, 5), **options), dict(pair.state_dict())


@pytest.mark.parametrize("capture", ["auto", True])
def test_fit_is_the_same_captured(capture: Any) -> None:
    # Ten batches of six and one of three; β rises for half of the run. "auto" begins its recordings midway.
    pair = small_vae()
    ours, state = fitted(pair, capture=capture, warmup=6, clip_norm=5.0)
    theirs, expected = fitted(pair, capture=False, warmup=6, clip_norm=5.0)
    assert [m["loss"] for m in ours.metrics] == pytest.approx([m["loss"] for m in theirs.metrics], rel=1e-10)
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value, rtol=1e-10, atol=1e-10)


def test_fit_falls_back_with_one_warning() -> None:
    pair = linear(branching)
    line = inspect.getsourcelines(branching)[1] + 1
    with pytest.warns(
        UserWarning, match=rf"eager steps, which are slower: .*test_captured_step_refusals.py:{line} asks"
    ) as seen:
        _, state = fitted(pair)
    assert len(seen) == 1
    _, expected = fitted(pair, capture=False)
    assert all(torch.equal(state[name], value) for name, value in expected.items())
    with pytest.raises(ValueError, match=rf"test_captured_step_refusals.py:{line} asks for a tensor's value"):
        fitted(pair, capture=True)


def test_fit_refuses_contradictions() -> None:
    with pytest.raises(ValueError, match="capture is 'yes'; it must be 'auto', True or False"):
        fitted(small_vae(), capture="yes")
    with pytest.raises(ValueError, match="compiled asks for the recording"):
        fitted(small_vae(), capture=False, compiled=True)


# Compiled


@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("name", ["vae-mixture", "srvae"])
def test_compiled_is_eager_up_to_rounding(name: str) -> None:
    pair = CASES[name]()
    data = batches(pair)
    theirs, lines = run(eager_step, pair, Trace_ELBO(), data), list[str]()
    assert_same(run(captured_step, pair, Trace_ELBO(), data, compiled=True, tell=lines.append), theirs)
    assert [re.sub(r"\d+", "n", line).removesuffix(", from the cache on disk") for line in lines] == [
        "compiling a recorded step of n operations",
        "compiled in n.n s",
    ]


@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="needs a C++ compiler")
def test_compiled_with_products_through_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_default_dtype(torch.float32)
    monkeypatch.setattr(products, "LEAST_GAIN", -1e9)
    pair = small_vae()
    theirs = run(eager_step, pair, Trace_ELBO(), batches(pair))
    assert_same(run(captured_step, pair, Trace_ELBO(), batches(pair), compiled=True), theirs, rtol=1e-5)


def test_without_a_compiler_it_replays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> str:
        raise RuntimeError("no C++ compiler was found")

    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", missing)
    pair = small_vae()
    with pytest.warns(UserWarning, match="replayed uncompiled: no C\\+\\+ compiler was found") as seen:
        ours = run(captured_step, pair, Trace_ELBO(), batches(pair), betas=(0.5, 1.0), compiled=True)
    assert len(seen) == 1
    assert_same(ours, run(eager_step, pair, Trace_ELBO(), batches(pair), betas=(0.5, 1.0)))


def broken(*_: Any) -> Any:
    raise RuntimeError("could not create a primitive descriptor\nand more")


FAULTS: dict[str, tuple[str, Any, str]] = {
    "products": (
        "pyro_vae.capture.onednn.through_onednn",
        lambda _: broken,
        "matmuls are left to torch, oneDNN refused them: could not create a primitive descriptor",
    ),
    "compiler": (
        "torch._inductor.standalone_compile",
        lambda *_, **__: broken(),
        "replayed uncompiled: could not create a primitive descriptor",
    ),
    "compiled program": (
        "torch._inductor.standalone_compile",
        lambda *_, **__: broken,
        "replayed uncompiled: could not create a primitive descriptor",
    ),
    "recording": (
        "pyro_vae.training.captured_step.record",
        lambda *_, **__: broken(),
        "trains by eager steps, .*: Trace_ELBO.* is not recorded: could not create a primitive descriptor",
    ),
}


@pytest.mark.parametrize("stage", FAULTS)
def test_a_stage_that_fails_leaves_the_step_to_the_one_below(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = small_vae()
    theirs = run(eager_step, pair, Trace_ELBO(), batches(pair))
    place, fault, words = FAULTS[stage]
    monkeypatch.setattr(place, fault)
    with pytest.warns(UserWarning, match=words) as seen:
        ours = run(captured_step, pair, Trace_ELBO(), batches(pair), compiled=True, strict=False)
    assert len(seen) == 1
    # Where another stage still compiles, it rounds otherwise.
    assert_same(ours, theirs, rtol=1e-5)


class Weighted(nn.Linear):
    weight_of_all = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.weight_of_all * super().forward(x)


class Counting(nn.Linear):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        type(self).calls += 1
        return super().forward(x)


def test_a_classs_default_and_what_hides_it_are_read_at_each_step() -> None:
    losses = []
    for make in (eager_step, captured_step):
        torch.manual_seed(0)
        pair = small_vae(decoder=Weighted(2, 10))
        step = make(pair, elbo, torch.optim.SGD(pair.parameters(), lr=0.0))
        decoder: Any = pair.p_x.network
        x, found = binary(6, 5), []
        for i in range(9):
            torch.manual_seed(1)
            if i in (3, 5):
                decoder.weight_of_all = float(i)
            elif i == 7:
                del decoder.weight_of_all
            found.append(float(step(x)))
        losses.append(found)
    assert losses[1] == pytest.approx(losses[0], rel=1e-12)
    assert len({round(loss, 6) for loss in losses[0]}) == 3


def test_a_program_that_sets_its_classs_attributes_is_refused() -> None:
    pair = small_vae(decoder=Counting(2, 10))
    step = captured_step(pair, elbo, torch.optim.SGD(pair.parameters(), lr=0.1))
    # The first time it may be a layer that initialises itself.
    step(binary(6, 5))
    with pytest.raises(CaptureError, match="'calls' of class Counting"):
        step(binary(6, 5))
