"""A whole training step as one CUDA graph: gather, forward and backward pass, mean, clipping and update.

The kernels of a small step take longer to launch than to run. A CUDA graph launches all of them at once. CUDA captures
the kernels of one step without running them. A CUDA graph then holds every Python number and every memory address of
that step. Values that change between steps are therefore copied into fixed tensors: the batch, or the row numbers of a
batch in data on the device; β; the learning rates. If anything else changes, e.g. the optimiser's state when a
checkpoint is loaded, the CUDA graph is captured again. Each replay draws new noise: torch advances its generator
outside CUDA graphs.

Reference:
    PyTorch, Accelerating PyTorch with CUDA graphs (2021), pytorch.org/blog/accelerating-pytorch-with-cuda-graphs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.fx import GraphModule

from pyro_vae.capture.fused_adam import around_the_step
from pyro_vae.capture.program import Layout, Signature, layout
from pyro_vae.runtime.batches import Batch, Rows, gathered, unpacked

__all__ = ["DEVICES", "WARM_UPS", "GraphedStep", "waits_for_the_device"]

# Steps of a signature that run kernel by kernel before its CUDA graph: they make the optimiser's state, choose
# algorithms and set up libraries. None of that may happen during a CUDA capture.
WARM_UPS = 2
# A CUDA graph takes about as long to make as some hundreds of steps.
MAX_GRAPHS = 64
# Optimisers that, if capturable, leave a learning rate on the device; others would read it back.
READ_THEIR_RATE = (torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam, torch.optim.Adamax)


class Device(Protocol):
    """A device that makes CUDA graphs."""

    def aside(self) -> AbstractContextManager[None]:
        """Run the code inside on the stream of CUDA captures."""

    def captured(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Capture the kernels of ``work`` without running them. Return (replay, output)."""


