"""The tracer: a Pyro program's tensor operations as a graph, or the reason why there is none."""

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

from pyro_vae.capture.internals import NON_FAKE_TENSOR, PYRO_SKIPS_ZEROS, PYRO_WARNS, ProvenanceTensor

__all__ = ["CaptureError", "Tape", "traced"]


class CaptureError(ValueError):
    """A Pyro program cannot be captured; the message names the line or operation that prevents it."""


class Tape(TorchFunctionMode):
    """Answer questions of Pyro's about values, on tensors without values; collect the gradients of backward calls.

    Args:
        leaves: the tensors to take gradients of.
        seed: factor of all gradients. It multiplies the gradient of the root, which costs nothing.
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
            # Pyro adds such numbers up as Python floats, i.e. in double precision.
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
        frames = list(_outward(frame))
        asking = next(f for f in frames if not _inside(f.f_code.co_filename, _TORCH))
        if func is Tensor.__bool__ and asking.f_code in PYRO_WARNS:
            return False
        if func is Tensor.__bool__ and asking.f_code is PYRO_SKIPS_ZEROS:
            return True
        user = next((f for f in frames if not _is_machinery(f.f_code.co_filename)), asking)
        raise CaptureError(
            f"{_place(user.f_code.co_filename, user.f_lineno)} asks for a tensor's value ({func.__name__}), "
            "on which the recorded operations may not depend: use torch.where, or keep the tensor"
        )


_ASKS_FOR_A_VALUE = {Tensor.__bool__, Tensor.__float__, Tensor.__int__, Tensor.__index__, Tensor.__complex__}
_TORCH = (Path(torch.__file__).parent,)
_PYRO = (Path(pyro.__file__).parent,)
_STANDARD = (Path(sysconfig.get_path("stdlib")),)
# Rooms of this package that run programs and are no part of them: an error names the line of a program.
_ROOMS = tuple(Path(__file__).parents[1] / room for room in ("capture", "likelihood", "pair", "training"))
assert all(room.is_dir() for room in _ROOMS)
_MACHINERY = (*_TORCH, *_PYRO, *_ROOMS)


def _outward(frame: FrameType | None) -> Iterator[FrameType]:
    # Frames further out called for the capture.
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

    Args:
        program: a function of tensors.
        inputs: example inputs; only their layouts are read.

    Raises:
        CaptureError: naming the line that cannot be captured.
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
        # Replays take no gradients: a detached tensor is the tensor.
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
    pyros = [f for f in frames if _inside(f.filename, _PYRO)]
    users = [f for f in frames if not _is_machinery(f.filename)]
    where = (users or pyros or frames)[-1]
    what = str(error).split("\n")[0].strip() or "no reason given"
    if NON_FAKE_TENSOR in str(error):
        what = "it uses a tensor that is neither a parameter, a buffer nor part of the batch: register it as a buffer"
    if ProvenanceTensor.__name__ in str(error):
        return "Pyro marks the draws of sites without rsample by tensors of its own, and so is eager by design"
    return f"{_place(where.filename, where.lineno)} raises {type(error).__name__}: {what}"
