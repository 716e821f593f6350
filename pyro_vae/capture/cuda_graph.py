"""A whole training step as one CUDA graph: gather, recorded pass, mean, clipping and the optimiser's update.

The kernels of a small step take longer to launch than to run; a graph launches them all at once. It is made by running
the step once while the device takes down its kernels instead of running them, and has then baked in every number of
Python's and every tensor's place in memory. What changes from step to step is therefore copied into tensors of the
graph's own: the batch, or the row numbers of a batch in data on the device; β; the learning rates. Where something else
has changed, the optimiser's state after a checkpoint was loaded, say, the graph is made anew. Draws differ between
replays, since torch keeps its generator's place outside a graph.

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

# Steps of a kind that are launched kernel by kernel before it becomes a graph: they make the optimiser's state, choose
# algorithms and set up libraries, none of which may happen while a graph is made.
WARM_UPS = 2
# A graph takes about as long to make as some hundreds of steps.
MAX_GRAPHS = 64
# Optimisers that read a learning rate on the device from there, if they are capturable; others would fetch it.
READ_THEIR_RATE = (torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam, torch.optim.Adamax)


class Device(Protocol):
    """What makes graphs."""

    def aside(self) -> AbstractContextManager[None]:
        """Run what is inside where graphs are made."""

    def captured(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Take down what ``work`` would do, without doing it; return what does it, and where its result will be."""


class CudaDevice:
    """Makes CUDA graphs, which share their memory: one replays at a time, and what it computes is copied out of it."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Run what is inside on the stream that graphs are made on, whose workspaces it sets up."""
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        try:
            with torch.cuda.stream(self.stream):
                yield
        finally:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)

    def captured(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Make a graph of the kernels that ``work`` launches."""
        graph = torch.cuda.CUDAGraph()
        # Another thread may pin the memory of the next batch meanwhile.
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
            # Ending a capture that has failed fails too, in words that do not say why.
            raise (failure or error) from None
        return graph.replay, result


# By the type of device.
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
    """A graph, what is copied into it, its loss, and what it has baked in."""

    replay: Callable[[], None]
    inputs: tuple[Tensor, ...]
    loss: Tensor
    baked_in: list[Any]


class GraphedStep:
    """Take steps by replaying graphs of a step that does not read from the device.

    The first steps of a kind are launched kernel by kernel, and so are all of them where no graph can be made; that is
    told in one line.

    Args:
        passes: the captured passes that the step replays.
        step: the step, which returns its loss as a tensor and takes β as a number or as ``passes.beta``.
        optimizer: the step's optimiser.
        device: makes graphs.
        tell: is called with that line.
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
        # The next replay overwrites it.
        return graph.loss.clone()

    def _next(
        self, key: Hashable, given: tuple[Tensor, ...], data: tuple[Tensor, ...] | None, beta: float
    ) -> _Graph | None:
        """Return a new graph; None where this step is to be launched kernel by kernel."""
        if self.graphs.pop(key, None) is not None:
            # What was replaced may be made at the next step only, such as an optimiser's state.
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
        # No kernel has run: what Python has set meanwhile holds nothing.
        self.optimizer.zero_grad()
        for parameter, held in self.optimizer.state.items():
            held.clear()
            held.update(state.get(parameter, {}))
        self._give_up(reason)
        return None

    def _baked_in(self) -> list[Any]:
        """Return where the tensors lie that graphs read and write, and the optimiser's numbers."""
        values = [*self.passes.tensors(), *(v for held in self.optimizer.state.values() for v in held.values())]
        for group in self.optimizer.param_groups:
            read_from_device = ("params", "lr") if _keeps_its_rate(self.optimizer, group) else ("params",)
            values += [value for name, value in group.items() if name not in read_from_device]
        values.append(around_the_step(self.optimizer))
        return [value.data_ptr() if isinstance(value, Tensor) else value for value in values]

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        """Have the optimiser read its learning rates from the device, where replays find the current ones."""
        self._fill_rates()
        groups = self.optimizer.param_groups
        before = [dict(group) for group in groups]
        try:
            for i, group in enumerate(groups):
                if _keeps_its_rate(self.optimizer, group):
                    group["lr"] = self.rates[i].tensor
                if "capturable" in group:
                    # A fused optimiser is, whether it was told so or not.
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
    """A learning rate on the device, written where it has changed."""

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
    """Tell whether a group's learning rate, a number, can be read from the device instead."""
    if isinstance(group["lr"], Tensor) and group["lr"].device == group["params"][0].device:
        return False
    return bool(group.get("fused") or (group.get("capturable") and isinstance(optimizer, READ_THEIR_RATE)))


def _held(tensor: Tensor) -> Tensor:
    """Return a copy laid out alike: recordings are chosen by strides."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def _batch(given: tuple[Tensor, ...], data: tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
    """Return the batch that was given, or the rows of the data whose numbers were."""
    return given if data is None else tuple(gathered(tensor, given[0]) for tensor in data)


def _obstacle(optimizer: torch.optim.Optimizer) -> str | None:
    """Return why an optimiser's step cannot be part of a graph; None where it can."""
    name = type(optimizer).__name__
    if (around := around_the_step(optimizer)) is not None:
        return f"{name} has {around}, which a graph would not call"
    for group in optimizer.param_groups:
        if "capturable" not in group and type(optimizer) is not torch.optim.SGD:
            return f"{name} is not known to be capturable, as torch.optim.Adam(…, fused=True) is"
        if not group.get("capturable", True) and not group.get("fused"):
            return f"{name} counts its steps on the CPU: make it with fused=True or capturable=True"
    return None


# Operations whose result has a size that depends on values, or that look at one.
_READS = {"nonzero", "masked_select", "_local_scalar_dense", "unique_dim", "_unique2", "unique_consecutive"}
_READS |= {"bincount", "repeat_interleave", "_linalg_check_errors"}


def waits_for_the_device(graph: GraphModule, device: torch.device) -> str | None:
    """Return what keeps a recorded graph from being part of a CUDA graph, or None.

    That is an operation that waits for the device, and one that is done by the CPU, which replays would not repeat.

    Args:
        graph: a recorded graph of aten operations.
        device: that its inputs are on.

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
        # A number that the CPU made once, a constant, is the same at every replay.
        if (on_cpu and torch.Tag.nondeterministic_seeded in node.target.tags) or by_cpu & {*node.all_input_nodes}:
            return f"the program computes on the CPU ({node.target}): make the tensor on the batch's device"
    return None


def _indexes_by_mask(name: str, arguments: tuple[Any, ...]) -> bool:
    if name not in ("index", "index_put", "index_put_", "_unsafe_index", "_unsafe_index_put"):
        return False
    # One number in all places that are true is filled in without asking how many they are.
    value = arguments[2].meta["val"] if len(arguments) > 2 else None
    fills = value is not None and value.numel() == 1 and value.device.type == "cpu"
    masks = [i for i in arguments[1] if i is not None and i.meta["val"].dtype in (torch.bool, torch.uint8)]
    return bool(masks) and not fills
