"""The recorder: what a Pyro program does to tensors, as a graph, and the reason where that is not possible."""

from __future__ import annotations

import random
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

__all__ = ["CaptureError", "Tape", "traced"]


class CaptureError(ValueError):
    """A Pyro program cannot be recorded; the message names the line or operation that prevents it."""


class Tape(TorchFunctionMode):
    """Answer for tensors without values what Pyro asks of values, and gather the gradients of its backward calls.

    Args:
        leaves: what gradients are taken of.
        seed: what all gradients are multiplied by, at the root, where that costs nothing.
    """

    def __init__(self, leaves: list[Tensor], seed: float | None = None) -> None:
        super().__init__()
        self.leaves, self.seed = leaves, seed
        self.gradients: list[Tensor | None] = [None] * len(leaves)

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.item:
            # Pyro adds such numbers up as Python floats, in double precision.
            value = args[0].detach()
            return value.double() if value.is_floating_point() else value
        if func is Tensor.backward:
            return self._backward(*args, **kwargs)
        if func in _ASKS_FOR_A_VALUE:
            return self._answer(func, sys._getframe(1))
        return func(*args, **kwargs)

    def _backward(self, value: Tensor, gradient: Any = None, retain_graph: Any = None, **options: Any) -> None:
        if any(options.values()):
            raise CaptureError(f"a backward call with {sorted(options)} is not recorded")
        if self.seed is not None:
            gradient = self.seed * (torch.ones_like(value) if gradient is None else gradient)
        new = torch.autograd.grad(value, self.leaves, gradient, retain_graph=retain_graph, allow_unused=True)
        for i, (old, more) in enumerate(zip(self.gradients, new, strict=True)):
            self.gradients[i] = more if old is None else old if more is None else old + more

    def _answer(self, func: Any, frame: FrameType | None) -> bool:
        asking = next(f for f in _outward(frame) if not _inside(f.f_code.co_filename, _TORCH))
        if func is Tensor.__bool__ and asking.f_code.co_filename == pyro.util.__file__:
            # Pyro's warnings of NaN: the step refuses a loss that is not finite itself.
            return False
        if func is Tensor.__bool__ and asking.f_code.co_name == "compute_expectation":
            # TraceEnum_ELBO skips outcomes of probability zero; were there one, 0 · (−∞) = NaN would be refused too.
            return True
        user = next((f for f in _outward(frame) if not _is_machinery(f.f_code.co_filename)), asking)
        raise CaptureError(
            f"{_place(user.f_code.co_filename, user.f_lineno)} asks for a tensor's value ({func.__name__}), "
            "on which the recorded operations may not depend: use torch.where, or keep the tensor"
        )


_ASKS_FOR_A_VALUE = {Tensor.__bool__, Tensor.__float__, Tensor.__int__, Tensor.__index__, Tensor.__complex__}
_TORCH = (Path(torch.__file__).parent,)
_PYRO = Path(pyro.__file__).parent
_STANDARD = (Path(sysconfig.get_path("stdlib")),)
_MACHINERY = (
    *_TORCH,
    _PYRO,
    *(Path(__file__).parents[1] / room for room in ("capture", "pair", "training")),
)


def _outward(frame: FrameType | None) -> Iterator[FrameType]:
    # What lies further out called for the recording and is no part of the program.
    while frame is not None and frame.f_code is not traced.__code__:
        yield frame
        frame = frame.f_back


def _inside(filename: str, folders: Sequence[Path]) -> bool:
    return any(folder == Path(filename) or folder in Path(filename).parents for folder in folders)


def _is_machinery(filename: str) -> bool:
    standard = _inside(filename, _STANDARD) and "site-packages" not in filename
    return filename.startswith("<") or standard or _inside(filename, _MACHINERY)


def _place(filename: str, line: int | None) -> str:
    return f"{filename}:{line}"


def traced(program: Callable[..., Any], inputs: list[Tensor]) -> GraphModule:
    """Return the operations of a program, without those that only detach.

    Raises:
        CaptureError: naming the line that could not be recorded.
    """
    before = _foreign_generators()
    try:
        with pyro.validation_enabled(False):
            graph = make_fx(program, tracing_mode="fake")(*inputs)
    except CaptureError:
        raise
    except Exception as error:
        raise CaptureError(_reason(error)) from error
    if _foreign_generators() != before:
        raise CaptureError("the program draws from random or numpy, which a replay would not: draw with torch")
    for node in graph.graph.nodes:
        # Replays run without gradients, where a detached tensor is the tensor.
        if node.target in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            node.replace_all_uses_with(node.args[0])
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def _foreign_generators() -> tuple[Any, ...]:
    state: Any = np.random.get_state()
    return random.getstate(), state[1].tobytes(), state[2:]


def _reason(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    pyros = [f for f in frames if _inside(f.filename, (_PYRO,))]
    users = [f for f in frames if not _is_machinery(f.filename)]
    where = (users or pyros or frames)[-1]
    what = str(error).split("\n")[0].strip() or "no reason given"
    if "convert all Tensors to FakeTensors" in str(error):
        what = "it uses a tensor that is neither a parameter, a buffer nor part of the batch: register it as a buffer"
    if "ProvenanceTensor" in str(error):
        return "Pyro marks the draws of sites without rsample by tensors of its own, and so is eager by design"
    return f"{_place(where.filename, where.lineno)} raises {type(error).__name__}: {what}"
