"""Which recordings no CUDA graph can hold; fit with graphs; and the graphs of a real device."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import pyro_vae as pv
from pyro_vae.capture.cuda_graph import GraphedStep, waits_for_the_device
from pyro_vae.models import LinearGaussianVAE
from pyro_vae.runtime.batches import Batches
from pyro_vae.training.captured_step import captured_step
from pyro_vae.training.step import NonFiniteLossError
from tests.support.capture_cases import CASES, batches, binary, small_vae
from tests.support.taken_down import RATE, StandIn, assert_same, fused_adam, sgd, taken

# What of a recording no graph can hold


def found(program: Callable[..., Any], *inputs: Tensor, device: str = "cpu") -> str | None:
    return waits_for_the_device(make_fx(program)(*inputs), torch.device(device))


def test_recordings_that_wait_for_the_device_name_the_operation() -> None:
    x, mask, i = torch.randn(6), torch.tensor([True, False] * 3), torch.tensor([1, 0])
    assert found(lambda x, mask: x[mask].sum(), x, mask) == (
        "the program asks for values that the device has yet to compute (aten.index.Tensor)"
    )
    assert "aten.nonzero" in (found(lambda x: x.nonzero(), x) or "")
    assert "index_put" in (found(lambda x, mask, y: x.clone().index_put((mask,), y), x, mask, x[mask]) or "")
    assert "_linalg_check_errors" in (found(torch.linalg.cholesky, torch.eye(2)) or "")
    assert "repeat_interleave" in (found(lambda x, i: x.repeat_interleave(i, 0), x[:2], i) or "")
    # Rows by number, one number in the places of a mask, and where.
    assert found(lambda x, i: x[i] + x.index_select(0, i), x, i) is None
    assert found(lambda x, mask: x.masked_fill(mask, 0.0) + torch.where(mask, x, 0.0), x, mask) is None

    def fills(x: Tensor, mask: Tensor) -> Tensor:
        y = x.clone()
        y[mask] = 0.0
        return y

    assert found(fills, x, mask) is None


def test_recordings_that_compute_elsewhere_name_the_operation() -> None:
    # The meta device stands for one that is not the CPU.
    x = torch.randn(6, device="meta")
    assert found(lambda x: x * 2 + torch.ones((), device="cpu"), x, device="meta") is None
    assert found(lambda x: x + torch.rand((), device="cpu"), x, device="meta") == (
        "the program computes on the CPU (aten.rand.default): make the tensor on the batch's device"
    )
    assert "computes on the CPU (aten.mul" in (found(lambda x, y: x * y, x, torch.ones(()), device="meta") or "")
    assert "computes on the CPU (aten.mul" in (found(lambda x, y: x + 2 * y, x, torch.ones(()), device="meta") or "")
    assert "copies between devices (aten._to_copy" in (
        found(lambda x: x + torch.ones(6, device="cpu").to("meta"), x, device="meta") or ""
    )


@pytest.mark.usefixtures("graphs")
def test_a_program_that_waits_for_the_device_is_launched_kernel_by_kernel() -> None:
    pair, device = CASES["vgae"](), StandIn(torch.device("cpu"))
    data = batches(pair, (6,))
    ours = taken(pair, data, fused_adam, device, steps=5)
    assert_same(ours, taken(pair, data, fused_adam, steps=5))
    assert not device.graphs
    (line,) = ours[2]
    assert "the program asks for values that the device has yet to compute" in line


# fit


def fitted(**options: Any) -> tuple[list[Any], dict[str, Tensor]]:
    torch.manual_seed(0)
    pair = small_vae()
    settings: Any = {"epochs": 4, "batch_size": 6, "progress": False, "device": "cpu", "capture": True}
    run = pv.fit(pair, binary(63, 5), **settings | options)
    return [{n: v for n, v in record.items() if n != "seconds"} for record in run.metrics], dict(pair.state_dict())


@pytest.mark.parametrize("streamed", [False, True])
def test_fit_is_the_same(graphs: dict[str, Any], streamed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # Ten batches of six and one of three, β and learning rate on the move.
    halving = partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
    options: Any = {"warmup": 2, "clip_norm": 5.0, "lr": RATE, "scheduler": halving}
    metrics, expected = fitted(**options)
    device = StandIn(torch.device("cpu"))
    graphs["cpu"] = lambda _: device
    monkeypatch.setattr("pyro_vae.training.fit.Batches", partial(Batches, streamed=streamed))
    ours, state = fitted(**options)
    assert ours == metrics
    assert all(torch.equal(value, expected[name]) for name, value in state.items())
    # Batches of six with and without β; those of three come too rarely.
    assert len(device.graphs) == 2
    gathers = [call for call in device.graphs[0].calls if call[0] is torch.ops.aten.index_select.default]
    assert bool(gathers) is not streamed


def test_fit_resumes_the_same(graphs: dict[str, Any], tmp_path: Path) -> None:
    device = StandIn(torch.device("cpu"))
    graphs["cpu"] = lambda _: device
    _, expected = fitted(run_dir=tmp_path / "whole", lr=RATE)
    fitted(run_dir=tmp_path / "broken", epochs=2, lr=RATE)
    _, state = fitted(run_dir=tmp_path / "broken", resume=True, lr=RATE)
    assert all(torch.equal(value, expected[name]) for name, value in state.items())
    # Short batches come often enough in the whole run alone.
    assert len(device.graphs) == 4


def test_fit_notices_a_loss_that_is_not_finite(graphs: dict[str, Any]) -> None:
    graphs["cpu"] = StandIn
    x = torch.randn(64, 4)
    x[5] = 1e200
    pair = LinearGaussianVAE(4, 2)
    with pytest.raises(NonFiniteLossError, match=r"not finite in epoch 1, at .*x"):
        pv.fit(pair, x, epochs=1, batch_size=4, capture=True, progress=False, device="cpu")
    assert all(parameter.isfinite().all() for parameter in pair.parameters())


# On a device

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("make", [fused_adam, partial(torch.optim.Adam, lr=RATE, capturable=True), sgd])
@pytest.mark.parametrize("name", ["vae-mixture", "srvae", "ladder-vae"])
def test_cuda_graphs_take_the_same_steps(name: str, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = CASES[name]().to("cuda")
    data = [tuple(tensor.to("cuda") for tensor in batch) for batch in batches(pair, (6, 2))]

    def trained() -> tuple[list[float], dict[str, Tensor], Any]:
        own, lines = copy.deepcopy(pair), list[str]()
        optimizer = make(own.parameters())
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 6, 0.5)
        step = captured_step(own, Trace_ELBO(), optimizer, clip_norm=5.0, tell=lines.append)
        torch.cuda.manual_seed(0)
        losses = []
        for i in range(40):
            losses.append(step(*data[i % 2], beta=1.0 if i < 20 else 0.5))
            schedule.step()
        assert not lines
        assert all(p.grad is None for p in own.parameters())
        return torch.stack([torch.as_tensor(loss) for loss in losses]).tolist(), own.state_dict(), step

    losses, state, step = trained()
    # A new learning rate of SGD's makes a new graph, and the last one comes four steps before the end.
    assert step.made
    monkeypatch.setattr("pyro_vae.capture.cuda_graph.DEVICES", {})
    expected, theirs, _ = trained()
    # Sums over a batch may be added up in another order; 40 steps of float64 keep that far below this.
    assert losses == pytest.approx(expected, rel=1e-7)
    for key, value in theirs.items():
        torch.testing.assert_close(state[key], value, rtol=1e-7, atol=1e-7)


OTHERS = ["AdamW", "NAdam", "RAdam", "Adamax", "RMSprop", "Adadelta", "Rprop", "ASGD"]


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("name", OTHERS)
def test_every_capturable_optimiser_of_torchs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def trained() -> tuple[dict[str, Tensor], list[str]]:
        torch.manual_seed(0)
        pair, lines = small_vae().to("cuda"), list[str]()
        optimizer = getattr(torch.optim, name)(pair.parameters(), lr=RATE, capturable=True)
        step = captured_step(pair, Trace_ELBO(), optimizer, tell=lines.append)
        x = binary(6, 5).to("cuda")
        for i in range(20):
            optimizer.param_groups[0]["lr"] = RATE / (1 + i // 10)
            step(x)
        return pair.state_dict(), lines

    state, lines = trained()
    assert not lines
    monkeypatch.setattr("pyro_vae.capture.cuda_graph.DEVICES", {})
    expected, _ = trained()
    for key, value in expected.items():
        torch.testing.assert_close(state[key], value, rtol=1e-7, atol=1e-7)


@pytest.mark.cuda
@needs_cuda
def test_draws_differ_between_replays_on_cuda() -> None:
    pair, x = small_vae().to("cuda"), binary(6, 5).to("cuda")
    step = captured_step(pair, Trace_ELBO(), torch.optim.Adam(pair.parameters(), lr=0.0, fused=True))
    losses = [float(step(x)) for _ in range(20)]
    assert isinstance(step, GraphedStep)
    assert len(step.graphs) == 1
    assert len(set(losses)) == len(losses)


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("streamed", [False, True])
def test_fit_on_cuda_is_the_same(streamed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyro_vae.training.fit.Batches", partial(Batches, streamed=streamed))
    metrics, state = fitted(device="cuda", lr=RATE, warmup=2)
    monkeypatch.setattr("pyro_vae.capture.cuda_graph.DEVICES", {})
    expected, theirs = fitted(device="cuda", lr=RATE, warmup=2)
    assert [m["loss"] for m in metrics] == pytest.approx([m["loss"] for m in expected], rel=1e-7)
    for key, value in theirs.items():
        torch.testing.assert_close(state[key], value, rtol=1e-7, atol=1e-7)


@pytest.mark.cuda
@needs_cuda
def test_replays_hold_no_more_memory() -> None:
    pair, x = small_vae().to("cuda"), binary(6, 5).to("cuda")
    step = captured_step(pair, Trace_ELBO(), torch.optim.Adam(pair.parameters(), fused=True))

    def held(steps: int) -> int:
        for _ in range(steps):
            step(x)
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    held(10)
    assert held(1) == held(100)
