"""Agreement of a clustering with classes."""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

__all__ = ["clustering_accuracy", "contingency"]


def contingency(clusters: Tensor, labels: Tensor) -> Tensor:
    """Count the data of each cluster and class.

    Args:
        clusters: cluster indices, (N,), from 0.
        labels: class indices, (N,), from 0.

    Returns:
        (clusters, classes), whole numbers that sum to N.

    Raises:
        ValueError: for vectors of different lengths, empty ones, and negative or fractional indices.

    >>> contingency(torch.tensor([0, 0, 1]), torch.tensor([1, 1, 0]))
    tensor([[0, 2],
            [1, 0]])
    """
    if clusters.dim() != 1 or clusters.shape != labels.shape or len(clusters) == 0:
        raise ValueError(
            f"clusters has shape {tuple(clusters.shape)}, labels {tuple(labels.shape)}; give one index each per datum"
        )
    for name, index in (("clusters", clusters), ("labels", labels)):
        if index.is_floating_point() or int(index.min()) < 0:
            raise ValueError(f"{name} must be whole numbers from 0")
    classes = int(labels.max()) + 1
    counts = torch.bincount(clusters * classes + labels, minlength=(int(clusters.max()) + 1) * classes)
    return counts.view(-1, classes)


def clustering_accuracy(clusters: Tensor, labels: Tensor) -> float:
    """Return the accuracy of the best one-to-one assignment of clusters to classes.

    max_π (1/N) Σ_n [label_n = π(cluster_n)],   over injections π, by the Hungarian algorithm

    With more clusters than classes, unassigned clusters count as wrong.

    Args:
        clusters: cluster indices, (N,), from 0.
        labels: class indices, (N,), from 0.

    Returns:
        A share of the data, 0 to 1.

    Raises:
        ValueError: as :func:`contingency`.

    Reference:
        Kuhn (1955), The Hungarian method for the assignment problem, Naval Research Logistics Quarterly 2.

    >>> clustering_accuracy(torch.tensor([2, 2, 0, 0]), torch.tensor([0, 0, 1, 0]))
    0.75
    """
    counts = contingency(clusters, labels)
    rows, columns = linear_sum_assignment(counts.cpu().numpy(), maximize=True)
    return float(counts[torch.from_numpy(rows), torch.from_numpy(columns)].sum() / len(labels))
