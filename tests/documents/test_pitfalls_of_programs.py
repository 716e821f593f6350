"""The ways in which code for latent-variable models goes wrong, continued: what Pyro and torch do around a program.

As in ``test_pitfalls.py``: a wrong version, an exact case against it, and ours.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pyro
import pytest
import torch
from pyro.infer import SVI, JitTrace_ELBO, Trace_ELBO
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import pyro_vae as pv
from pyro_vae.capture.tracer import traced
from pyro_vae.models import VAE
from pyro_vae.training.captured_step import captured_step
from pyro_vae.training.step import eager_step

ROUNDING = {"rtol": 1e-9, "atol": 1e-9}


def small() -> VAE:
    torch.manual_seed(0)
    return VAE((4,), pv.StandardNormal(2), encoder=nn.Linear(4, 4), decoder=nn.Linear(2, 4))


def moved(pair: VAE, start: VAE) -> Tensor:
    steps = zip(pair.parameters(), start.parameters(), strict=True)
    return torch.cat([(new - old).detach().flatten() for new, old in steps])


class CountReads(TorchFunctionMode):
    """Count how often Python asks a tensor for its value, each time a wait for the device and a break in a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.reads += getattr(func, "__name__", "") in ("item", "__bool__", "__float__", "__int__")
        return func(*args, **(kwargs or {}))


def reads(step: Callable[[Tensor], Any], x: Tensor) -> int:
    with CountReads() as counter:
        step(x)
    return counter.reads


def test_06_eager_svi_reads_tensors_all_the_time() -> None:
    image = torch.rand(8, 1, 4, 4)
    two_stage = pv.models.SRVAE((1, 4, 4), scale=2, prior=pv.StandardNormal(2))
    counts = []
    for pair, x in ((small(), torch.randn(8, 4)), (two_stage, image)):
        svi = SVI(pair.model, pair.guide, pyro.optim.SGD({"lr": 1e-3}), Trace_ELBO())
        validated = reads(svi.step, x)
        with pyro.validation_enabled(False):
            plain = reads(svi.step, x)
        captured = captured_step(pair, Trace_ELBO(), torch.optim.SGD(pair.parameters(), lr=1e-3))
        captured(x)
        counts.append((validated, plain, reads(captured, x)))
    (validated, plain, ours), (validated_more, plain_more, ours_still) = counts
    # Wrong, as to time: 3 sites are read here, 7 there, in model and guide, and many times over by validation.
    assert plain >= 3
    assert plain_more >= 7
    assert validated > plain + 10
    assert validated_more > validated + 10
    # Ours, whatever the program: whether the loss is finite, and the loss.
    assert ours == ours_still <= 2


def test_06_one_optimiser_per_tensor_cannot_clip_the_global_norm() -> None:
    start, x = small(), 10 * torch.randn(8, 4)
    pair = copy.deepcopy(start)
    optimizer = pyro.optim.PyroOptim(torch.optim.SGD, {"lr": 1.0}, {"clip_norm": 1.0})
    SVI(pair.model, pair.guide, optimizer, Trace_ELBO()).step(x)
    # Wrong: each of the P tensors is clipped by itself, and the step is √P times as long as was asked for.
    count = len(list(pair.parameters()))
    assert len(optimizer.optim_objs) == count > 1
    assert float(moved(pair, start).norm()) == pytest.approx(count**0.5, rel=1e-5)
    pair = copy.deepcopy(start)
    eager_step(pair, Trace_ELBO(), torch.optim.SGD(pair.parameters(), lr=1.0), clip_norm=1.0)(x)
    # Torch adds 1e-6 to the norm that it divides by.
    assert float(moved(pair, start).norm()) == pytest.approx(1, rel=1e-5)


def test_07_a_pyro_program_is_no_graph_for_torch_compile_and_is_one_for_the_recording() -> None:
    pair, x = small(), torch.randn(8, 4)
    elbo = Trace_ELBO()

    def loss(x: Tensor) -> Tensor:
        return elbo.differentiable_loss(pair.model, pair.guide, x)

    # Wrong: there is no whole graph to compile, and torch falls back to Python between the pieces.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(torch._dynamo.exc.TorchDynamoException), pyro.validation_enabled(False):
            torch.compile(loss, backend="eager", fullgraph=True)(x)
        torch._dynamo.reset()
        # Pyro's own way out stands on torch.jit.trace, and looks parameters up in the global store.
        with pytest.raises(KeyError, match=r"VAE@\w+\.\w+"):
            JitTrace_ELBO().loss_and_grads(pair.model, pair.guide, x)
    # Ours: one graph of tensor operations, which has the program's value at the program's draws.
    ours = captured_step(pair, elbo, torch.optim.SGD(pair.parameters(), lr=0.0))
    ours(x)
    torch.manual_seed(1)
    expected = float(loss(x).detach()) / 8
    torch.manual_seed(1)
    assert ours(x) == pytest.approx(expected, rel=1e-12)


def test_22_recordings_bake_in_numbers_and_sizes() -> None:
    beta, scale = 1.0, torch.tensor(2.0)

    def program(x: Tensor) -> Tensor:
        return beta * scale * x.sum() / len(x)

    graph = traced(program, [torch.ones(4)])
    assert float(graph(torch.ones(4))) == 2
    beta = 0.5
    # Wrong, in silence: β and the size of the batch are those of the recording, whatever they are by now.
    assert float(graph(torch.ones(4))) == 2
    assert float(program(torch.ones(4))) == 1
    assert float(graph(torch.ones(2))) == 1
    # Ours: β is an input and every size has a recording of its own, so that the steps are the eager ones.
    pairs = small(), small()
    steps = [
        make(pair, Trace_ELBO(), torch.optim.SGD(pair.parameters(), lr=0.01))
        for pair, make in zip(pairs, (eager_step, captured_step), strict=True)
    ]
    for step in steps:
        torch.manual_seed(2)
        for size, value in ((6, 1.0), (6, 0.5), (2, 0.5), (6, 0.0)):
            step(torch.ones(size, 4), beta=value)
    torch.testing.assert_close(moved(pairs[1], pairs[0]), torch.zeros_like(moved(pairs[1], pairs[0])), **ROUNDING)