class CudaDevice:
    """Make CUDA graphs that share memory: one replays at a time, and its output is copied."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Run the code inside on the stream of CUDA captures, and set up its workspaces."""
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        try:
            with torch.cuda.stream(self.stream):
                yield
        finally:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)

    def captured(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Capture the kernels of ``work`` without running them. Return (replay, output)."""
        graph = torch.cuda.CUDAGraph()
        # Another thread may pin the memory of the next batch at the same time.
        mode: Any = {"pool": self.pool, "stream": self.stream, "capture_error_mode": "thread_local"}
        failure: Exception | None = None
        try:
            with torch.cuda.device(self.device), torch.cuda.graph(graph, **mode):
                try:
                    result = work()
                except Exception as error:
                    failure = error
                    raise
        except Exception as error:
            # A failed capture fails again when it ends, with a message that hides the reason.
            raise (failure or error) from None
        return graph.replay, result


# By type of device.
DEVICES: dict[str, Callable[[torch.device], Device]] = {"cuda": CudaDevice}


class CapturedPasses(Protocol):
    """Captured forward and backward passes, which CUDA graphs are made of; a program of each signature."""

    beta: Tensor

    def signature(self, batch: Layout, beta: float | Tensor) -> Signature:
        """Return the signature of a step on a batch of this layout."""

    def has_program(self, signature: Signature) -> bool:
        """Tell whether steps of this signature are captured already."""

    def obstacle(self, signature: Signature) -> str | None:
        """Return why the program of a signature cannot be part of a CUDA graph; None if it can."""

    def tensors(self) -> list[Tensor]:
        """Return the parameters and buffers, which outlive a step."""


class _Graph(NamedTuple):
    """A CUDA graph, its input tensors, its loss, and the numbers and addresses that it holds."""

    replay: Callable[[], None]
    inputs: tuple[Tensor, ...]
    loss: Tensor
    baked_in: list[Any]


class GraphedStep:
    """Take steps by replaying CUDA graphs.

    The first steps of a signature run kernel by kernel. So do all steps if no CUDA graph can be made; ``tell`` is then
    called with the reason.

    Args:
        passes: the captured passes that the step replays.
        step: the step. It may not synchronise, returns its loss as a tensor, and takes β as a number or as
            ``passes.beta``.
        optimizer: the step's optimiser.
        device: makes CUDA graphs.
        tell: is called with a line of text.
    """

    def __init__(
        self,
        passes: CapturedPasses,
        step: Callable[..., float | Tensor],
        optimizer: torch.optim.Optimizer,
        device: Device,
        tell: Callable[[str], object] | None = None,
    ) -> None:
        self.passes, self.step, self.optimizer, self.device = passes, step, optimizer, device
        self.tell = tell or (lambda line: None)
        self.graphs: dict[Hashable, _Graph] = {}
        self.warm: Counter[Hashable] = Counter()
        self.layouts: dict[tuple[int, int], tuple[tuple[Tensor, ...], Layout]] = {}
        self.rates: dict[int, _Rate] = {}
        self.made = 0
        self.told: set[str] = set()
        self.gave_up = False

    def __call__(self, *batch: Tensor | Batch, beta: float = 1.0) -> float | Tensor:
        if not isinstance(batch[0], Rows):
            tensors = unpacked(batch)
            return self._taken(tensors, None, layout(tensors), beta)
        data, rows = batch[0].data, batch[0].rows
        key = (id(data), len(rows))
        if key not in self.layouts:
            # Holding the data keeps their id from being used again.
            self.layouts[key] = data, layout(_batch((rows,), data))
        return self._taken((rows,), data, self.layouts[key][1], beta)

    def _taken(
        self, given: tuple[Tensor, ...], data: tuple[Tensor, ...] | None, shapes: Layout, beta: float
    ) -> float | Tensor:
        if self.gave_up:
            return self.step(*_batch(given, data), beta=beta)
        signature = self.passes.signature(shapes, beta)
        key = (signature, None if data is None else id(data))
        graph = self.graphs.get(key)
        if graph is None or graph.baked_in != self._baked_in():
            if not self.passes.has_program(signature):
                return self.step(*_batch(given, data), beta=beta)
            if (obstacle := self.passes.obstacle(signature)) is not None:
                self._tell(obstacle)
                return self.step(*_batch(given, data), beta=beta)
            graph = self._next(key, given, data, beta)
        if graph is None:
            if self.gave_up:
                return self.step(*_batch(given, data), beta=beta)
            with self.device.aside(), self._on_device():
                return self.step(*_batch(given, data), beta=beta)
        for held, new in zip(graph.inputs, given, strict=True):
            held.copy_(new)
        if beta != 1.0:
            self.passes.beta.fill_(beta)
        self._fill_rates()
        graph.replay()
        # A copy: the next replay overwrites the loss.
        return graph.loss.clone()

    def _next(
        self, key: Hashable, given: tuple[Tensor, ...], data: tuple[Tensor, ...] | None, beta: float
    ) -> _Graph | None:
        """Return a new CUDA graph; None if this step is to run kernel by kernel."""
        if self.graphs.pop(key, None) is not None:
            # New state, e.g. of the optimiser, may first be made by the next step.
            self.warm[key] = 0
        if (obstacle := _obstacle(self.optimizer)) is not None:
            self._give_up(obstacle)
            return None
        self.warm[key] += 1
        if self.warm[key] <= WARM_UPS:
            return None
        if self.made == MAX_GRAPHS:
            self._give_up(
                f"{MAX_GRAPHS} graphs were made, since the shapes, {type(self.optimizer).__name__}'s numbers or the "
                "places of tensors keep changing (the learning rate of a fused optimiser may change)"
            )
            return None
        self.made += 1
        baked_in, state = self._baked_in(), {p: dict(held) for p, held in self.optimizer.state.items()}
        inputs: tuple[Tensor, ...] = ()

        def work() -> Tensor:
            loss = self.step(*_batch(inputs, data), beta=1.0 if beta == 1.0 else self.passes.beta)
            assert isinstance(loss, Tensor)
            return loss

        try:
            inputs = tuple([_held(tensor) for tensor in given])
            with self._on_device():
                replay, loss = self.device.captured(work)
            if self._baked_in() == baked_in:
                self.graphs[key] = graph = _Graph(replay, inputs, loss, baked_in)
                return graph
            reason = f"{type(self.optimizer).__name__} puts new values in the place of old ones at each step"
        except Exception as error:
            reason = str(error).split("\n")[0].strip() or type(error).__name__
        # No kernel has run: gradients and state that Python has set hold no values.
        self.optimizer.zero_grad()
        for parameter, held in self.optimizer.state.items():
            held.clear()
            held.update(state.get(parameter, {}))
        self._give_up(reason)
        return None

    def _baked_in(self) -> list[Any]:
        """Return the memory addresses and the optimiser's numbers that a CUDA graph holds."""
        values = [*self.passes.tensors(), *(v for held in self.optimizer.state.values() for v in held.values())]
        for group in self.optimizer.param_groups:
            read_from_device = ("params", "lr") if _keeps_its_rate(self.optimizer, group) else ("params",)
            values += [value for name, value in group.items() if name not in read_from_device]
        values.append(around_the_step(self.optimizer))
        return [value.data_ptr() if isinstance(value, Tensor) else value for value in values]

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        """Let the optimiser read its learning rates from the device, where replays find current ones."""
        self._fill_rates()
        groups = self.optimizer.param_groups
        before = [dict(group) for group in groups]
        try:
            for i, group in enumerate(groups):
                if _keeps_its_rate(self.optimizer, group):
                    group["lr"] = self.rates[i].tensor
                if "capturable" in group:
                    # A fused optimiser is capturable, with or without the flag.
                    group["capturable"] = True
            yield
        finally:
            for group, old in zip(groups, before, strict=True):
                group.update({name: old[name] for name in ("lr", "capturable") if name in old})

    def _fill_rates(self) -> None:
        for i, group in enumerate(self.optimizer.param_groups):
            if _keeps_its_rate(self.optimizer, group):
                if i not in self.rates:
                    self.rates[i] = _Rate(group)
                self.rates[i].fill(float(group["lr"]))

    def _give_up(self, reason: str) -> None:
        self.gave_up = True
        self.graphs.clear()
        self._tell(reason)

    def _tell(self, reason: str) -> None:
        if reason not in self.told:
            self.told.add(reason)
            self.tell(f"steps are launched kernel by kernel, not as one CUDA graph: {reason}")


class _Rate:
    """A learning rate on the device, written when it changes."""

    def __init__(self, group: dict[str, Any]) -> None:
        parameter = group["params"][0]
        # Fused optimisers read it in single precision.
        dtype = torch.float32 if group.get("fused") else parameter.dtype
        self.tensor = torch.empty((), dtype=dtype, device=parameter.device)
        self.value: float | None = None

    def fill(self, value: float) -> None:
        if value != self.value:
            self.tensor.fill_(value)
            self.value = value


def _keeps_its_rate(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> bool:
    """Tell whether the optimiser can read this group's learning rate from the device."""
    if isinstance(group["lr"], Tensor) and group["lr"].device == group["params"][0].device:
        return False
    return bool(group.get("fused") or (group.get("capturable") and isinstance(optimizer, READ_THEIR_RATE)))


def _held(tensor: Tensor) -> Tensor:
    """Return a copy with the same strides, which are part of a signature."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def _batch(given: tuple[Tensor, ...], data: tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
    """Return the given batch, or the rows of the data with the given numbers."""
    return given if data is None else tuple(gathered(tensor, given[0]) for tensor in data)


def _obstacle(optimizer: torch.optim.Optimizer) -> str | None:
    """Return why an optimiser's step cannot be part of a CUDA graph; None if it can."""
    name = type(optimizer).__name__
    if (around := around_the_step(optimizer)) is not None:
        return f"{name} has {around}, which a graph would not call"
    for group in optimizer.param_groups:
        if "capturable" not in group and type(optimizer) is not torch.optim.SGD:
            return f"{name} is not known to be capturable, as torch.optim.Adam(…, fused=True) is"
        if not group.get("capturable", True) and not group.get("fused"):
            return f"{name} counts its steps on the CPU: make it with fused=True or capturable=True"
    return None


# Operations that read a value, or whose result has a size that depends on values.
_READS = {"nonzero", "masked_select", "_local_scalar_dense", "unique_dim", "_unique2", "unique_consecutive"}
_READS |= {"bincount", "repeat_interleave", "_linalg_check_errors"}


def waits_for_the_device(graph: GraphModule, device: torch.device) -> str | None:
    """Return the reason why a program cannot be part of a CUDA graph, or None.

    Such a program has an operation that synchronises, or one on the CPU, which replays would not repeat.

    Args:
        graph: aten operations of a program.
        device: the device of its inputs.

    >>> from torch.fx.experimental.proxy_tensor import make_fx
    >>> waits_for_the_device(make_fx(lambda x: x.nonzero())(torch.ones(2)), torch.device("cpu"))
    'the program asks for values that the device has yet to compute (aten.nonzero.default)'
    """
    by_cpu: set[torch.fx.Node] = set()
    for node in graph.graph.nodes:
        value = node.meta.get("val")
        on_cpu = isinstance(value, Tensor) and value.device != device
        if node.op == "placeholder" and on_cpu:
            by_cpu.add(node)
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        name, inputs = node.target.overloadpacket.__name__, [each.meta.get("val") for each in node.all_input_nodes]
        places = {each.device for each in (*inputs, value) if isinstance(each, Tensor)}
        if name in _READS or _indexes_by_mask(name, node.args):
            return f"the program asks for values that the device has yet to compute ({node.target})"
        if name in ("_to_copy", "copy", "copy_") and len(places) > 1:
            return f"the program copies between devices ({node.target}): make the tensor on the batch's device"
        # A constant on the CPU is the same at every replay.
        if (on_cpu and torch.Tag.nondeterministic_seeded in node.target.tags) or by_cpu & {*node.all_input_nodes}:
            return f"the program computes on the CPU ({node.target}): make the tensor on the batch's device"
    return None


def _indexes_by_mask(name: str, arguments: tuple[Any, ...]) -> bool:
    if name not in ("index", "index_put", "index_put_", "_unsafe_index", "_unsafe_index_put"):
        return False
    # Filling in one number does not need the number of true entries.
    value = arguments[2].meta["val"] if len(arguments) > 2 else None
    fills = value is not None and value.numel() == 1 and value.device.type == "cpu"
    masks = [i for i in arguments[1] if i is not None and i.meta["val"].dtype in (torch.bool, torch.uint8)]
    return bool(masks) and not fills
