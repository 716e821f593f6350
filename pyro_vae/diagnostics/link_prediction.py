"""Scores of link prediction."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["LinkScores", "link_scores"]


class LinkScores(NamedTuple):
    """Scores of linked against unlinked pairs of nodes.

    Args:
        auc: area under the ROC curve: the chance that a linked pair scores above an unlinked one.
        average_precision: precision averaged over steps of recall.
    """

    auc: float
    average_precision: float


def link_scores(linked: Tensor, unlinked: Tensor) -> LinkScores:
    """Return the area under the ROC curve and the average precision of linked against unlinked pairs.

    Args:
        linked: scores of held-out links, (M,), higher for likelier.
        unlinked: scores of unlinked pairs, (M',).

    Returns:
        :class:`LinkScores`, each between 0 and 1.

    Raises:
        ValueError: when either is empty.

    >>> link_scores(torch.tensor([0.9, 0.4]), torch.tensor([0.3, 0.6])).auc
    0.75
    """
    if len(linked) == 0 or len(unlinked) == 0:
        raise ValueError(f"{len(linked)} links and {len(unlinked)} unlinked pairs: scoring needs some of each")
    # Imported here: it takes a second, and nothing else needs it.
    from sklearn.metrics import average_precision_score, roc_auc_score

    truth = [1] * len(linked) + [0] * len(unlinked)
    scores = torch.cat([linked, unlinked]).cpu().numpy()
    return LinkScores(float(roc_auc_score(truth, scores)), float(average_precision_score(truth, scores)))
