"""Sums of importance weights, their effective number, and the error of their log-mean."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_vae.pair.site import ExactSite

__all__ = ["Rounding", "WeightSums", "rounding_of", "weight_sums"]

# Draws and parameters are rounded too, and a guide's scale amplifies that. An exact Gaussian guide of scale 0.01 in
# float32 gave 150 times the rounding of its entries.
AMPLIFIED = 256
# Weights that agree to one part in a million are equal whatever they were computed in. Differences of more than half
# a nat are never called rounding.
LEAST, MOST = 1e-6, 0.5


class Rounding(NamedTuple):
    """The distance in nats up to which log-weights count as equal: that which rounding may put between them.

    n entries of size m, each rounded by itself:   256 ε (√n m + |log w| / √n),   between 1e-6 and 0.5

    Args:
        epsilon: ε of the dtype that entries are scored in.
        num_entries: n, entries that a log-weight sums.
        size: √n m, summed over the sites.

    >>> Rounding(2**-23, 3072, 3072**0.5).nats(-9300.0) < 0.01
    True
    """

    epsilon: float
    num_entries: int = 1
    size: float = 1.0

    def nats(self, log_weight: float) -> float:
        """Return the distance up to which log-weights near this one count as equal."""
        each = self.size + abs(log_weight) / math.sqrt(self.num_entries)
        return min(MOST, max(LEAST, AMPLIFIED * self.epsilon * each))


def rounding_of(sites: Iterable[ExactSite]) -> Rounding:
    """Return the rounding of log-weights that sum these sites."""
    sites = list(sites)
    counts = [site.num_entries for site in sites]
    size = sum(math.sqrt(count) * site.entry_size for site, count in zip(sites, counts, strict=True))
    return Rounding(max(torch.finfo(site.entry_dtype).eps for site in sites), sum(counts), size)


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
