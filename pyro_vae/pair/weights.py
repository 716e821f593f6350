"""Summaries of importance weights."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["effective_sample_size"]


def effective_sample_size(log_weights: Tensor) -> Tensor:
    """Return the number of equally weighted particles that are worth as much as K weighted ones.

    ESS = (Σ_k w_k)² / Σ_k w_k²

    Args:
        log_weights: (K, …), in nats.

    Returns:
        (…), between 1 and K.

    Reference:
        Kong, Liu and Wong (1994), Sequential imputations and Bayesian missing data problems, JASA 89.

    >>> effective_sample_size(torch.tensor([0.0, 0.0, -1000.0]))
    tensor(2.)
    """
    return torch.exp(2 * torch.logsumexp(log_weights, 0) - torch.logsumexp(2 * log_weights, 0))
