"""The captured step: a Pyro program is run once, its tensor operations recorded, and the recording replayed.

What is recorded is the eager step's own pass, forth and back, under Pyro's handlers; what follows it (the mean per
datum, clipping, the optimiser) is the eager step's own code. Replayed as it is, a recording draws the same noise and
returns the same bits as the eager step; compiled, the same numbers up to rounding.

A recording holds the sizes and the Python numbers that the program saw. One is therefore made for each combination of
input shapes, training flags and plain attributes of the pair's modules and of the loss; β is a tensor input. What no
recording can follow is refused with a :class:`CaptureError` that names the line: Python control flow on a tensor's
value, draws from ``random`` or NumPy, attributes and globals that the program sets. A program must not depend on other
Python state that changes between steps; what else it does in Python, printing for one, happens at the recording only.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CellType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from pyro_vae.pair import Pair
from pyro_vae.products import with_faster_products
from pyro_vae.recording import CaptureError, Tape, traced
from pyro_vae.svi import Average, Loss, Step, eager_backward, updating_step

__all__ = ["CaptureError", "captured_step"]

# A program whose shapes or attributes change more often than this would spend its time, or its memory, on recordings.
MAX_RECORDINGS = 8
MAX_KINDS = 1000


def captured_step(
    pair: Pair,
    loss: Loss,
    optimizer: torch.optim.Optimizer,
    *,
    num_particles: int = 1,
    clip_norm: float | None = None,
    compiled: bool = False,
    after: int = 0,
    strict: bool = True,
    average: Average | None = None,
) -> Step:
    """Return a step that replays the pair's recorded program: the eager step's numbers without Pyro's overhead.

    A first recording takes as long as some tens of steps, compiling it far longer. Pyro's validation is off inside it.

    Args:
        pair: the pair to train.
        loss: any Pyro ELBO, or an objective, a function of log-terms to maximise.
        optimizer: over the pair's parameters.
        num_particles: draws per datum for an objective; a Pyro ELBO holds its own.
        clip_norm: largest global norm of the gradient.
        compiled: whether to compile recordings of the first batch's shape, with their matrix products through oneDNN
            where that was timed to be faster; the numbers are then equal up to rounding. Recordings of other shapes,
            such as a short last batch, are replayed as they are.
        after: steps of a kind, a shape and so on, that are taken eagerly before that kind is recorded.
        strict: whether to raise where the program cannot be recorded; else steps are eager, with one warning.
        average: averages gradients over processes.

    Returns:
        A step that raises :class:`~pyro_vae.svi.NonFiniteLossError` as the eager one does, and :class:`CaptureError`
        when ``strict``.

    >>> import torch, pyro_vae as pv
    >>> pair = pv.models.LinearGaussianVAE(3, 1)
    >>> step = captured_step(pair, pv.objectives.elbo, torch.optim.SGD(pair.parameters(), lr=0.1))
    >>> x = torch.randn(8, 3)
    >>> losses = [step(x) for _ in range(20)]
    >>> losses[-1] < losses[0]
    True
    """
    backward = _CapturedBackward(pair, loss, optimizer, num_particles, compiled=compiled, after=after, strict=strict)
    return updating_step(backward, optimizer, clip_norm, average)


class _Recording(NamedTuple):
    """A graph from (parameters, buffers, batch, β where it is used) to (loss, gradients, replaced buffers)."""

    run: Callable[..., Any]
    trained: list[nn.Parameter]
    replaced: list[int]
    uses_beta: bool


class _CapturedBackward:
    """Leave the gradients of a batch's summed loss in ``p.grad`` by replaying a recording of the eager pass."""

    def __init__(
        self,
        pair: Pair,
        loss: Loss,
        optimizer: torch.optim.Optimizer,
        num_particles: int,
        *,
        compiled: bool,
        after: int,
        strict: bool,
    ) -> None:
        self.pair, self.loss, self.strict, self.compiled, self.after = pair, loss, strict, compiled, after
        self.eager = eager_backward(pair, loss, num_particles)
        self.optimised = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self.parameters = list(pair.parameters())
        floating = [p for p in self.parameters if p.is_floating_point()]
        like = floating[0] if floating else torch.empty(())
        self.beta = torch.ones((), dtype=like.dtype, device=like.device)
        # Read at every step, so that a buffer assigned anew between two steps is seen.
        self.buffers = [(m._buffers, n) for m in pair.modules() for n, b in m._buffers.items() if b is not None]
        self.watched: list[tuple[dict[str, Any], str]] = []
        self.recordings: dict[Any, _Recording] = {}
        self.seen: Counter[Any] = Counter()
        self.first_shape: Any = None
        self.gave_up = False
        self.lazy = True

    def __call__(self, *batch: Tensor, beta: float = 1.0) -> float | Tensor:
        if self.gave_up:
            return self.eager(*batch, beta=beta)
        try:
            recording = self._recording(batch, beta)
        except CaptureError as reason:
            if self.strict:
                raise
            self.gave_up = True
            # A mistake in the program raises here, in its own words and without a warning before it.
            total = self.eager(*batch, beta=beta)
            warnings.warn(f"this pair trains by eager steps, which are slower: {reason}", stacklevel=3)
            return total
        return self.eager(*batch, beta=beta) if recording is None else self._replay(recording, batch, beta)

    def _replay(self, recording: _Recording, batch: tuple[Tensor, ...], beta: float) -> Tensor:
        buffers: list[Any] = [held[name] for held, name in self.buffers]
        inputs = [*self.parameters, *buffers, *batch]
        if recording.uses_beta:
            inputs.append(self.beta.fill_(beta))
        with torch.no_grad():
            total, *rest = recording.run(*inputs)
            for parameter, gradient in zip(recording.trained, rest, strict=False):
                parameter.grad = gradient
            for i, value in zip(recording.replaced, rest[len(recording.trained) :], strict=True):
                buffers[i].copy_(value)
        return total

    def _recording(self, batch: tuple[Tensor, ...], beta: float) -> _Recording | None:
        """Return the recording for these inputs; None where the step is to be eager instead."""
        shape = tuple((t.shape, t.stride(), t.dtype) for t in batch)
        if not self.watched:
            self.watched = _plain_attributes(self.pair, self.loss)
        state = tuple(owner.get(name) for owner, name in self.watched)
        key = (beta == 1.0, shape, state, tuple(p.requires_grad for p in self.parameters))
        if (found := self.recordings.get(key)) is not None:
            return found
        self.seen[key] += 1
        if len(self.recordings) >= MAX_RECORDINGS or len(self.seen) > MAX_KINDS:
            raise CaptureError(f"{self._what_changes()}: each change needs a recording of its own")
        if self.seen[key] <= self.after:
            return None
        with _unchanged(self.pair, self.loss) as changed:
            recording = self._record(batch, uses_beta=beta != 1.0)
        if changed:
            if not self.lazy:
                raise CaptureError(
                    f"the program sets {changed[0]}, which a replay would not: make it a buffer of the pair"
                )
            # Layers that initialise themselves from their first batch, and ELBOs that count their plates, do it now.
            self.lazy, self.watched = False, []
            return None
        self.first_shape = self.first_shape or shape
        if self.compiled and shape == self.first_shape:
            inputs = self._inputs(batch, uses_beta=beta != 1.0)
            assert isinstance(recording.run, GraphModule)
            graph = with_faster_products(recording.run, inputs)
            recording = recording._replace(run=(run := _compiled(graph, inputs)) or graph)
            self.compiled = run is not None
        self.recordings[key] = recording
        return recording

    def _inputs(self, batch: tuple[Tensor, ...], *, uses_beta: bool) -> list[Tensor]:
        state: list[Any] = [*self.parameters, *(held[name] for held, name in self.buffers)]
        return [tensor.detach() for tensor in (*state, *batch, *([self.beta] if uses_beta else []))]

    def _record(self, batch: tuple[Tensor, ...], *, uses_beta: bool) -> _Recording:
        """Run the eager pass once on tensors without values, and return its operations."""
        trained = [i for i, p in enumerate(self.parameters) if p.requires_grad and id(p) in self.optimised]
        with_gradient: list[nn.Parameter] = []
        replaced: list[int] = []
        parameters, buffers = len(self.parameters), len(self.buffers)

        def program(*inputs: Tensor) -> tuple[Tensor, ...]:
            with torch.enable_grad():
                leaves = [t.detach().requires_grad_(i in trained) for i, t in enumerate(inputs[:parameters])]
                rest = list(inputs[parameters:])
                beta: Any = rest.pop() if uses_beta else 1.0
                originals = [*self.parameters, *(held[name] for held, name in self.buffers)]
                state = {id(t): new for t, new in zip(originals, [*leaves, *rest[:buffers]], strict=True)}
                with Tape([leaves[i] for i in trained]) as tape, _swapped(self.pair, state):
                    total: Any = self.eager(*rest[buffers:], beta=beta)
                    after: list[Any] = [held[name] for held, name in self.buffers]
            taken = {_storage(t) for t in (*inputs, *leaves)}
            gradients = []
            for i, gradient in zip(trained, tape.gradients, strict=True):
                if gradient is not None:
                    with_gradient.append(self.parameters[i])
                    gradients.append(_owned(gradient, leaves[i], taken))
            replaced.extend(i for i in range(buffers) if after[i] is not rest[i])
            return (torch.as_tensor(total), *gradients, *(after[i].detach() for i in replaced))

        try:
            graph = traced(program, self._inputs(batch, uses_beta=uses_beta))
        except CaptureError as error:
            raise CaptureError(f"{_name(self.loss)} of {type(self.pair).__name__} is not recorded: {error}") from error
        return _Recording(graph, with_gradient, replaced, uses_beta)

    def _what_changes(self) -> str:
        _, shapes, states, _ = (list(dict.fromkeys(part)) for part in zip(*self.seen, strict=True))
        for i, (_, name) in enumerate(self.watched):
            if len({state[i] for state in states}) > 1:
                return f"attribute '{name}' takes many values (make it a buffer)"
        return f"the batches have {len(shapes)} shapes"


