"""Graphs are checked edge by edge, loaded as published, and split without leaks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import pyro_vae as pv
from pyro_vae.data import Graph, graph_of, load_graph, load_links, make_graph, split_links
from pyro_vae.models import VGAE


def ring(size: int = 20) -> Graph:
    nodes = torch.arange(size)
    return make_graph(torch.stack([nodes, (nodes + 1) % size]), size)


def test_edges_and_matrix_are_two_forms_of_one_graph() -> None:
    graph = make_graph(torch.tensor([[3, 0, 1], [1, 2, 0]]), 5, features=torch.ones(5, 2), labels=torch.arange(5))
    assert graph.edges.tolist() == [[0, 0, 1], [1, 2, 3]]
    again = graph_of(graph.adjacency(), graph.features, graph.labels)
    torch.testing.assert_close(again.edges, graph.edges)
    assert (graph.adjacency() == graph.adjacency().mT).all()
    assert int(graph.adjacency().sum()) == 6


def test_a_graph_may_have_isolated_nodes_and_no_edges() -> None:
    graph = make_graph(torch.zeros(2, 0, dtype=torch.long), 3)
    assert not graph.adjacency().any()
    assert graph_of(torch.zeros(3, 3)).edges.shape == (2, 0)


@pytest.mark.parametrize(
    ("edges", "message"),
    [
        ([[0, 1], [1, 5]], r"1 of 2 name nodes outside 0 … 4; the first is \(1, 5\)"),
        ([[0, -1], [1, 2]], r"1 of 2 name nodes outside 0 … 4; the first is \(-1, 2\)"),
        ([[0, 2], [1, 2]], r"1 of 2 are self-loops"),
        ([[0, 0, 2], [1, 1, 3]], r"1 edges more than once, in one direction or both, the first \(0, 1\)"),
        ([[0, 1, 2], [1, 0, 3]], r"1 edges more than once, in one direction or both, the first \(0, 1\)"),
        ([[0, 1]], "whole numbers"),
        ([[0.0], [1.0]], "whole numbers"),
    ],
)
def test_edges_that_make_no_graph_are_refused(edges: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_graph(torch.tensor(edges), 5)


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        ([[0, 1, 0], [0, 0, 0], [0, 0, 0]], r"not symmetric: 1 edges go one way only, the first \(0, 1\)"),
        ([[1, 0], [0, 0]], "1 self-loops"),
        ([[0, 2], [2, 0]], "other than 0 and 1"),
        ([[0, 1]], "must be square"),
    ],
)
def test_matrices_that_make_no_graph_are_refused(matrix: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        graph_of(torch.tensor(matrix))


@pytest.mark.parametrize("what", ["features", "labels"])
def test_rows_for_other_nodes_are_refused(what: str) -> None:
    with pytest.raises(ValueError, match=f"{what} has 4 rows; the graph has 5 nodes"):
        make_graph(torch.tensor([[0], [1]]), 5, **{what: torch.zeros(4, 2)})


def test_a_graph_of_no_nodes_is_refused() -> None:
    with pytest.raises(ValueError, match="num_nodes is 0"):
        make_graph(torch.zeros(2, 0, dtype=torch.long), 0)


def test_a_split_is_a_partition_with_as_many_unlinked_pairs() -> None:
    graph = ring(100)
    split = split_links(graph, seed=3)
    sizes = [split.train.edges.shape[1], split.validation.shape[1], split.test.shape[1]]
    assert sizes == [85, 5, 10]
    assert (split.validation_absent.shape[1], split.test_absent.shape[1]) == (5, 10)
    parts = [split.train.edges, split.validation, split.test, split.validation_absent, split.test_absent]
    pairs = [tuple(pair) for part in parts for pair in part.T.tolist()]
    assert len(set(pairs)) == len(pairs)
    assert {tuple(pair) for part in parts[:3] for pair in part.T.tolist()} == {
        tuple(pair) for pair in graph.edges.T.tolist()
    }
    assert all(first < second for first, second in pairs)


def test_a_split_depends_on_its_seed_alone() -> None:
    first, again, other = (split_links(ring(100), seed=seed) for seed in (3, 3, 4))
    torch.testing.assert_close(first.test, again.test)
    torch.testing.assert_close(first.test_absent, again.test_absent)
    assert not torch.equal(first.test, other.test)


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ({"validation": -0.1}, "cannot be negative"),
        ({"test": float("nan")}, "cannot be negative"),
        ({"validation": 0.5, "test": 0.5}, "leave none of 20 edges"),
    ],
)
def test_splits_that_cannot_be_are_refused(shares: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split_links(ring(), **shares)


def test_a_graph_without_gaps_cannot_be_split() -> None:
    full = graph_of(~torch.eye(5, dtype=torch.bool))
    with pytest.raises(ValueError, match="leaves 0 pairs unlinked"):
        split_links(full, validation=0.2, test=0.2)


@pytest.mark.parametrize(
    ("name", "nodes", "edges", "words", "classes", "alone"),
    [
        ("cora", 2708, 5278, 1433, 7, 0),
        ("citeseer", 3327, 4552, 3703, 6, 48),
        ("pubmed", 19717, 44324, None, 3, 0),
    ],
)
def test_the_networks_have_their_published_sizes(
    name: str, nodes: int, edges: int, words: int | None, classes: int, alone: int, shared_data: Path
) -> None:
    graph = load_graph(name, shared_data)
    assert (graph.num_nodes, graph.edges.shape) == (nodes, (2, edges))
    assert (graph.edges[0] < graph.edges[1]).all()
    assert graph.labels.max() == classes - 1
    assert nodes - len(graph.edges.unique()) == alone
    if words is None:
        assert graph.features is None
    else:
        assert graph.features.shape == (nodes, words)
        assert graph.features.dtype == torch.float64
        assert set(graph.features.unique().tolist()) == {0, 1}


def stored(**changes: np.ndarray) -> dict[str, np.ndarray]:
    """Return a network of three documents and two words in the published format, with changes."""
    return {
        "edge_index": np.array([[0, 1], [1, 2]]),
        "num_nodes": np.array(3),
        "labels": np.array([0, 1, -1]),
        "x_data": np.ones(3, np.float32),
        "x_indices": np.array([0, 0, 1], np.int32),
        "x_indptr": np.array([0, 1, 3, 3], np.int32),
        "x_shape": np.array([3, 2]),
        **changes,
    }


def write(root: Path, **changes: np.ndarray) -> Path:
    (root / "planetoid").mkdir(exist_ok=True)
    np.savez(root / "planetoid" / "cora.npz", **stored(**changes))
    return root


def test_features_are_the_stored_rows(tmp_path: Path) -> None:
    graph = load_graph("cora", write(tmp_path))
    assert graph.features.tolist() == [[1, 0], [1, 1], [0, 0]]
    assert graph.labels.tolist() == [0, 1, -1]


@pytest.mark.parametrize(
    "changes",
    [
        {"edge_index": np.array([[0, 1], [1, 3]])},
        {"x_indices": np.array([0, 1, 2], np.int32)},
        {"x_shape": np.array([4, 2])},
        {"labels": np.array([0, 1])},
        {"labels": np.array([{"a": 1}], dtype=object)},
    ],
)
def test_damaged_files_are_told(tmp_path: Path, changes: dict) -> None:
    with pytest.raises(ValueError, match=r"cora\.npz"):
        load_graph("cora", write(tmp_path, **changes))


def test_absent_files_and_unknown_names_are_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"looked for planetoid/cora\.npz"):
        load_graph("cora", tmp_path)
    with pytest.raises(ValueError, match="known are cora, citeseer, pubmed"):
        load_graph("corra", tmp_path)


def test_a_network_is_a_data_set_of_one_datum(tmp_path: Path) -> None:
    data = load_links("cora", write(tmp_path), validation=0.0, test=0.5)
    whole = load_graph("cora", tmp_path).adjacency()
    assert torch.equal(data.test, whole.unsqueeze(0))
    assert torch.equal(data.train, data.links.train.adjacency().unsqueeze(0))
    # Of two edges one is held out.
    assert (data.train.sum(), data.test.sum()) == (2, 4)
    assert (data.name, data.x_shape, data.validation) == ("cora", tuple(whole.shape), None)
    pv.fit(VGAE(3, pv.StandardNormal(2)), data, epochs=1, batch_size=1, progress=False)
