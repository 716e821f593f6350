"""Programs: facts about capture that both of its clients rely on."""

from __future__ import annotations

import importlib
from functools import reduce
from typing import Any

import pyro
import pytest
import torch
from torch import Tensor, nn

from pyro_vae.capture.internals import INTERNALS, TESTED
from pyro_vae.capture.program import CaptureError, Signature, StateChangedError, layout, record
from pyro_vae.capture.python_state import PairState, Snapshot
from pyro_vae.models import LinearGaussianVAE


def resolved(name: str) -> Any:
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            module = importlib.import_module(".".join(parts[:count]))
        except ImportError:
            continue
        return reduce(getattr, parts[count:], module)
    raise ImportError(name)


@pytest.mark.parametrize("name", INTERNALS)
def test_internals_of_torch_and_pyro_are_where_they_were(name: str) -> None:
    assert resolved(name) is not None


def test_the_installed_versions_are_tested_ones() -> None:
    for package in (torch, pyro):
        assert ".".join(package.__version__.split(".")[:2]) in TESTED[package.__name__]


def test_a_program_is_a_function_of_state_and_inputs() -> None:
    pair = LinearGaussianVAE(3, 2)
    state, x = PairState(pair), torch.randn(4, 3)
    program = record(lambda x: x @ pair.weight + pair.bias.sum(), state, [torch.zeros(4, 3)])
    assert torch.equal(program.replay(state.tensors(), [x])[0], x @ pair.weight + pair.bias.sum())
    with torch.no_grad():
        pair.weight.mul_(2)
    assert torch.equal(program.replay(state.tensors(), [x])[0], x @ pair.weight + pair.bias.sum())


class Counted(LinearGaussianVAE):
    """Hold a buffer that a program assigns anew."""

    count: Tensor

    def __init__(self) -> None:
        super().__init__(3, 2)
        self.register_buffer("count", torch.zeros(()))


def test_buffers_that_a_program_assigns_are_written_by_replays() -> None:
    pair = Counted()

    def counting(x: Tensor) -> Tensor:
        pair.count = pair.count + 1
        return x * pair.count

    state = PairState(pair)
    program = record(counting, state, [torch.ones(2)])
    assert float(pair.count) == 0
    assert len(program.replaced) == 1
    for i in (1, 2):
        assert program.replay(state.tensors(), [torch.ones(2)])[0].tolist() == [i, i]
    assert float(pair.count) == 2


def test_what_a_program_sets_is_named_and_put_back() -> None:
    pair = LinearGaussianVAE(3, 2)

    def setting(x: Tensor) -> Tensor:
        pair.calls = 1
        return x

    with pytest.raises(StateChangedError, match=r"sets 'calls' of LinearGaussianVAE.*make it a buffer of the pair"):
        record(setting, PairState(pair), [torch.ones(2)])
    assert not hasattr(pair, "calls")


def test_a_program_that_adds_a_parameter_is_refused() -> None:
    pair = LinearGaussianVAE(3, 2)

    def adding(x: Tensor) -> Tensor:
        pair.more = nn.Parameter(torch.zeros(2))
        return x

    with pytest.raises(CaptureError, match="adds a parameter or a buffer"):
        record(adding, PairState(pair), [torch.ones(2)])
    assert "more" not in dict(pair.named_parameters())


def test_a_snapshot_restores_attributes_globals_and_cells() -> None:
    pair, cell = LinearGaussianVAE(3, 2), 0

    def function() -> int:
        nonlocal cell
        cell += 1
        globals()["MADE"] = cell
        pair.flag = True
        return cell

    snapshot = Snapshot(pair, function)
    function()
    assert snapshot.diff() == [
        "'flag' of LinearGaussianVAE",
        f"'MADE' of module {__name__}",
        "a variable outside function",
    ]
    snapshot.restore()
    assert snapshot.diff() == []
    assert cell == 0
    assert "MADE" not in globals()


def test_signatures_are_equal_if_every_field_is() -> None:
    fields: Any = (layout((torch.zeros(2, 3),)), ((1.0,),), (True,), False)
    first = Signature(*fields)
    assert first == Signature(*fields)
    assert hash(first) == hash(Signature(*fields))
    for i, other in enumerate((layout((torch.zeros(3, 2),)), ((2.0,),), (False,), True)):
        assert first != Signature(*fields[:i], other, *fields[i + 1 :])