@contextmanager
def _swapped(pair: Pair, tensors: dict[int, Tensor]) -> Iterator[None]:
    """Put tensors in the place of parameters and buffers, given by their ids, wherever the pair holds them.

    ``torch.func.functional_call`` goes by name, and leaves a layer that a network holds twice without its parameters.
    """
    places: list[Any] = [held for m in pair.modules() for held in (m._parameters, m._buffers)]
    before = [dict(held) for held in places]
    try:
        for held in places:
            held.update({name: tensors[id(t)] for name, t in held.items() if id(t) in tensors})
        yield
        if [_present(held) for held in places] != [_present(old) for old in before]:
            raise CaptureError("the program adds a parameter or a buffer, which a replay would not: create it before")
    finally:
        for held, old in zip(places, before, strict=True):
            held.clear()
            held.update(old)


def _present(held: dict[str, Any]) -> set[str]:
    return {name for name, tensor in held.items() if tensor is not None}


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _owned(gradient: Tensor, leaf: Tensor, taken: set[int]) -> Tensor:
    """Return a gradient laid out as its parameter in memory of its own, since it will be divided in place."""
    if gradient.stride() != leaf.stride() or _storage(gradient) in taken:
        gradient = torch.empty_like(leaf).copy_(gradient)
    taken.add(_storage(gradient))
    return gradient.detach()


