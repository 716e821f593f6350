"""Compile a captured program with torch's inductor, without tracing Python again and without guards at its calls."""

from __future__ import annotations

import copy
import logging
import operator
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import GraphModule, Node

from pyro_vae.runtime.caller import warn_caller

__all__ = ["compile_graph", "keep_pages"]

# Just below the largest block that glibc adapts to, 32 MiB, with room for its own and torch's alignment.
LARGEST_BLOCK = 31 * 2**20


def compile_graph(
    graph: GraphModule, inputs: list[Tensor], tell: Callable[[str], object] | None = None
) -> Callable[..., Any] | None:
    """Return the compiled graph; None, with a warning, if it cannot be compiled.

    Args:
        graph: aten operations of a program.
        inputs: example inputs.
        tell: is called with a line of text before and after compiling.
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
        # Noise comes from torch's generator, as in the eager step. Programs are chosen by shapes and strides, which
        # need no check at each call.
        options = {"fallback_random": True, "size_asserts": False, "alignment_asserts": False}
        # One C++ source for the whole graph: many sources would each include torch's headers. Not for Cholesky: its
        # errors would lose their type.
        raises = any(node.target is torch.ops.aten._linalg_check_errors.default for node in graph.graph.nodes)
        options["cpp_wrapper"] = on_cpu and not raises
        with torch.no_grad(), config.patch(options), _unsaid("c-shim"):
            run = standalone_compile(_compilable(graph), [*inputs], dynamic_shapes="from_example_inputs")
        if on_cpu:
            # A compiler that is content may still have made what cannot run here.
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                run(*map(_copied, inputs))
        cached = counters["inductor"]["fxgraph_cache_hit"] > before
        tell(f"compiled in {time.perf_counter() - start:.1f} s{', from the cache on disk' if cached else ''}")
        return run
    except Exception as error:
        reason = str(error).split("\n")[0].strip() or type(error).__name__
        warn_caller(f"the recorded step is replayed uncompiled: {reason}")
        return None


def _copied(tensor: Tensor) -> Tensor:
    """Return a copy of the same layout; the tensor itself if it has gaps or overlaps: data may, and are only read."""
    copied = tensor.clone()
    return copied if copied.stride() == tensor.stride() else tensor


@contextmanager
def _unsaid(words: str) -> Iterator[None]:
    """Hide log lines of the compiler's that contain these words."""
    logger = logging.getLogger("torch._inductor.ir")
    silence = lambda record: words not in record.getMessage()  # noqa: E731
    logger.addFilter(silence)
    try:
        yield
    finally:
        logger.removeFilter(silence)


def _compilable(graph: GraphModule) -> GraphModule:
    """Return a copy that the compiler accepts, and that draws the same noise when compiled.

    The compiler may choose other strides, and ``view`` fails on some. Tensors that are only read are therefore
    reshaped, which may copy. A tensor that is written through a view, or while a view exists, must stay in the same
    memory. The compiler would draw Bernoulli bits with other random numbers; drawn in place, they are left to torch.
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
    """Return the node that a node is a view of, or the node itself."""
    while _is_view(node):
        node = node.all_input_nodes[0]
    return node


def _only_read(node: Node) -> bool:
    """Tell whether no operation writes to the memory of a node, directly or through a view."""
    return not _may_write(node) and all(
        not _may_write(user) and (not _is_view(user) or _only_read(user)) for user in node.users
    )


def _may_write(node: Node) -> bool:
    if node.op != "call_function" or node.target is operator.getitem:
        return False
    # Operators that contain graphs are unknown: they may write.
    return not isinstance(node.target, OpOverload) or node.target._schema.is_mutable


def _is_view(node: Node) -> bool:
    # An item of several results may be a view of the operand.
    return node.target is operator.getitem or (isinstance(node.target, OpOverload) and node.target.is_view)


def keep_pages() -> None:
    """Let the C library reuse freed memory for the next step.

    By default glibc returns freed blocks above a threshold to the system. Each new block then causes page faults: a
    third of a step for wide networks. glibc raises the threshold to the size of the largest block freed so far. Freeing
    a large block that was never written costs nothing. Other C libraries ignore it.
    """
    torch.empty(LARGEST_BLOCK, dtype=torch.uint8)
