"""Undirected graphs: check them, load them, and split their links."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from scipy.sparse import csr_matrix
from torch import Tensor

from pyro_vae.data.files import data_root, npz_file, read_arrays

__all__ = ["GRAPHS", "Graph", "LinkSplit", "graph_of", "load_graph", "make_graph", "split_links"]


class Graph(NamedTuple):
    """Hold an undirected graph without self-loops; nodes may be isolated.

    Attributes:
        name: name for messages and figures.
        num_nodes: N.
        edges: (2, E) int64, each edge once, its smaller node first, in lexicographic order.
        features: features of the nodes, (N, F), or None.
        labels: classes of the nodes, (N,), −1 for unknown; or None.

    >>> make_graph(torch.tensor([[2], [0]]), num_nodes=3).adjacency().int()
    tensor([[0, 0, 1],
            [0, 0, 0],
            [1, 0, 0]], dtype=torch.int32)
    """

    name: str
    num_nodes: int
    edges: Tensor
    features: Tensor | None
    labels: Tensor | None

    def adjacency(self) -> Tensor:
        """Return the symmetric matrix (N, N) that is True where two nodes are linked."""
        adjacency = torch.zeros(self.num_nodes, self.num_nodes, dtype=torch.bool, device=self.edges.device)
        adjacency[self.edges[0], self.edges[1]] = True
        return adjacency | adjacency.mT


class LinkSplit(NamedTuple):
    """Hold a graph with edges held out, and as many unlinked pairs of nodes. No pair is in two of the five sets.

    Attributes:
        train: graph of the remaining edges.
        validation: held-out edges, (2, V).
        validation_absent: pairs that the whole graph does not link, (2, V).
        test: held-out edges, (2, T).
        test_absent: pairs that the whole graph does not link, (2, T).
    """

    train: Graph
    validation: Tensor
    validation_absent: Tensor
    test: Tensor
    test_absent: Tensor


def make_graph(
    edges: Tensor,
    num_nodes: int,
    features: Tensor | None = None,
    labels: Tensor | None = None,
    name: str = "graph",
) -> Graph:
    """Check a list of edges and return its graph.

    Args:
        edges: pairs of nodes, (2, E), whole numbers from 0 to N − 1, each edge once and in either direction.
        num_nodes: N.
        features: (N, F), or None.
        labels: (N,), or None.
        name: name for messages and figures.

    Returns:
        :class:`Graph`.

    Raises:
        ValueError: for edges that are no pairs of nodes, self-loops or duplicates (in one direction or both). Also for
            features or labels of another number of nodes.
    """
    if edges.dim() != 2 or len(edges) != 2 or edges.is_floating_point() or edges.dtype == torch.bool:
        raise ValueError(f"edges is {edges.dtype} of shape {tuple(edges.shape)}; it must be whole numbers, (2, E)")
    if num_nodes < 1:
        raise ValueError(f"num_nodes is {num_nodes}; a graph has at least one node")
    edges = edges.long()
    _refuse((edges < 0) | (edges >= num_nodes), edges, f"name nodes outside 0 … {num_nodes - 1}")
    _refuse((edges[0] == edges[1]).expand(2, -1), edges, "are self-loops; remove them")
    low, high = edges.aminmax(dim=0) if edges.numel() else (edges[0], edges[0])
    keys, counts = torch.unique(low * num_nodes + high, return_counts=True)
    if (counts > 1).any():
        first = int(keys[counts > 1][0])
        raise ValueError(
            f"edges holds {int((counts > 1).sum())} edges more than once, in one direction or both, the first "
            f"({first // num_nodes}, {first % num_nodes}); give each undirected edge once"
        )
    for what, value in (("features", features), ("labels", labels)):
        if value is not None and len(value) != num_nodes:
            raise ValueError(f"{what} has {len(value)} rows; the graph has {num_nodes} nodes")
    return Graph(name, num_nodes, torch.stack([keys // num_nodes, keys % num_nodes]), features, labels)


def _refuse(bad: Tensor, edges: Tensor, what: str) -> None:
    if (columns := bad.any(0)).any():
        first = tuple(edges[:, columns][:, 0].tolist())
        raise ValueError(f"edges: {int(columns.sum())} of {edges.shape[1]} {what}; the first is {first}")


def graph_of(adjacency: Tensor, features: Tensor | None = None, labels: Tensor | None = None) -> Graph:
    """Check an adjacency matrix and return its graph.

    Args:
        adjacency: symmetric matrix of zeros and ones with a diagonal of zeros, (N, N).
        features: (N, F), or None.
        labels: (N,), or None.

    Returns:
        :class:`Graph`.

    Raises:
        ValueError: for a matrix that is not square, not symmetric or not of zeros and ones, and for self-loops.
    """
    if adjacency.dim() != 2 or adjacency.shape[0] != adjacency.shape[1]:
        raise ValueError(f"adjacency has shape {tuple(adjacency.shape)}; it must be square, (N, N)")
    if not ((adjacency == 0) | (adjacency == 1)).all():
        raise ValueError("adjacency has entries other than 0 and 1; weighted edges have no place in this graph")
    adjacency = adjacency.bool()
    if (one_way := adjacency & ~adjacency.mT).any():
        first = tuple(one_way.nonzero()[0].tolist())
        raise ValueError(
            f"adjacency is not symmetric: {int(one_way.sum())} edges go one way only, the first {first}; an undirected "
            "graph of them is adjacency | adjacency.mT"
        )
    if adjacency.diagonal().any():
        raise ValueError(f"adjacency has {int(adjacency.diagonal().sum())} self-loops: clear its diagonal")
    return make_graph(adjacency.triu().nonzero().mT, len(adjacency), features, labels)


def load_graph(name: str, root: str | Path | None = None) -> Graph:
    """Load a citation network: nodes are documents, links are citations, features are words.

    Files under ``root``: ``planetoid/cora.npz``, ``planetoid/citeseer.npz``, ``planetoid/pubmed_graph_only.npz``,
    plain arrays without pickles. PubMed has no features.

    Args:
        name: one of :data:`GRAPHS`.
        root: folder of the data sets; if None, as :func:`~pyro_vae.data.data_root`.

    Returns:
        :class:`Graph`.

    Raises:
        ValueError: for an unknown name, and for absent or damaged files.

    Reference:
        Sen et al. (2008), Collective classification in network data, AI Magazine 29; Yang, Cohen and Salakhutdinov
        (2016), Revisiting semi-supervised learning with graph embeddings, ICML.
    """
    if name not in GRAPHS:
        raise ValueError(f"name={name!r} is not a known graph; known are {', '.join(GRAPHS)}")
    path = npz_file(name, data_root(root), f"planetoid/{_FILES[name]}")
    arrays: dict[str, tuple[str, tuple[int | None, ...]]] = {
        "edge_index": ("int64", (2, None)),
        "num_nodes": ("int64", ()),
        "labels": ("int64", (None,)),
    }
    with_features = name != "pubmed"
    if with_features:
        arrays |= {"x_data": ("float32", (None,)), "x_indices": ("int32", (None,)), "x_indptr": ("int32", (None,))}
        arrays |= {"x_shape": ("int64", (2,))}
    edges, num_nodes, labels, *csr = read_arrays(path, arrays)
    features = None
    try:
        if with_features:
            matrix = csr_matrix((csr[0], csr[1], csr[2]), shape=tuple(csr[3]))
            matrix.check_format()
            features = torch.from_numpy(matrix.toarray()).to(torch.get_default_dtype())
        return make_graph(torch.from_numpy(edges), int(num_nodes), features, torch.from_numpy(labels), name)
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); replace it") from error


def split_links(graph: Graph, *, validation: float = 0.05, test: float = 0.1, seed: int = 0) -> LinkSplit:
    """Hold out edges at random, and draw as many unlinked pairs.

    Args:
        graph: the whole graph.
        validation: share of its edges, rounded down.
        test: share of its edges, rounded down.
        seed: seed of the draw; equal seeds give equal splits.

    Returns:
        :class:`LinkSplit`.

    Raises:
        ValueError: for shares that are negative or leave no edge to train on, and for too few unlinked pairs.

    Reference:
        Kipf and Welling (2016), Variational graph auto-encoders, section 3: 5 % and 10 %.
    """
    total, nodes = graph.edges.shape[1], graph.num_nodes
    if not (validation >= 0 and test >= 0):
        raise ValueError(f"validation is {validation}, test {test}; shares of the edges cannot be negative")
    few, many = int(validation * total), int(test * total)
    if few + many >= total:
        raise ValueError(f"validation {validation} and test {test} leave none of {total} edges to train on")
    absent_pairs = nodes * (nodes - 1) // 2 - total
    if few + many > absent_pairs:
        raise ValueError(f"the graph leaves {absent_pairs} pairs unlinked; the split needs {few + many}")
    generator = torch.Generator().manual_seed(seed)
    edges = graph.edges.cpu()
    order = torch.randperm(total, generator=generator)
    absent = _draw_absent(edges, nodes, few + many, generator)
    held = edges[:, order[: few + many]]
    train = edges[:, order[few + many :].sort().values]
    return LinkSplit(graph._replace(edges=train), held[:, :few], absent[:, :few], held[:, few:], absent[:, few:])


def _draw_absent(edges: Tensor, nodes: int, count: int, generator: torch.Generator) -> Tensor:
    """Draw distinct unlinked pairs uniformly, smaller node first."""
    taken = set((edges[0] * nodes + edges[1]).tolist())
    drawn: list[int] = []
    while len(drawn) < count:
        for first, second in torch.randint(nodes, (count, 2), generator=generator).tolist():
            key = min(first, second) * nodes + max(first, second)
            if first != second and key not in taken and len(drawn) < count:
                taken.add(key)
                drawn.append(key)
    keys = torch.tensor(drawn, dtype=torch.long)
    return torch.stack([keys // nodes, keys % nodes])


_FILES = {"cora": "cora.npz", "citeseer": "citeseer.npz", "pubmed": "pubmed_graph_only.npz"}

#: The names :func:`load_graph` knows.
GRAPHS: tuple[str, ...] = tuple(_FILES)