def _owners(pair: Pair, loss: Loss) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, module in pair.named_modules():
        yield f"{type(pair).__name__}{name and '.'}{name}", vars(module)
    if hasattr(loss, "__dict__"):
        yield _name(loss), vars(loss)


def _name(loss: Loss) -> str:
    return getattr(loss, "__name__", type(loss).__name__)


def _plain_attributes(pair: Pair, loss: Loss) -> list[tuple[dict[str, Any], str]]:
    """Return where the numbers, flags and names are that a program may have read."""
    return [(held, name) for _, held in _owners(pair, loss) for name, value in held.items() if _is_plain(value)]


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str, torch.dtype))


@contextmanager
def _unchanged(pair: Pair, loss: Loss) -> Iterator[list[str]]:
    """Put back every attribute and global that is set inside, and yield a list that then names them."""
    functions = [f for f in (type(pair).model, type(pair).guide, loss) if hasattr(f, "__globals__")]
    modules = {id(f.__globals__): (f"module {f.__module__}", f.__globals__) for f in functions}
    before = [(owner, held, dict(held)) for owner, held in (*_owners(pair, loss), *modules.values())]
    cells = [(cell, cell.cell_contents) for f in functions for cell in f.__closure__ or () if cell != CellType()]
    changed: list[str] = []
    try:
        yield changed
    finally:
        for owner, held, old in before:
            for name in [
                name for name in old.keys() | held.keys() if _differ(held.get(name, cells), old.get(name, cells))
            ]:
                changed.append(f"'{name}' of {owner}")
                held[name] = old.get(name)
                if name not in old:
                    del held[name]
        for cell, value in cells:
            if _differ(cell.cell_contents, value):
                changed.append(f"a variable outside {_name(loss)}")
                cell.cell_contents = value


def _differ(value: Any, previous: Any) -> bool:
    # Recurrent layers keep lists of their weights, anew for each run.
    cached = type(value) is list and type(previous) is list
    return value is not previous and not cached and not (_is_plain(value) and value == previous)


def _compiled(graph: GraphModule, inputs: list[Tensor]) -> Callable[..., Any] | None:
    """Return the graph compiled; None, with a warning, where that is not possible."""
    try:
        from torch._inductor import config, standalone_compile
        from torch._inductor.cpp_builder import get_cpp_compiler

        if all(tensor.device.type == "cpu" for tensor in inputs):
            get_cpp_compiler()
        # Random numbers come from torch's own generator, as in the eager step.
        with torch.no_grad(), config.patch(fallback_random=True):
            return standalone_compile(graph, [*inputs], dynamic_shapes="from_example_inputs")
    except Exception as error:
        reason = str(error).split("\n")[0].strip() or type(error).__name__
        warnings.warn(f"the recorded step is replayed uncompiled: {reason}", stacklevel=6)
        return None
