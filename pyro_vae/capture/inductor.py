"""Compile a recorded graph, on its own: no tracing of Python, no guards at its calls."""

from __future__ import annotations

import copy
import logging
import operator
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import GraphModule, Node

__all__ = ["compile_graph", "keep_pages"]

# Just below the largest block that glibc adapts to, 32 MiB, with room for its own and torch's alignment.
LARGEST_BLOCK = 31 * 2**20


def compile_graph(
    graph: GraphModule, inputs: list[Tensor], tell: Callable[[str], object] | None = None
) -> Callable[..., Any] | None:
    """Return the graph compiled; None, with a warning, where that is not possible.

    Args:
        graph: a recorded graph of aten operations.
        inputs: what it takes.
        tell: is called with a line of text before and after.
    """
    tell = tell or (lambda line: None)
    start = time.perf_counter()
    try:
        from torch._dynamo.utils import counters
        from torch._inductor import config, standalone_compile
        from torch._inductor.cpp_builder import get_cpp_compiler

        on_cpu = all(tensor.device.type == "cpu" for tensor in inputs)
        if on_cpu:
            get_cpp_compiler()
        tell(f"compiling a recorded step of {len(graph.graph.nodes)} operations")
        before = counters["inductor"]["fxgraph_cache_hit"]
        # Random numbers come from torch's own generator, as in the eager step; shapes and strides are part of what a
        # recording is chosen by, so that they need no check at each call.
        options = {"fallback_random": True, "size_asserts": False, "alignment_asserts": False}
        # One C++ source for the whole graph: of many, one for each kernel, each would read torch's headers anew. It
        # would lose the kind of error that a matrix without a decomposition raises.
        raises = any(node.target is torch.ops.aten._linalg_check_errors.default for node in graph.graph.nodes)
        options["cpp_wrapper"] = on_cpu and not raises
        with torch.no_grad(), config.patch(options), _unsaid("c-shim"):
            run = standalone_compile(_compilable(graph), [*inputs], dynamic_shapes="from_example_inputs")
        cached = counters["inductor"]["fxgraph_cache_hit"] > before
        tell(f"compiled in {time.perf_counter() - start:.1f} s{', from the cache on disk' if cached else ''}")
        return run
    except Exception as error:
        reason = str(error).split("\n")[0].strip() or type(error).__name__
        warnings.warn(f"the recorded step is replayed uncompiled: {reason}", stacklevel=6)
        return None


@contextmanager
def _unsaid(words: str) -> Iterator[None]:
    """Keep what the compiler logs of these words, how it calls an operation, from the user's terminal."""
    logger = logging.getLogger("torch._inductor.ir")
    silence = lambda record: words not in record.getMessage()  # noqa: E731
    logger.addFilter(silence)
    try:
        yield
    finally:
        logger.removeFilter(silence)


def _compilable(graph: GraphModule) -> GraphModule:
    """Return a copy that the compiler takes, and for which it draws the same noise.

    It may lay tensors out otherwise than they were recorded, and not every layout has a view: what is only read is
    reshaped instead, which may copy. What is written to through a view, or while there is one, must stay the same
    memory. Bits of given probabilities it would draw in a way of its own; filled in place they are left to torch.
    """
    aten, graph = torch.ops.aten, copy.deepcopy(graph)
    for node in graph.graph.nodes:
        if node.target is aten.view.default and _only_read(_origin(node)):
            node.target = aten.reshape.default
        elif node.target is aten.bernoulli.default and not node.kwargs:
            value = node.meta["val"]
            with graph.graph.inserting_before(node):
                like = {"dtype": value.dtype, "device": value.device}
                empty = graph.graph.call_function(aten.empty_strided.default, (value.shape, value.stride()), like)
            node.target, node.args = aten.bernoulli_.Tensor, (empty, *node.args)
    graph.recompile()
    return graph


def _origin(node: Node) -> Node:
    """Return the node whose memory a node is a view of; itself where it is none."""
    while _is_view(node):
        node = node.all_input_nodes[0]
    return node


def _only_read(node: Node) -> bool:
    """Tell whether no operation writes to the memory of a node, by itself or by a view of it."""
    # What an operation wrote to it returns, beside the views that there were before.
    return not _may_write(node) and all(
        not _may_write(user) and (not _is_view(user) or _only_read(user)) for user in node.users
    )


def _may_write(node: Node) -> bool:
    if node.op != "call_function" or node.target is operator.getitem:
        return False
    # Of operators that hold graphs of their own nothing is known.
    return not isinstance(node.target, OpOverload) or node.target._schema.is_mutable


def _is_view(node: Node) -> bool:
    # One of several results may be a view of what they were taken from.
    return node.target is operator.getitem or (isinstance(node.target, OpOverload) and node.target.is_view)


def keep_pages() -> None:
    """Let the C library keep the memory that a step frees for the next step.

    By default glibc returns freed blocks above a threshold to the system, which clears their pages and hands them back
    one fault at a time: for wide networks a third of a step. It raises the threshold by itself, to the size of the
    largest block freed so far; so one is freed that was never touched and cost nothing. Other libraries ignore it.
    """
    torch.empty(LARGEST_BLOCK, dtype=torch.uint8)
