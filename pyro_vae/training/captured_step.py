"""The captured step: trace a Pyro program once, then replay its tensor operations.

A step through Pyro spends most of its time in Python: effect handlers, traces, sites. A captured step runs the eager
step's forward and backward pass once, on tensors without values, and records the tensor operations, including the mean
per datum, the norm of the gradient and its clipping. Later steps replay them and then call the optimiser. A replay
draws the same noise and returns the same bits as the eager step; a compiled program returns the same numbers up to
rounding.

A program holds the shapes and the Python numbers that the pair saw. A :class:`~pyro_vae.capture.program.Signature`
lists them, and a step whose signature is new is captured again. β is a tensor input. A :class:`CaptureError` names the
line that no program can follow: Python control flow on a tensor's value, draws from ``random`` or NumPy, attributes and
globals that the pair sets. Other effects in Python, e.g. printing, happen at the capture only. Other Python state that
the pair reads must not change during training: store it as an attribute of an ``nn.Module``, or train eagerly.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from pyro_vae.capture import cuda_graph
from pyro_vae.capture.cuda_graph import GraphedStep, waits_for_the_device
from pyro_vae.capture.fused_adam import update
from pyro_vae.capture.inductor import compile_graph, keep_pages
from pyro_vae.capture.onednn import with_faster_products
from pyro_vae.capture.program import Layout, Program, Signature, StateChangedError, Taped, layout, record
from pyro_vae.capture.python_state import PairState, name_of, plain_attributes
from pyro_vae.capture.tracer import CaptureError
from pyro_vae.objectives.loss import Loss
from pyro_vae.pair.modes import device_of
from pyro_vae.pair.pair import Pair
from pyro_vae.runtime.batches import Batch, unpacked
from pyro_vae.runtime.caller import warn_caller
from pyro_vae.training import step as steps
from pyro_vae.training.step import Average, NonFiniteLossError, Step, eager_backward, updating_step

__all__ = ["captured_step"]

# More programs than this would take the time, or the memory, that they are to save.
MAX_PROGRAMS = 8
MAX_SIGNATURES = 1000


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
    """Return a step that replays the pair's captured program: the eager step's numbers without Pyro's overhead.

    Capturing takes as long as some tens of steps; compiling takes seconds to a minute. Pyro's validation is off in
    captured steps. On a GPU the whole step, optimiser included, becomes one CUDA graph if the optimiser is fused or
    capturable, or plain SGD, and if one process trains alone.

    Args:
        pair: the pair to train.
        loss: any Pyro ELBO, or an objective, i.e. a function of log-terms to maximise.
        optimizer: a torch optimiser over the pair's parameters.
        num_particles: draws per datum for an objective; a Pyro ELBO has an argument of that name.
        clip_norm: largest global norm of the gradient; None for no clipping.
        compiled: whether to compile the programs of the largest batches, and to run their matmuls by oneDNN where that
            was timed to be faster. Programs of other shapes, e.g. of a short last batch, are replayed uncompiled.
        after: number of steps of a signature that run eagerly before it is captured.
        strict: whether to raise if the pair cannot be captured; otherwise steps are eager, with one warning.
        tell: is called with a line of text before and after compiling, and where steps on a GPU cannot become a CUDA
            graph.
        average: combines the gradients of several processes.

    Returns:
        A :class:`~pyro_vae.training.step.Step`, which raises :class:`CaptureError` if ``strict``.

    >>> import torch, pyro_vae as pv
    >>> pair = pv.models.LinearGaussianVAE(3, 1)
    >>> step = captured_step(pair, pv.objectives.elbo, torch.optim.SGD(pair.parameters(), lr=0.1))
    >>> x = torch.randn(8, 3)
    >>> losses = [step(x) for _ in range(20)]
    >>> losses[-1] < losses[0]
    True
    """
    device = device_of(pair)
    # Sums over processes come between the backward pass and the norm. On a GPU reading loss and norm would synchronise.
    whole = average is None and device.type not in steps.READ_LATER
    options = _Options(num_particles, clip_norm, compiled, after, strict, whole, tell)
    captured = _CapturedStep(pair, loss, optimizer, options)
    if whole:
        return captured
    step = updating_step(captured.backward, optimizer, clip_norm, average)
    if average is not None or device.type not in cuda_graph.DEVICES:
        return step
    return GraphedStep(captured, step, optimizer, cuda_graph.DEVICES[device.type](device), tell)


@dataclass(frozen=True)
class _Options:
    """Arguments of :func:`captured_step`.

    ``whole``: whether the mean per datum, the norm and the clipping are captured with the passes.
    """

    num_particles: int
    clip_norm: float | None
    compiled: bool
    after: int
    strict: bool
    whole: bool
    tell: Callable[[str], object] | None


@dataclass(frozen=True)
class _Captured:
    """A captured forward and backward pass.

    Args:
        program: from the batch, and β if it is weighted, to loss, norm and gradients. The loss is the batch's sum.
            Norm and gradients are those of the mean per datum; without the captured mean there is no norm, and the
            gradients are those of the sum.
        trained: the parameters that have a gradient.
        obstacle: why the program cannot be part of a CUDA graph, or None.
    """

    program: Program
    trained: list[nn.Parameter]
    obstacle: str | None


class _CapturedStep:
    """Replay the eager step up to its optimiser; capture it where its signature is new."""

    def __init__(self, pair: Pair, loss: Loss, optimizer: torch.optim.Optimizer, options: _Options) -> None:
        self.pair, self.loss, self.optimizer, self.options = pair, loss, optimizer, options
        self.eager_backward = eager_backward(pair, loss, options.num_particles)
        self.eager_step = updating_step(self.eager_backward, optimizer, options.clip_norm)
        self.optimised = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self.state = PairState(pair)
        floating = [p for p in self.state.parameters if p.is_floating_point()]
        like = floating[0] if floating else torch.empty(())
        self.beta = torch.ones((), dtype=like.dtype, device=like.device)
        self.watched: list[tuple[Callable[[Any], Any], Mapping[str, Any], list[str]]] | None = None
        self.sizes: list[int] = []
        self.found: dict[Signature, _Captured] = {}
        self.seen: Counter[Signature] = Counter()
        # The largest batch compiled so far: a short one may come first.
        self.largest = 0
        self.compiled = options.compiled
        # Why this pair trains by eager steps, and whether a warning has said so.
        self.refusal: CaptureError | None = None
        self.warned = False
        # Whether layers may still initialise themselves at their first batch.
        self.initialising = True

    def __call__(self, *batch: Tensor | Batch, beta: float = 1.0) -> float:
        tensors = unpacked(batch)
        captured = self._captured(tensors, beta)
        if captured is None:
            loss: Any = self.eager_step(*tensors, beta=beta)
            self._warn()
            return loss
        total, norm, *gradients = self._replay(captured, tensors, beta)
        loss, size = float(total), float(norm)
        if not math.isfinite(loss):
            raise NonFiniteLossError(f"the loss is {loss}")
        if not math.isfinite(size):
            raise NonFiniteLossError(f"the loss is {loss}, the norm of its gradient {size}")
        update(self.optimizer, captured.trained, gradients)
        return loss / len(tensors[0])

    def backward(self, *batch: Tensor, beta: float | Tensor = 1.0) -> Any:
        """Put the gradients of the batch's summed loss into ``p.grad``, and return that loss.

        A CUDA graph passes β as a tensor, and fills it before each replay.
        """
        captured = self._captured(batch, beta)
        if captured is None:
            loss = self.eager_backward(*batch, beta=beta)  # type: ignore[arg-type]
            self._warn()
            return loss
        total, _, *gradients = self._replay(captured, batch, beta)
        for parameter, gradient in zip(captured.trained, gradients, strict=True):
            parameter.grad = gradient
        return total

    def signature(self, batch: Layout, beta: float | Tensor) -> Signature:
        """Return the signature of a step on a batch of this layout."""
        weighted = isinstance(beta, Tensor) or beta != 1.0
        return Signature(batch, self._attributes(), tuple([p.requires_grad for p in self.state.parameters]), weighted)

    def has_program(self, signature: Signature) -> bool:
        """Tell whether steps of this signature are captured already."""
        return signature in self.found

    def obstacle(self, signature: Signature) -> str | None:
        """Return why the program of a signature cannot be part of a CUDA graph; None if it can."""
        return self.found[signature].obstacle

    def tensors(self) -> list[Tensor]:
        """Return the parameters, and the buffers as they are now."""
        return self.state.tensors()

    def _replay(self, captured: _Captured, batch: tuple[Tensor, ...], beta: float | Tensor) -> Any:
        return captured.program.replay(self.state.tensors(), self._inputs(batch, beta))

    def _inputs(self, batch: tuple[Tensor, ...], beta: float | Tensor) -> tuple[Tensor, ...]:
        """Return a program's inputs: the batch, and β unless it is 1."""
        if isinstance(beta, Tensor):
            return (*batch, beta)
        return batch if beta == 1.0 else (*batch, self.beta.fill_(beta))

    def _warn(self) -> None:
        """Warn, once, that steps are eager. The eager step has run by then: a mistake in the pair was raised there."""
        if self.refusal is not None and not self.warned:
            self.warned = True
            warn_caller(f"this pair trains by eager steps, which are slower: {self.refusal}")

    def _captured(self, batch: tuple[Tensor, ...], beta: float | Tensor) -> _Captured | None:
        """Return the program for a step, captured now if need be; None where the step is to be eager."""
        if self.refusal is not None:
            return None
        signature = self.signature(layout(batch), beta)
        if (found := self.found.get(signature)) is not None:
            return found
        try:
            return self._new(signature, batch, self._inputs(batch, beta))
        except CaptureError as reason:
            if self.options.strict:
                raise
            self.refusal = reason
            return None

    def _new(self, signature: Signature, batch: tuple[Tensor, ...], inputs: tuple[Tensor, ...]) -> _Captured | None:
        """Capture the steps of a signature; None where this one is to be eager."""
        self.seen[signature] += 1
        if len(self.found) >= MAX_PROGRAMS or len(self.seen) > MAX_SIGNATURES:
            raise CaptureError(f"{self._reason_for_many()}: each change needs a recording of its own")
        if self.seen[signature] <= self.options.after:
            return None
        compiled = self.compiled and len(batch[0]) >= self.largest
        keep_pages()
        try:
            captured = self._record(signature, inputs, len(batch[0]), exact=not compiled or not self.options.whole)
        except StateChangedError:
            if not self.initialising:
                raise
            # Layers that initialise themselves from their first batch, and ELBOs that count their plates, do it now.
            self.initialising, self.watched = False, None
            return None
        except CaptureError as error:
            raise CaptureError(f"{self._whose()} is not recorded: {error}") from error
        except RuntimeError as error:
            # torch's own, on tensors without values. An eager step shows whether the pair has a fault.
            reason = str(error).splitlines()[:1] or [type(error).__name__]
            raise CaptureError(f"{self._whose()} is not recorded: {reason[0]}") from error
        if compiled:
            self.largest = len(batch[0])
            captured = self._compiled(captured, inputs)
        self.found[signature] = captured
        return captured

    def _whose(self) -> str:
        return f"{name_of(self.loss)} of {type(self.pair).__name__}"

    def _compiled(self, captured: _Captured, inputs: tuple[Tensor, ...]) -> _Captured:
        given = [tensor.detach() for tensor in (*self.state.tensors(), *inputs)]
        graph = with_faster_products(captured.program.graph, given)
        run = compile_graph(graph, given, self.options.tell)
        # Without a compiler, further programs need not try.
        self.compiled = run is not None
        return replace(captured, program=replace(captured.program, graph=graph, run=run or graph.forward))

    def _attributes(self) -> tuple[Any, ...]:
        """Return the numbers, flags and names that the pair and the loss may read."""
        # A new name may hide a class's default; a deleted one may uncover it.
        if self.watched is None or self.sizes != [len(held) for _, held, _ in self.watched]:
            self.watched = plain_attributes(self.pair, self.loss)
            self.sizes = [len(held) for _, held, _ in self.watched]
        try:
            return tuple([get(held) for get, held, _ in self.watched])
        except KeyError:
            # One name came while another went.
            self.watched = None
            return self._attributes()

    def _record(self, signature: Signature, inputs: tuple[Tensor, ...], size: int, *, exact: bool) -> _Captured:
        """Capture the eager pass on a batch of ``size`` data; ``exact`` rounds as the eager step does."""
        parameters = self.state.parameters
        trained = [i for i, p in enumerate(parameters) if p.requires_grad and id(p) in self.optimised]
        with_gradient: list[nn.Parameter] = []

        def passes(*given: Any) -> Any:
            *batch, beta = given if signature.weighted else (*given, 1.0)
            return self.eager_backward(*batch, beta=beta)

        def outputs(taped: Taped) -> list[Tensor]:
            taken = {_storage(tensor) for tensor in taped.given}
            for i, leaf, gradient in zip(trained, taped.leaves, taped.gradients, strict=True):
                if gradient is not None:
                    with_gradient.append(parameters[i])
                    leaf.grad = _owned(gradient, leaf, taken)
            used = [leaf for leaf in taped.leaves if leaf.grad is not None]
            # Dividing passes over all gradients once more than scaling, but rounds as the eager step does.
            norm, gradients = _mean(used, size if exact else 1, self.options.clip_norm) if whole else _sum(used)
            return [torch.as_tensor(taped.value), norm, *gradients]

        whole, scale = self.options.whole, None if exact else 1 / size
        program = record(passes, self.state, inputs, watched=self.loss, trained=trained, scale=scale, outputs=outputs)
        return _Captured(program, with_gradient, waits_for_the_device(program.graph, self.beta.device))

    def _reason_for_many(self) -> str:
        """Say which fact changes so often that there are many signatures."""
        for i, (_, _, names) in enumerate(self.watched or []):
            for j, name in enumerate(names):
                if len({signature.attributes[i][j] for signature in self.seen}) > 1:
                    return f"attribute '{name}' takes many values (make it a buffer)"
        return f"the batches have {len({signature.batch for signature in self.seen})} shapes"


def _sum(leaves: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Return no norm, and the gradients as they are."""
    return torch.zeros(()), [leaf.grad for leaf in leaves if leaf.grad is not None]


def _mean(leaves: list[Tensor], size: int, clip_norm: float | None) -> tuple[Tensor, list[Tensor]]:
    """Return the norm of the mean gradient, and that gradient, clipped; the operations are those of the eager step."""
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
    """Return a gradient laid out like its parameter, in memory that nothing else shares: it is divided in place."""
    if gradient.stride() != leaf.stride() or _storage(gradient) in taken:
        gradient = torch.empty_like(leaf).copy_(gradient)
    taken.add(_storage(gradient))
    return gradient.detach()
