"""A compiled graph returns what the recorded one does, also where the compiler lays tensors out otherwise."""

import operator

import pytest
import torch
from torch.fx import Graph, GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_vae.compiling import compile_graph

aten = torch.ops.aten


@pytest.fixture
def transposed() -> torch.Tensor:
    """A matrix whose memory is laid out by columns, so that no view of it has its elements in a row."""
    return torch.arange(6.0, dtype=torch.float64).reshape(3, 2).t()


def test_a_view_that_another_layout_does_not_have_is_a_copy(transposed: torch.Tensor) -> None:
    graph = Graph()
    x = graph.placeholder("x")
    graph.output((graph.call_function(aten.mul.Tensor, (graph.call_function(aten.view.default, (x, [6])), 2.0)),))
    run = compile_graph(GraphModule(torch.nn.Module(), graph), [transposed])
    assert run is not None
    assert run(transposed)[0].tolist() == [0.0, 4.0, 8.0, 2.0, 6.0, 10.0]


@pytest.mark.parametrize("turned", [False, True])
def test_bits_of_given_probabilities_are_those_of_the_recorded_graph(turned: bool) -> None:
    def bits(p: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        more = p.t() if turned else p.expand(7, 2, 3)
        return torch.bernoulli(more), torch.randn(2)

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


@pytest.mark.parametrize("through_a_part", [False, True])
def test_what_is_written_through_a_view_stays_one(through_a_part: bool) -> None:
    graph = Graph()
    x = graph.placeholder("x")
    own = graph.call_function(aten.clone.default, (x,))
    view = graph.call_function(aten.view.default, (own, [6]))
    if through_a_part:
        parts = graph.call_function(aten.split.Tensor, (view, 3))
        view = graph.call_function(operator.getitem, (parts, 1))
    graph.call_function(aten.add_.Tensor, (view, 1.0))
    graph.output((own,))
    recorded = GraphModule(torch.nn.Module(), graph)
    x = torch.zeros(2, 3, dtype=torch.float64)
    run = compile_graph(recorded, [x])
    assert run is not None
    assert torch.equal(run(x)[0], recorded(x)[0])
    assert run(x)[0].sum() == (3 if through_a_part else 6)


def test_a_view_that_is_written_to_is_no_copy(transposed: torch.Tensor) -> None:
    # It cannot be compiled, and says so, rather than write to a copy.
    graph = Graph()
    own = graph.call_function(aten.clone.default, (graph.placeholder("x"),))
    graph.call_function(aten.add_.Tensor, (graph.call_function(aten.view.default, (own, [6])), 1.0))
    graph.output((own,))
    with pytest.warns(UserWarning, match="replayed uncompiled: Cannot view"):
        assert compile_graph(GraphModule(torch.nn.Module(), graph), [transposed]) is None
