"""Log-weights of blocks from a recording of the pair's programs, one for each size of block.

An estimate runs one small program many times: the same networks and densities on blocks of one shape. A recording draws
the same noise as Pyro's eager pass without Pyro's handlers, and gives the same bits. Compiled, it also joins
element-wise operations, and gives the same numbers up to rounding.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from pyro_vae.capture.inductor import compile_graph
from pyro_vae.capture.onednn import through_onednn, with_faster_products
from pyro_vae.capture.program import Capture, Layout, Program, layout, record
from pyro_vae.capture.python_state import PairState
from pyro_vae.capture.tracer import CaptureError
from pyro_vae.likelihood.blocks import Blocks
from pyro_vae.pair.pair import Pair
from pyro_vae.runtime.caller import warn_caller
from pyro_vae.runtime.memory import CPU_WORKING_SET

__all__ = ["Calls", "LogWeights", "captured_blocks"]

# Log-weights (k, 1) of one datum and k draws.
LogWeights: TypeAlias = Callable[[tuple[Tensor, ...], int], Tensor]
# "auto" records once this many blocks of a size are to come. Each spends 1 to 3 ms in Pyro's handlers. The first
# recording of a process takes 1 to 3 s, mostly imports, a later one 0.2 s.
BLOCKS_BEFORE_RECORDING = 1000
# It compiles once the blocks' tensors hold this much. They take half a minute or more, compiling 5 to 15 s. No time is
# measured: a seeded estimate must repeat exactly.
BYTES_BEFORE_COMPILING = 2000 * CPU_WORKING_SET
# Whether oneDNN's matmuls were faster, by shapes and threads: timed once, so that an estimate repeats exactly.
_FASTER: dict[Any, bool] = {}


class Calls:
    """Calls of functions that run a pair's programs, replayed from recordings where these pay, and else eager.

    There is one recording for each function and layout of arguments. A replay gives the same bits.

    Args:
        pair: the pair, in evaluation mode.
        capture: True always records, or raises; False never; "auto" does where there are many calls.
        to_come: calls to come.

    >>> import pyro_vae as pv
    >>> pair = pv.models.LinearGaussianVAE(3, 1)
    >>> Calls(pair, False, 0)(lambda x: (x @ pair.weight,), torch.zeros(2, 3))[0].shape
    torch.Size([2, 1])
    """

    def __init__(self, pair: Pair, capture: Capture, to_come: int) -> None:
        self.state, self.capture = PairState(pair), capture
        self.records = capture is True or (capture == "auto" and to_come >= BLOCKS_BEFORE_RECORDING)
        # None for a function that cannot be recorded.
        self._programs: dict[tuple[Any, Layout], Program | None] = {}

    def __call__(self, function: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return what a function of the tensors, the pair's state and torch's random state returns.

        Raises:
            CaptureError: for ``capture=True`` and a function that cannot be recorded. "auto" warns and is eager.
        """
        if not self.records:
            return function(*tensors)
        key = (function, layout(tensors))
        if key not in self._programs:
            try:
                self._programs[key] = _recorded(self.state, function, tensors)
            except CaptureError as reason:
                if self.capture is True:
                    raise
                self._programs[key] = None
                warn_caller(f"log-likelihoods come from Pyro's eager pass, which is slower: {reason}")
        program = self._programs[key]
        if program is None:
            return function(*tensors)
        with torch.inference_mode(False):
            return tuple(program.replay(self.state.tensors(), tensors))


def captured_blocks(pair: Pair, log_weights: LogWeights, blocks: Blocks, num_data: int, capture: Capture) -> LogWeights:
    """Return a function that gives the log-weights of blocks from recordings where these pay, and else eagerly.

    Args:
        pair: the pair, in evaluation mode.
        log_weights: the eager computation, from (datum, k) to (k, 1), a function of the datum's values, the pair's
            parameters and buffers, and torch's random state.
        blocks: the blocks of each datum.
        num_data: data to come.
        capture: True always records and compiles, False never; "auto" does each where there is enough to compute.

    Returns:
        A function with the signature of ``log_weights``. It gives the same bits from an uncompiled recording, the same
        numbers up to rounding from a compiled one.

    Raises:
        CaptureError: from that function, for ``capture=True`` and a program that cannot be recorded. "auto" warns and
            is eager.
    """
    state = PairState(pair)
    programs: dict[int, Program | None] = {}
    counts = Counter(blocks.sizes)

    def program_for(datum: tuple[Tensor, ...], size: int) -> Program | None:
        to_come = counts[size] * num_data
        compiled = capture is True or to_come * blocks.nbytes * size // blocks.size >= BYTES_BEFORE_COMPILING
        if capture is False or (capture == "auto" and to_come < BLOCKS_BEFORE_RECORDING and not compiled):
            return None
        try:
            return _recorded(state, lambda *values: (log_weights(values, size),), datum, log_weights, compiled=compiled)
        except CaptureError as reason:
            if capture is True:
                raise
            warn_caller(f"log-weights come from Pyro's eager pass, which is slower: {reason}")
            # The other sizes would fail alike.
            programs.update(dict.fromkeys(counts))
            return None

    def captured(datum: tuple[Tensor, ...], size: int) -> Tensor:
        if size not in programs:
            programs[size] = program_for(datum, size)
        if (program := programs[size]) is None:
            return log_weights(datum, size)
        with torch.inference_mode(False):
            (result,) = program.replay(state.tensors(), datum)
        return result

    return captured


def _recorded(
    state: PairState,
    function: Callable[..., tuple[Tensor, ...]],
    tensors: Sequence[Tensor],
    watched: Callable[..., Any] | None = None,
    *,
    compiled: bool = False,
) -> Program:
    """Record a function of tensors; compile the recording if asked."""
    # Tensors made in inference mode cannot be captured; nothing here needs gradients of parameters.
    with torch.inference_mode(False), torch.no_grad():
        inputs = [tensor.clone() for tensor in tensors]
        watched = function if watched is None else watched
        program = record(function, state, inputs, watched=watched, outputs=lambda taped: list(taped.value))
        if compiled:
            held = [tensor.detach() for tensor in (*state.tensors(), *inputs)]
            graph = _with_chosen_products(program.graph, held)
            program = program.running(compile_graph(graph, held) or graph)
    return program


def _with_chosen_products(graph: GraphModule, inputs: list[Tensor]) -> GraphModule:
    """Return the graph with its matmuls by the library that was faster when first timed."""
    other = through_onednn(graph)
    if other is None:
        return graph
    key = (graph.code, tuple((t.shape, t.dtype) for t in inputs), torch.get_num_threads())
    if key not in _FASTER:
        alone = _products_alone(graph)
        # Ones, which leave the caller's random state alone.
        operands = [
            torch.ones(n.meta["val"].shape, dtype=n.meta["val"].dtype) for n in alone.graph.find_nodes(op="placeholder")
        ]
        _FASTER[key] = with_faster_products(alone, operands) is not alone
    return other if _FASTER[key] else graph


def _products_alone(graph: GraphModule) -> GraphModule:
    """Return a graph of the matmuls only, from their operands: uncompiled, the rest would drown their difference."""
    products = Graph()
    results: list[Node] = []
    for node in graph.graph.nodes:
        if node.target in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            operands: list[Node] = []
            for operand in node.args:
                operands.append(products.placeholder(f"operand_{len(results)}_{len(operands)}"))
                operands[-1].meta = operand.meta
            results.append(products.call_function(node.target, tuple(operands)))
            results[-1].meta = node.meta
    products.output(tuple(results))
    return GraphModule({}, products)
