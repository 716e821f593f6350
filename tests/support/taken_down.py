"""A stand-in for CUDA graphs on the CPU, as strict as they are: operations are taken down with their very tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from pyro.infer import Trace_ELBO
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import pyro_vae as pv
from pyro_vae.capture import cuda_graph as cuda_graphs
from pyro_vae.training.captured_step import captured_step

READS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default}


class TakeDown(TorchDispatchMode):
    """Keep operations with the tensors that they read and wrote, and undo what they did to tensors from before."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.before: dict[int, tuple[Any, Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in READS:
            # As CUDA says it.
            raise RuntimeError(f"operation not permitted when stream is capturing ({func})")
        # All of them: what batch normalisation writes to, its schema does not say.
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in self.before:
                self.before[storage._cdata] = storage, storage.clone()
        result = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, result))
        return result

    def undo(self) -> None:
        for storage, value in self.before.values():
            storage.copy_(value)
        self.before.clear()

    def replay(self) -> None:
        for func, args, kwargs, results in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(results), tree_leaves(again), strict=True):
                # Views and tensors written to are there already.
                if isinstance(old, Tensor) and old.untyped_storage()._cdata != new.untyped_storage()._cdata:
                    old.copy_(new)


class StandIn:
    """Makes such graphs, and counts them, their replays and the steps taken aside."""

    def __init__(self, device: torch.device) -> None:
        self.graphs: list[TakeDown] = []
        self.replays = self.asides = 0

    @contextmanager
    def aside(self) -> Iterator[None]:
        self.asides += 1
        yield

    def captured(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Take down what ``work`` does; nothing of it has happened afterwards, draws included."""
        graph, state = TakeDown(), torch.get_rng_state()
        try:
            with graph:
                result = work()
        finally:
            graph.undo()
            torch.set_rng_state(state)
        self.graphs.append(graph)
        # A replay alone gives it a value.
        result.fill_(torch.nan)

        def replay() -> None:
            self.replays += 1
            with torch.no_grad():
                graph.replay()

        return replay, result


# A power of two is the same number in single precision, in which fused optimisers read it from the device.
RATE = 2.0**-7
fused_adam = partial(torch.optim.Adam, lr=RATE, fused=True)
sgd = partial(torch.optim.SGD, lr=RATE, momentum=0.5)


def taken(
    pair: pv.Pair,
    data: list[tuple[Tensor, ...]],
    make: Callable[..., torch.optim.Optimizer],
    device: Any = None,
    steps: int = 12,
    betas: tuple[float, ...] = (1.0,),
    between: Callable[[int, pv.Pair, torch.optim.Optimizer], object] = lambda i, pair, optimizer: None,
    **options: Any,
) -> tuple[list[Any], dict[str, Tensor], list[str], Any]:
    """Return the losses of some steps, the state they end in, the lines told, and the step."""
    pair, lines = copy.deepcopy(pair), list[str]()
    optimizer = make(pair.parameters())
    if device is not None:
        cuda_graphs.DEVICES["cpu"] = lambda _: device
    step = captured_step(pair, Trace_ELBO(), optimizer, tell=lines.append, **options)
    cuda_graphs.DEVICES.pop("cpu", None)
    torch.manual_seed(0)
    losses = []
    for i in range(steps):
        between(i, pair, optimizer)
        losses.append(step(*data[i % len(data)], beta=betas[i % len(betas)]))
    moments = {
        f"{i}.{name}": value
        for i, held in enumerate(optimizer.state.values())
        for name, value in held.items()
        if isinstance(value, Tensor)
    }
    state = {**pair.state_dict(), **moments, "generator": torch.get_rng_state()}
    assert all(p.grad is None for p in pair.parameters())
    return [float(loss) for loss in losses], state, lines, step


def assert_same(ours: Any, theirs: Any) -> None:
    """The same operations on the same numbers: bit for bit."""
    assert ours[0] == theirs[0]
    assert ours[1].keys() == theirs[1].keys()
    assert all(torch.equal(value, theirs[1][name]) for name, value in ours[1].items())


def assert_graphed_is_not(pair: pv.Pair, data: Any, make: Any, **options: Any) -> StandIn:
    device = StandIn(torch.device("cpu"))
    assert_same(taken(pair, data, make, device, **options), taken(pair, data, make, **options))
    return device
