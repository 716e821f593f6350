"""Matrix products on a CPU through oneDNN, where a recorded graph is faster so.

torch's own products go to MKL, which on some processors leaves their widest vector instructions unused; oneDNN does
not. Which is faster depends on processor, sizes and threads, so the whole graph is timed both ways.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

__all__ = ["through_onednn", "with_faster_products"]

# Timings of each way, of which the least counts: interruptions by other processes only ever add to one.
TIMINGS = 8
# Of two ways that are about as fast, torch's own is kept, so that the choice does not change from run to run.
LEAST_GAIN = 0.05
# Products of fewer multiplications than this are over before oneDNN has looked its kernel up, which takes about 15 µs.
FEWEST_MULTIPLICATIONS = 3_000_000
# As an operation of its own the product passes through torch.compile, which would take oneDNN's own for inference's.
_LIBRARY = torch.library.Library("pyro_vae", "DEF")
_LIBRARY.define("product(Tensor left, Tensor right, Tensor? bias) -> Tensor")


def _product(left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(left, right.t(), bias, "none", [], None)


def _shape_of_product(left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    return left.new_empty(left.shape[0], right.shape[1])


_LIBRARY.impl("product", _product, "CPU")
_LIBRARY.impl("product", _shape_of_product, "Meta")


def with_faster_products(graph: GraphModule, inputs: Sequence[Tensor]) -> GraphModule:
    """Return the graph as it is or with its products through oneDNN, whichever runs faster on these inputs.

    Args:
        graph: a recorded graph of aten operations.
        inputs: what it takes; they and the random state are left as they are.

    Returns:
        The graph itself, or a copy that is equal up to rounding.
    """
    other = through_onednn(graph)
    if other is None:
        return graph
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        # The graph may write to its inputs.
        own = [tensor.clone() for tensor in inputs]
        seconds: dict[GraphModule, list[float]] = {graph: [], other: []}
        for _ in range(TIMINGS):
            for each, taken in seconds.items():
                start = time.perf_counter()
                each(*own)
                taken.append(time.perf_counter() - start)
    return other if min(seconds[other]) < (1 - LEAST_GAIN) * min(seconds[graph]) else graph


def through_onednn(graph: GraphModule) -> GraphModule | None:
    """Return a copy of the graph with large float32 and bfloat16 products through oneDNN; None where it has none."""
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
                # Copied in the graph, where a compiler can join the copy with what computes the operand.
                value = left.meta["val"]
                left = nodes.call_function(aten.clone.default, (left,), {"memory_format": torch.contiguous_format})
                left.meta["val"] = value.new_empty(value.shape)
            new = nodes.call_function(torch.ops.pyro_vae.product.default, (left, right, bias[0] if bias else None))
        new.meta = node.meta
        node.replace_all_uses_with(new)
        nodes.erase_node(node)
    graph.recompile()
    return graph if found else None


def _taken_by_onednn(node: torch.fx.Node) -> bool:
    arguments: Any = node.args
    *bias, left, _ = arguments
    value = node.meta["val"]
    plain = value.device.type == "cpu" and value.dtype in (torch.float32, torch.bfloat16)
    large = value.numel() * left.meta["val"].shape[1] >= FEWEST_MULTIPLICATIONS
    return plain and large and all(each.meta["val"].dim() == 1 for each in bias)
