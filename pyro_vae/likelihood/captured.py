"""Log-weights of a chunk by a recording of the pair's programs, made once per chunk shape and compiled.

An importance-sampling estimate runs one small program many times over: the same networks and densities on chunks of one
shape. Recorded and compiled, a chunk draws the same noise as Pyro's eager pass and gives the same weights up to
rounding, without Pyro's handlers and with its element-wise operations joined, so that no log-density of a pixel is
written to memory.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from pyro_vae.capture.inductor import compile_graph
from pyro_vae.capture.onednn import through_onednn, with_faster_products
from pyro_vae.capture.program import record
from pyro_vae.capture.python_state import PairState
from pyro_vae.capture.tracer import CaptureError
from pyro_vae.pair.pair import Pair
from pyro_vae.runtime.memory import CPU_WORKING_SET

__all__ = ["Capture", "LogWeights", "check_capture", "recorded_chunks"]

# Log-weights (k, b) of a chunk of b data and k draws.
LogWeights: TypeAlias = Callable[[tuple[Tensor, ...], int], Tensor]
Capture: TypeAlias = Literal["auto"] | bool
# "auto" compiles for as many full chunks as hold this much, each counted with at most a CPU's working set. They take
# half a minute or more, compiling 5 to 15 s. No time is measured: a seeded estimate must repeat exactly.
BYTES_BEFORE_CAPTURE = 2000 * CPU_WORKING_SET
# Whether oneDNN's products were faster, by shapes and threads: timed once, so that an estimate repeats exactly.
_FASTER: dict[Any, bool] = {}


def check_capture(capture: Capture) -> None:
    """Refuse what is neither "auto" nor a flag.

    Raises:
        ValueError: then.
    """
    if capture not in ("auto", True, False):
        raise ValueError(f"capture is {capture!r}; it must be 'auto', True or False")


def recorded_chunks(
    pair: Pair,
    log_weights: LogWeights,
    batch: tuple[Tensor, ...],
    sizes: tuple[int, int],
    *,
    num_particles: int,
    memory: int,
    capture: Capture,
) -> LogWeights:
    """Return a function that gives the log-weights of full chunks from a recording, those of others eagerly.

    Args:
        pair: the pair, in evaluation mode.
        log_weights: the eager computation, from (chunk, k) to (k, b), a function of the chunk's values, the pair's
            parameters and buffers, and torch's random state.
        batch: all data and their conditions.
        sizes: data and particles of a full chunk.
        num_particles: K, in all.
        memory: bytes that a chunk may take.
        capture: whether to record; "auto" does where there is enough to compute.

    Returns:
        A function with the signature of ``log_weights``, and its numbers up to rounding.

    Raises:
        CaptureError: for ``capture=True`` where the program cannot be recorded; "auto" warns and is eager.
    """
    data, particles = sizes
    work = (len(batch[0]) // data) * (num_particles // particles) * min(memory, CPU_WORKING_SET)
    if capture is False or (capture == "auto" and work < BYTES_BEFORE_CAPTURE):
        return log_weights
    chunk = tuple(tensor[:data] for tensor in batch)
    try:
        replay = _recorded(pair, log_weights, chunk, particles)
    except CaptureError as reason:
        if capture is True:
            raise
        warnings.warn(f"log-weights come from Pyro's eager pass, which is slower: {reason}", stacklevel=4)
        return log_weights

    def faster(chunk: tuple[Tensor, ...], size: int) -> Tensor:
        return replay(chunk) if (len(chunk[0]), size) == sizes else log_weights(chunk, size)

    return faster


def _recorded(
    pair: Pair, log_weights: LogWeights, chunk: tuple[Tensor, ...], size: int
) -> Callable[[tuple[Tensor, ...]], Tensor]:
    """Run the eager computation once on tensors without values, and return its operations, compiled."""
    state = PairState(pair)
    # Tensors made in inference mode cannot be captured; nothing here needs gradients.
    with torch.inference_mode(False), torch.no_grad():
        inputs = [tensor.clone() for tensor in chunk]
        program = record(lambda *values: log_weights(values, size), state, inputs, watched=log_weights)
        held = [tensor.detach() for tensor in (*state.tensors(), *inputs)]
        graph = _with_chosen_products(program.graph, held)
        program = program.running(compile_graph(graph, held) or graph)

    def replay(chunk: tuple[Tensor, ...]) -> Tensor:
        with torch.inference_mode(False):
            (result,) = program.replay(state.tensors(), chunk)
        return result

    return replay


def _with_chosen_products(graph: GraphModule, inputs: list[Tensor]) -> GraphModule:
    """Return the graph with its products by the faster library, the one that was faster when first asked."""
    other = through_onednn(graph)
    if other is None:
        return graph
    key = (graph.code, tuple((t.shape, t.dtype) for t in inputs), torch.get_num_threads())
    if key not in _FASTER:
        alone = _products_alone(graph)
        # Ones, since the caller's random state is not to move.
        operands = [
            torch.ones(n.meta["val"].shape, dtype=n.meta["val"].dtype) for n in alone.graph.find_nodes(op="placeholder")
        ]
        _FASTER[key] = with_faster_products(alone, operands) is not alone
    return other if _FASTER[key] else graph


def _products_alone(graph: GraphModule) -> GraphModule:
    """Return a graph of the products only, from their operands: uncompiled, the rest would drown their difference."""
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
