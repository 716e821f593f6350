"""A compiled graph returns what the recorded one does, also where the compiler lays tensors out otherwise."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx import Graph, GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_vae.capture.inductor import compile_graph

aten = torch.ops.aten


@pytest.fixture
def transposed() -> Tensor:
    """A matrix whose memory is laid out by columns, so that no view of it has its elements in a row."""
    return torch.arange(6.0, dtype=torch.float64).reshape(3, 2).t()


def test_a_view_that_another_layout_does_not_have_is_a_copy(transposed: Tensor) -> None:
    graph = Graph()
    x = graph.placeholder("x")
    graph.output((graph.call_function(aten.mul.Tensor, (graph.call_function(aten.view.default, (x, [6])), 2.0)),))
    run = compile_graph(GraphModule(torch.nn.Module(), graph), [transposed])
    assert run is not None
    assert run(transposed)[0].tolist() == [0.0, 4.0, 8.0, 2.0, 6.0, 10.0]


@pytest.mark.parametrize("turned", [False, True])
def test_bits_of_given_probabilities_are_those_of_the_recorded_graph(turned: bool) -> None:
    def bits(p: Tensor) -> tuple[Tensor, Tensor]:
        more = p.t() if turned else p.expand(7, 2, 3)
        return torch.bernoulli(more), torch.randn(2)

    # In float32 the compiler's own way happens to give the same bits.
    p = torch.linspace(0.1, 0.9, 6, dtype=torch.float64).reshape(2, 3)
    recorded = make_fx(bits)(p)
    run = compile_graph(recorded, [p])
    assert run is not None
    for _ in range(3):
        state = torch.get_rng_state()
        expected = recorded(p)
        torch.set_rng_state(state)
        for ours, theirs in zip(run(p), expected, strict=True):
            assert torch.equal(ours, theirs)


def written_through_a_view(x: Tensor) -> tuple[Tensor, ...]:
    own = x.clone()
    aten.view.default(own, [6]).add_(1.0)
    return (own,)


def written_through_a_part_of_a_view(x: Tensor) -> tuple[Tensor, ...]:
    own = x.clone()
    aten.view.default(own, [6]).split(3)[1].add_(1.0)
    return (own,)


def written_through_an_older_view(x: Tensor) -> tuple[Tensor, ...]:
    own = x.clone()
    older, written = own.t(), own.add_(1.0)
    view = aten.view.default(written, [6])
    older.add_(1.0)
    return (view,)


@pytest.mark.parametrize(
    "program", [written_through_a_view, written_through_a_part_of_a_view, written_through_an_older_view]
)
def test_what_is_written_to_keeps_its_views(
    program: Callable[[Tensor], tuple[Tensor, ...]], transposed: Tensor
) -> None:
    # Recorded on a layout that has the view, and compiled for it or for one that has not: a copy would be wrong.
    recorded = make_fx(program)(transposed.contiguous())
    for node in recorded.graph.nodes:
        # The layouts it was recorded with, which the compiler would go by.
        node.meta.clear()
    run = compile_graph(recorded, [transposed.contiguous()])
    assert run is not None
    assert torch.equal(run(transposed.contiguous())[0], recorded(transposed.contiguous())[0])
    with pytest.warns(UserWarning, match="replayed uncompiled: Cannot view"):
        assert compile_graph(recorded, [transposed]) is None


def test_a_matrix_without_a_decomposition_raises_what_it_does_eagerly() -> None:
    recorded = make_fx(lambda x: (torch.linalg.cholesky(x),))(torch.eye(2))
    run = compile_graph(recorded, [torch.eye(2)])
    assert run is not None
    with pytest.raises(torch.linalg.LinAlgError, match="not positive-definite"):
        run(-torch.eye(2))
