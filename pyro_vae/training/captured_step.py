"""The captured step: a Pyro program is run once, its tensor operations recorded, and the recording replayed.

What is recorded is the eager step's own pass, forth and back, under Pyro's handlers, with the mean per datum, the norm
of the gradient and its clipping; the optimiser is the caller's own. Replayed as it is, a recording draws the same noise
and returns the same bits as the eager step; compiled, the same numbers up to rounding.

A recording holds the sizes and the Python numbers that the program saw. One is therefore made for each combination of
input shapes, training flags and plain attributes of the pair's modules and of the loss; β is a tensor input. What no
recording can follow is refused with a :class:`CaptureError` that names the line: Python control flow on a tensor's
value, draws from ``random`` or NumPy, attributes and globals that the program sets. A program must not depend on other
Python state that changes between steps; what else it does in Python, printing for one, happens at the recording only.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from pyro_vae.capture import cuda_graph
from pyro_vae.capture.cuda_graph import GraphedStep, Layout, layout, waits_for_the_device
from pyro_vae.capture.fused_adam import update
from pyro_vae.capture.inductor import compile_graph, keep_pages
from pyro_vae.capture.onednn import with_faster_products
from pyro_vae.capture.python_state import name_of, plain_attributes, swapped, unchanged
from pyro_vae.capture.tracer import CaptureError, Tape, traced
from pyro_vae.objectives.loss import Loss
from pyro_vae.pair.modes import device_of
from pyro_vae.pair.pair import Pair
from pyro_vae.runtime.batches import Batch, unpacked
from pyro_vae.training import step as steps
from pyro_vae.training.step import Average, NonFiniteLossError, Step, eager_backward, updating_step

__all__ = ["captured_step"]

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
    tell: Callable[[str], object] | None = None,
    average: Average | None = None,
) -> Step:
    """Return a step that replays the pair's recorded program: the eager step's numbers without Pyro's overhead.

    A first recording takes as long as some tens of steps, compiling it far longer. Pyro's validation is off inside it.
    On a CUDA device the whole step, optimiser included, is replayed as one CUDA graph where the optimiser is fused or
    capturable, or plain SGD, and no gradients are averaged over processes.

    Args:
        pair: the pair to train.
        loss: any Pyro ELBO, or an objective, a function of log-terms to maximise.
        optimizer: over the pair's parameters.
        num_particles: draws per datum for an objective; a Pyro ELBO holds its own.
        clip_norm: largest global norm of the gradient.
        compiled: whether to compile recordings of the largest batches, with their matrix products through oneDNN
            where that was timed to be faster; the numbers are then equal up to rounding. Recordings of other shapes,
            such as a short last batch, are replayed as they are.
        after: steps of a kind, a shape and so on, that are taken eagerly before that kind is recorded.
        strict: whether to raise where the program cannot be recorded; else steps are eager, with one warning.
        tell: is called with a line of text before and after what takes seconds, which is compiling, and where steps on
            a CUDA device cannot become a CUDA graph.
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
    options, device = _Options(num_particles, clip_norm, compiled, after, strict, tell), device_of(pair)
    if average is None and device.type not in steps.READ_LATER:
        return _CapturedStep(pair, loss, optimizer, options)
    # Averages come between the pass and its norm; and on other devices reading loss and norm would wait for them.
    alone = _CapturedStep(pair, loss, optimizer, options._replace(whole=False))
    step = updating_step(alone.backward, optimizer, clip_norm, average)
    if average is not None or device.type not in cuda_graph.DEVICES:
        return step
    return GraphedStep(alone, step, optimizer, cuda_graph.DEVICES[device.type](device), tell)


class _Options(NamedTuple):
    """What :func:`captured_step` was asked for."""

    num_particles: int
    clip_norm: float | None
    compiled: bool
    after: int
    strict: bool
    tell: Callable[[str], object] | None = None
    # Whether the mean per datum, its norm and its clipping are recorded with the pass.
    whole: bool = True


class _Recording(NamedTuple):
    """A graph from (parameters, buffers, batch, β where it is used) to (loss, norm, gradients, replaced buffers).

    The loss is the batch's sum, gradient and norm are those of the mean per datum; a pass alone has no norm, and the
    gradient of the sum.
    """

    run: Callable[..., Any]
    trained: list[nn.Parameter]
    replaced: list[int]
    uses_beta: bool
    # Why it cannot be part of a CUDA graph.
    obstacle: str | None


