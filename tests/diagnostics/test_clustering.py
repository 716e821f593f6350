"""Clustering accuracy is that of the best naming, found by trying them all."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch

from pyro_vae.diagnostics.clustering import clustering_accuracy, contingency


def test_the_assignment_is_the_best_of_all_permutations() -> None:
    clusters, labels = torch.randint(0, 4, (2, 60)).unbind(0)
    best = max(float((torch.tensor(naming)[clusters] == labels).double().mean()) for naming in permutations(range(4)))
    assert clustering_accuracy(clusters, labels) == pytest.approx(best, abs=1e-7)


def test_renamed_classes_are_a_perfect_clustering() -> None:
    labels = torch.arange(50) % 5
    assert clustering_accuracy((labels + 2) % 5, labels) == 1


def test_clusters_beyond_the_classes_count_as_wrong() -> None:
    labels = torch.tensor([0, 0, 1, 1])
    assert clustering_accuracy(torch.tensor([0, 3, 1, 1]), labels) == 0.75


def test_the_table_counts_every_datum_once() -> None:
    clusters, labels = torch.randint(0, 4, (60,)), torch.randint(0, 3, (60,))
    table = contingency(clusters, labels)
    assert table.sum() == 60
    assert table[2, 1] == ((clusters == 2) & (labels == 1)).sum()


@pytest.mark.parametrize(
    ("clusters", "labels", "message"),
    [
        (torch.zeros(3, dtype=torch.long), torch.zeros(4, dtype=torch.long), "one index each per datum"),
        (torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long), "one index each per datum"),
        (torch.zeros(3), torch.zeros(3, dtype=torch.long), "clusters must be whole numbers"),
        (torch.zeros(3, dtype=torch.long), torch.full((3,), -1), "labels must be whole numbers"),
    ],
)
def test_what_is_no_clustering_is_refused(clusters: torch.Tensor, labels: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        clustering_accuracy(clusters, labels)
