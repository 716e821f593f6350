"""Compile a recorded graph, on its own: no tracing of Python, no guards at its calls."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

__all__ = ["compile_graph"]


def compile_graph(graph: GraphModule, inputs: list[Tensor]) -> Callable[..., Any] | None:
    """Return the graph compiled; None, with a warning, where that is not possible."""
    try:
        from torch._inductor import config, standalone_compile
        from torch._inductor.cpp_builder import get_cpp_compiler

        if all(tensor.device.type == "cpu" for tensor in inputs):
            get_cpp_compiler()
        # Random numbers come from torch's own generator, as in the eager step.
        with torch.no_grad(), config.patch(fallback_random=True):
            return standalone_compile(graph, [*inputs], dynamic_shapes="from_example_inputs")
    except Exception as error:
        reason = str(error).split("\n")[0].strip() or type(error).__name__
        warnings.warn(f"the recorded step is replayed uncompiled: {reason}", stacklevel=6)
        return None