class _CapturedStep:
    """Take a step by replaying a recording of the eager one up to its optimiser."""

    def __init__(
        self,
        pair: Pair,
        loss: Loss,
        optimizer: torch.optim.Optimizer,
        options: _Options,
    ) -> None:
        self.pair, self.loss, self.optimizer, self.options = pair, loss, optimizer, options
        self.eager_backward = eager_backward(pair, loss, options.num_particles)
        self.eager_step = updating_step(self.eager_backward, optimizer, options.clip_norm)
        self.optimised = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self.parameters = list(pair.parameters())
        floating = [p for p in self.parameters if p.is_floating_point()]
        like = floating[0] if floating else torch.empty(())
        self.beta = torch.ones((), dtype=like.dtype, device=like.device)
        # Read at every step, so that a buffer assigned anew between two steps is seen.
        self.buffers = [(m._buffers, n) for m in pair.modules() for n, b in m._buffers.items() if b is not None]
        self.watched: list[tuple[Callable[[Any], Any], Mapping[str, Any], list[str]]] | None = None
        self.recordings: dict[Any, _Recording] = {}
        self.seen: Counter[Any] = Counter()
        self.sizes: list[int] = []
        # The largest batch compiled so far: a short one may come first.
        self.largest = 0
        self.compiled = options.compiled
        self.gave_up = False
        self.lazy = True

    def __call__(self, *given: Tensor | Batch, beta: float = 1.0) -> float:
        batch = unpacked(given)
        recording = self._found(batch, beta, self.eager_step)
        if not isinstance(recording, _Recording):
            return recording
        total, norm, gradients = self._replay(recording, batch, beta)
        loss, size = float(total), float(norm)
        if not math.isfinite(loss):
            raise NonFiniteLossError(f"the loss is {loss}")
        if not math.isfinite(size):
            raise NonFiniteLossError(f"the loss is {loss}, the norm of its gradient {size}")
        update(self.optimizer, recording.trained, gradients)
        return loss / len(batch[0])

    def backward(self, *batch: Tensor, beta: float | Tensor = 1.0) -> Any:
        """Leave the gradients of the batch's summed loss in ``p.grad`` and return that loss.

        A tensor β is one that a recording reads, and the value it has by then counts.
        """
        recording = self._found(batch, beta, self.eager_backward)
        if not isinstance(recording, _Recording):
            return recording
        total, _, gradients = self._replay(recording, batch, beta)
        for parameter, gradient in zip(recording.trained, gradients, strict=True):
            parameter.grad = gradient
        return total

    def kind(self, shapes: Layout, beta: float | Tensor) -> Any:
        """Return what tells the recordings apart: whether β is 1, shapes, attributes, and what is trained."""
        is_one = not isinstance(beta, Tensor) and beta == 1.0
        return is_one, shapes, self._state(), tuple([p.requires_grad for p in self.parameters])

    def obstacle(self, kind: Any) -> str | None:
        """Return why a recording cannot be part of a CUDA graph; "" while there is none, None where it can."""
        found = self.recordings.get(kind)
        return "" if found is None else found.obstacle

    def tensors(self) -> list[Tensor]:
        """Return the parameters and the buffers, as they are now."""
        buffers: list[Any] = [held[name] for held, name in self.buffers]
        return [*self.parameters, *buffers]

    def _found(self, batch: tuple[Tensor, ...], beta: float | Tensor, eager: Callable[..., Any]) -> Any:
        """Return the recording to replay, or what the eager function gives where there is none."""
        if not self.gave_up:
            try:
                found = self._recording(batch, beta)
            except CaptureError as reason:
                if self.options.strict:
                    raise
                self.gave_up = True
                # A mistake in the program raises here, in its own words and without a warning before it.
                loss = eager(*batch, beta=beta)
                warnings.warn(f"this pair trains by eager steps, which are slower: {reason}", stacklevel=3)
                return loss
            if found is not None:
                return found
        return eager(*batch, beta=beta)

    def _replay(
        self, recording: _Recording, batch: tuple[Tensor, ...], beta: float | Tensor
    ) -> tuple[Any, Any, list[Any]]:
        state = self.tensors()
        inputs, buffers = [*state, *batch], state[len(self.parameters) :]
        if recording.uses_beta:
            inputs.append(beta if isinstance(beta, Tensor) else self.beta.fill_(beta))
        trained = len(recording.trained)
        with torch.no_grad():
            total, norm, *rest = recording.run(*inputs)
            for i, value in zip(recording.replaced, rest[trained:], strict=True):
                buffers[i].copy_(value)
        return total, norm, rest[:trained]

    def _recording(self, batch: tuple[Tensor, ...], beta: float | Tensor) -> _Recording | None:
        """Return the recording for these inputs; None where the step is to be eager instead."""
        key = self.kind(layout(batch), beta)
        if (found := self.recordings.get(key)) is not None:
            return found
        self.seen[key] += 1
        if len(self.recordings) >= MAX_RECORDINGS or len(self.seen) > MAX_KINDS:
            raise CaptureError(f"{self._what_changes()}: each change needs a recording of its own")
        if self.seen[key] <= self.options.after:
            return None
        compiled = self.compiled and len(batch[0]) >= self.largest
        keep_pages()
        with unchanged(self.pair, self.loss) as changed:
            recording = self._record(batch, uses_beta=not key[0], exact=not compiled or not self.options.whole)
        if changed:
            if not self.lazy:
                raise CaptureError(
                    f"the program sets {changed[0]}, which a replay would not: make it a buffer of the pair"
                )
            # Layers that initialise themselves from their first batch, and ELBOs that count their plates, do it now.
            self.lazy, self.watched = False, None
            return None
        if compiled:
            self.largest = len(batch[0])
            inputs = self._inputs(batch, uses_beta=not key[0])
            assert isinstance(recording.run, GraphModule)
            graph = with_faster_products(recording.run, inputs)
            recording = recording._replace(run=(run := compile_graph(graph, inputs, self.options.tell)) or graph)
            self.compiled = run is not None
        if isinstance(recording.run, GraphModule):
            recording = recording._replace(run=recording.run.forward)
        self.recordings[key] = recording
        return recording

    def _state(self) -> tuple[Any, ...]:
        """Return the numbers, flags and names that the program may read."""
        # A name that comes new may hide a class's default, one that goes may uncover it.
        if self.watched is None or self.sizes != [len(held) for _, held, _ in self.watched]:
            self.watched = plain_attributes(self.pair, self.loss)
            self.sizes = [len(held) for _, held, _ in self.watched]
        try:
            return tuple([get(held) for get, held, _ in self.watched])
        except KeyError:
            # One name came while another went.
            self.watched = None
            return self._state()

    def _inputs(self, batch: tuple[Tensor, ...], *, uses_beta: bool) -> list[Tensor]:
        return [tensor.detach() for tensor in (*self.tensors(), *batch, *([self.beta] if uses_beta else []))]

    def _record(self, batch: tuple[Tensor, ...], *, uses_beta: bool, exact: bool) -> _Recording:
        """Run the eager pass once on tensors without values, and return its operations."""
        trained = [i for i, p in enumerate(self.parameters) if p.requires_grad and id(p) in self.optimised]
        with_gradient: list[nn.Parameter] = []
        replaced: list[int] = []
        parameters, buffers, size = len(self.parameters), len(self.buffers), len(batch[0])

        def program(*inputs: Tensor) -> tuple[Tensor, ...]:
            with torch.enable_grad():
                leaves = [t.detach().requires_grad_(i in trained) for i, t in enumerate(inputs[:parameters])]
                rest = list(inputs[parameters:])
                beta: Any = rest.pop() if uses_beta else 1.0
                state = {id(t): new for t, new in zip(self.tensors(), [*leaves, *rest[:buffers]], strict=True)}
                # A division of its own passes over all gradients once more, but rounds as the eager step's does.
                tape = Tape([leaves[i] for i in trained], seed=None if exact else 1 / size)
                with tape, swapped(self.pair, state):
                    total: Any = self.eager_backward(*rest[buffers:], beta=beta)
                    after: list[Any] = [held[name] for held, name in self.buffers]
            taken = {_storage(t) for t in (*inputs, *leaves)}
            for i, gradient in zip(trained, tape.gradients, strict=True):
                if gradient is not None:
                    with_gradient.append(self.parameters[i])
                    leaves[i].grad = _owned(gradient, leaves[i], taken)
            used = [leaf for leaf in leaves if leaf.grad is not None]
            norm, gradients = _mean(used, size if exact else 1, options.clip_norm) if options.whole else _sum(used)
            replaced.extend(i for i in range(buffers) if after[i] is not rest[i])
            return (torch.as_tensor(total), norm, *gradients, *(after[i].detach() for i in replaced))

        options = self.options
        try:
            graph = traced(program, self._inputs(batch, uses_beta=uses_beta))
        except CaptureError as error:
            whose = f"{name_of(self.loss)} of {type(self.pair).__name__}"
            raise CaptureError(f"{whose} is not recorded: {error}") from error
        return _Recording(graph, with_gradient, replaced, uses_beta, waits_for_the_device(graph, self.beta.device))

    def _what_changes(self) -> str:
        _, shapes, states, _ = (list(dict.fromkeys(part)) for part in zip(*self.seen, strict=True))
        for i, (_, _, names) in enumerate(self.watched or []):
            for j, name in enumerate(names):
                if len({state[i][j] for state in states}) > 1:
                    return f"attribute '{name}' takes many values (make it a buffer)"
        return f"the batches have {len(shapes)} shapes"


def _sum(leaves: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Return no norm, and the gradients as they are."""
    return torch.zeros(()), [leaf.grad for leaf in leaves if leaf.grad is not None]


def _mean(leaves: list[Tensor], size: int, clip_norm: float | None) -> tuple[Tensor, list[Tensor]]:
    """Return the norm of the mean gradient and that gradient, clipped, by the operations of the eager step."""
    _, gradients = _sum(leaves)
    if size != 1:
        torch._foreach_div_(gradients, size)
    norm = nn.utils.get_total_norm(gradients)
    if clip_norm is not None:
        nn.utils.clip_grads_with_norm_(leaves, clip_norm, norm)
    return norm, gradients


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _owned(gradient: Tensor, leaf: Tensor, taken: set[int]) -> Tensor:
    """Return a gradient laid out as its parameter in memory of its own, since it will be divided in place."""
    if gradient.stride() != leaf.stride() or _storage(gradient) in taken:
        gradient = torch.empty_like(leaf).copy_(gradient)
    taken.add(_storage(gradient))
    return gradient.detach()
