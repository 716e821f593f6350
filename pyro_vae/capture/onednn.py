"""Matmuls on a CPU by oneDNN, where that makes a captured program faster.

torch computes matmuls by MKL, which leaves the widest vector instructions of some processors unused; oneDNN uses them.
The faster library depends on processor, sizes and threads. The whole program is therefore timed with both.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import GraphModule

from pyro_vae.runtime.caller import warn_caller

__all__ = ["matmul_operator", "through_onednn", "with_faster_products"]

# Timings of each way. The least counts: other processes only ever add time.
TIMINGS = 8
# A smaller gain leaves the matmuls to torch: the choice should not change from run to run.
LEAST_GAIN = 0.05
# Matmuls of fewer multiplications take less time than oneDNN needs to look up its kernel, about 15 µs.
FEWEST_MULTIPLICATIONS = 3_000_000
_REGISTERED: list[torch.library.Library] = []


def with_faster_products(graph: GraphModule, inputs: Sequence[Tensor]) -> GraphModule:
    """Return the graph, or a copy with its matmuls by oneDNN if that runs faster on these inputs.

    Args:
        graph: aten operations of a program.
        inputs: example inputs; neither they nor the random state change.

    Returns:
        The graph itself, or a copy whose results are equal up to rounding.
    """
    other = through_onednn(graph)
    if other is None:
        return graph
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        # The graph may write to its inputs.
        own = [tensor.clone() for tensor in inputs]
        seconds: dict[GraphModule, list[float]] = {graph: [], other: []}
        try:
            for _ in range(TIMINGS):
                for each, taken in seconds.items():
                    start = time.perf_counter()
                    each(*own)
                    taken.append(time.perf_counter() - start)
        except RuntimeError as error:
            # What a library cannot do on some processor must not end a run.
            warn_caller(f"matmuls are left to torch, oneDNN refused them: {str(error).splitlines()[0]}")
            return graph
    return other if min(seconds[other]) < (1 - LEAST_GAIN) * min(seconds[graph]) else graph


def through_onednn(graph: GraphModule) -> GraphModule | None:
    """Return a copy of the graph with its large float32 and bfloat16 matmuls by oneDNN; None if it has none."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return None
    graph = copy.deepcopy(graph)
    aten, nodes = torch.ops.aten, graph.graph
    found = [node for node in nodes.nodes if node.target in (aten.mm.default, aten.addmm.default) and not node.kwargs]
    found = [node for node in found if _taken_by_onednn(node)]
    for node in found:
        arguments: Any = node.args
        *bias, left, right = arguments
        with nodes.inserting_before(node):
            if not left.meta["val"].is_contiguous():
                # A copy inside the graph: a compiler can fuse it with the operations before it.
                value = left.meta["val"]
                left = nodes.call_function(aten.clone.default, (left,), {"memory_format": torch.contiguous_format})
                left.meta["val"] = value.new_empty(value.shape)
            new = nodes.call_function(matmul_operator(), (left, right, bias[0] if bias else None))
        new.meta = node.meta
        node.replace_all_uses_with(new)
        nodes.erase_node(node)
    graph.recompile()
    return graph if found else None


@cache
def matmul_operator() -> OpOverload:
    """Return oneDNN's matmul as an operator of torch's, registered at the first call.

    ``torch.compile`` passes an unknown operator through. It would take oneDNN's own operator for one of inference.
    """
    library = torch.library.Library("pyro_vae", "DEF")
    library.define("matmul(Tensor left, Tensor right, Tensor? bias) -> Tensor")
    library.impl("matmul", _matmul, "CPU")
    library.impl("matmul", _empty_result, "Meta")
    # Its operators live as long as the library.
    _REGISTERED.append(library)
    return torch.ops.pyro_vae.matmul.default


def _matmul(left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(left, right.t(), bias, "none", [], None)


def _empty_result(left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    return left.new_empty(left.shape[0], right.shape[1])


@cache
def _dtypes() -> tuple[torch.dtype, ...]:
    """Return the dtypes of oneDNN's matmuls; without AVX-512 it has none in bfloat16, and raises."""
    narrow = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)()
    return (torch.float32, torch.bfloat16) if narrow else (torch.float32,)


def _taken_by_onednn(node: torch.fx.Node) -> bool:
    arguments: Any = node.args
    *bias, left, _ = arguments
    value = node.meta["val"]
    plain = value.device.type == "cpu" and value.dtype in _dtypes()
    large = value.numel() * left.meta["val"].shape[1] >= FEWEST_MULTIPLICATIONS
    return plain and large and all(each.meta["val"].dim() == 1 for each in bias)
