"""Sums of importance weights, their effective number, and the error of their log-mean."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["WeightSums", "weight_sums"]


class WeightSums(NamedTuple):
    """Sums of K weights per datum, in nats.

    Args:
        log_sum: log Σ w, (B,).
        log_sum_of_squares: log Σ w², (B,).
        num_weights: K.

    >>> weight_sums(torch.zeros(4, 1)).ess
    tensor([4.])
    """

    log_sum: Tensor
    log_sum_of_squares: Tensor
    num_weights: int

    @property
    def log_mean(self) -> Tensor:
        """log (1/K) Σ w, (B,)."""
        return self.log_sum - math.log(self.num_weights)

    @property
    def ess(self) -> Tensor:
        """Effective sample size (Σ w)² / Σ w², (B,), between 1 and K."""
        return torch.exp(2 * self.log_sum - self.log_sum_of_squares)

    @property
    def standard_error(self) -> Tensor:
        """Standard error of ``log_mean`` by the delta method, (B,); NaN for one weight.

        The sample variance of the weights over their squared mean is (K/ESS − 1) K/(K − 1).
        """
        ess = self.ess
        if self.num_weights == 1:
            return math.nan * ess
        return ((self.num_weights / ess - 1).clamp(min=0) / (self.num_weights - 1)).sqrt()


def weight_sums(log_weights: Tensor) -> WeightSums:
    """Return the sums of weights over their first dimension.

    Args:
        log_weights: log w, (K, B), nats.

    Returns:
        :class:`WeightSums`.
    """
    return WeightSums(torch.logsumexp(log_weights, 0), torch.logsumexp(2 * log_weights, 0), len(log_weights))
