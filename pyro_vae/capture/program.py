"""Programs: the tensor operations of a Pyro program, captured once and replayed.

Two clients capture programs: a training step (:mod:`pyro_vae.training.captured_step`) and the chunks of a likelihood
estimate (:mod:`pyro_vae.likelihood.captured`). Both call :func:`record`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.fx import GraphModule

from pyro_vae.capture.python_state import PairState, Snapshot, swapped
from pyro_vae.capture.tracer import CaptureError, Tape, traced

__all__ = [
    "Capture",
    "Layout",
    "Program",
    "Signature",
    "StateChangedError",
    "Taped",
    "check_capture",
    "layout",
    "record",
]

# Whether to capture; "auto" decides by how much is to be computed.
Capture: TypeAlias = Literal["auto"] | bool
# Shape, strides and dtype of each tensor.
Layout: TypeAlias = tuple[tuple[torch.Size, tuple[int, ...], torch.dtype], ...]


def check_capture(capture: Capture) -> None:
    """Refuse any other value than "auto", True and False.

    Raises:
        ValueError: for such a value.
    """
    # 0 and 1 equal False and True, and are neither.
    if capture != "auto" and not isinstance(capture, bool):
        raise ValueError(f"capture is {capture!r}; it must be 'auto', True or False")


def layout(tensors: Sequence[Tensor]) -> Layout:
    """Return the shapes, strides and dtypes of tensors.

    >>> layout((torch.zeros(2, 3),))
    ((torch.Size([2, 3]), (3, 1), torch.float32),)
    """
    return tuple([(t.shape, t.stride(), t.dtype) for t in tensors])


@dataclass(frozen=True, slots=True)
class Signature:
    """Python facts that a training program holds as constants. Another signature needs another program.

    Args:
        batch: layout of the batch.
        attributes: numbers, flags and names of the pair's modules and of the loss.
        trained: for each parameter, whether it requires a gradient.
        weighted: whether β is an input; otherwise it is 1.
    """

    batch: Layout
    attributes: tuple[Any, ...]
    trained: tuple[bool, ...]
    weighted: bool


@dataclass(frozen=True)
class Program:
    """Captured tensor operations, from the pair's state and further inputs to outputs.

    Args:
        graph: the operations.
        run: runs them: the graph itself, or its compiled form.
        replaced: indices into the state of the buffers that the program assigns anew.
    """

    graph: GraphModule
    run: Callable[..., Any]
    replaced: tuple[int, ...] = ()

    def running(self, run: Callable[..., Any] | None) -> Program:
        """Return the program with another way to run it; the same one for None."""
        return self if run is None else replace(self, run=run)

    def replay(self, state: Sequence[Tensor], inputs: Sequence[Tensor]) -> Sequence[Any]:
        """Run the operations, write the buffers that they replace, and return the other outputs.

        Args:
            state: the tensors of the :class:`PairState`, as they are now.
            inputs: laid out like those that the program was captured with.
        """
        with torch.no_grad():
            outputs = self.run(*state, *inputs)
            if self.replaced:
                count = len(outputs) - len(self.replaced)
                for i, value in zip(self.replaced, outputs[count:], strict=True):
                    state[i].copy_(value)
                outputs = outputs[:count]
        return outputs


@dataclass(frozen=True)
class Taped:
    """One run of a program on tensors without values.

    Args:
        value: the result of the program.
        given: the tensors that it was given: state and inputs.
        leaves: the parameters that a gradient was taken of.
        gradients: the gradient of each leaf; None where there is none.
    """

    value: Any
    given: tuple[Tensor, ...]
    leaves: list[Tensor]
    gradients: list[Tensor | None]


class StateChangedError(CaptureError):
    """The program sets an attribute, a global or a closure variable; a replay would not."""


def record(
    program: Callable[..., Any],
    state: PairState,
    inputs: Sequence[Tensor],
    *,
    watched: Callable[..., Any] | None = None,
    trained: Sequence[int] | None = None,
    scale: float | None = None,
    outputs: Callable[[Taped], Sequence[Tensor]] = lambda taped: [taped.value],
) -> Program:
    """Run a program once on tensors without values, and return its tensor operations.

    The program runs the pair, whose parameters and buffers are inputs of the result. Attributes, globals and closure
    variables that the run sets are restored.

    Args:
        program: takes the inputs.
        state: parameters and buffers of the pair.
        inputs: example inputs.
        watched: another function whose globals and closure variables the program may read, e.g. the loss.
        trained: indices into the state of the parameters to take gradients of; None for a program without gradients.
        scale: factor of all gradients.
        outputs: makes the outputs from the run.

    Raises:
        CaptureError: naming the line that cannot be captured.
        StateChangedError: naming the attribute or variable.

    >>> from pyro_vae.models import LinearGaussianVAE
    >>> pair = LinearGaussianVAE(3, 1)
    >>> state = PairState(pair)
    >>> program = record(lambda x: x @ pair.weight, state, [torch.zeros(2, 3)])
    >>> x = torch.ones(2, 3)
    >>> torch.equal(program.replay(state.tensors(), [x])[0], x @ pair.weight)
    True
    """
    held = state.tensors()
    replaced: list[int] = []

    def operations(*given: Tensor) -> tuple[Tensor, ...]:
        values = list(given[: len(held)])
        with torch.set_grad_enabled(trained is not None):
            for i, parameter in enumerate(state.parameters):
                # torch's matmul folds a batch into its rows or not by this flag, and rounds accordingly.
                takes = parameter.requires_grad if trained is None else i in trained
                values[i] = values[i].detach().requires_grad_(takes)
            tape = Tape([values[i] for i in trained or ()], seed=scale)
            with tape, swapped(state.pair, {id(t): new for t, new in zip(held, values, strict=True)}):
                value = program(*given[len(held) :])
                after = state.tensors()
        result = outputs(Taped(value, (*given, *values), tape.leaves, tape.gradients))
        replaced.extend(i for i in range(state.parameters_count, len(held)) if after[i] is not values[i])
        return (*result, *(after[i].detach() for i in replaced))

    snapshot = Snapshot(state.pair, program if watched is None else watched)
    try:
        graph = traced(operations, [tensor.detach() for tensor in (*held, *inputs)])
    finally:
        changed = snapshot.diff()
        snapshot.restore()
    if changed:
        raise StateChangedError(
            f"the program sets {changed[0]}, which a replay would not: make it a buffer of the pair"
        )
    return Program(graph, graph.forward, tuple(replaced))
