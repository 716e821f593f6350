"""Importance weights that arrive block by block: their sums, the largest ones, and bounds at smaller K.

A datum's numbers are the same bits whatever data stand beside it. torch's reductions and ``logaddexp`` round by a
column's position among the others. So only element-wise operations without that habit are used here.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_vae.likelihood.psis import pareto_tail, tail_size
from pyro_vae.pair.weights import Rounding, WeightSums

__all__ = ["SOURCES", "WeightStream", "WeightSummary"]

# What a datum's draws can come from, by their numbers in a result.
SOURCES = ("guide", "prior", "own", "fitted", "annealed")


class WeightSummary(NamedTuple):
    """Statistics of K weights per datum, in nats.

    Args:
        log_mean: log (1/K) Σ w, (B,).
        standard_error: of ``log_mean``, by the delta method, (B,).
        ess: effective sample size (Σ w)² / Σ w², (B,).
        pareto_k: k̂, (B,).
        smoothed: ``log_mean`` with a Pareto-smoothed tail, (B,).
        curve: L_1, L_2, L_4, …, (J, B).
        curve_standard_error: errors of ``curve``, (J, B).
        draws: K, (B,).
        source: number of the kind of proposal that the weights come from, (B,).
    """

    log_mean: Tensor
    standard_error: Tensor
    ess: Tensor
    pareto_k: Tensor
    smoothed: Tensor
    curve: Tensor
    curve_standard_error: Tensor
    draws: Tensor
    source: Tensor

    def column(self, i: int) -> WeightSummary:
        """Return the statistics of one datum."""
        return WeightSummary(*(field[..., i : i + 1] for field in self))

    def up_to(self, num_particles: int) -> WeightSummary:
        """Return the statistics with a curve as long as that of K weights: its last values are repeated."""
        more = num_particles.bit_length() - len(self.curve)
        curves = (torch.cat([curve, curve[-1:].expand(more, -1)]) for curve in (self.curve, self.curve_standard_error))
        curve, error = curves
        return self._replace(curve=curve, curve_standard_error=error)


class WeightStream:
    """Accumulate log-weights over blocks of particles, in float64.

    Args:
        num_data: B.
        num_particles: K, over all blocks.
        device: device of the weights.
        rounding: of the log-weights; without it, that of one number in the dtype that they come in.

    >>> stream = WeightStream(2, 4, torch.device("cpu"))
    >>> stream.add(torch.zeros(3, 2)), stream.add(torch.zeros(1, 2))
    (None, None)
    >>> stream.summary().curve[0]
    tensor([0., 0.], dtype=torch.float64)
    """

    def __init__(
        self, num_data: int, num_particles: int, device: torch.device, rounding: Rounding | None = None
    ) -> None:
        self.num_particles, self.rounding, self.dtype = num_particles, rounding, torch.float64
        tail, levels = tail_size(num_particles), num_particles.bit_length()
        nothing = torch.full((1, num_data), -math.inf, dtype=torch.float64, device=device)
        self.sums = nothing.repeat(2, 1)
        self.largest = nothing.repeat(tail + 1 if tail else 0, 1)
        self.levels = torch.zeros(levels, num_data, dtype=torch.float64, device=device)
        self.squares = torch.zeros_like(self.levels)
        self.centre: Tensor | None = None
        self.pending: list[Tensor | None] = [None] * levels

    def add(self, log_weights: Tensor) -> None:
        """Take in a block of log-weights, (k, B)."""
        self.dtype = log_weights.dtype
        log_weights = log_weights.double()
        sums = torch.stack([_log_sum(log_weights), _log_sum(2 * log_weights)])
        self.sums = _log_add(self.sums, sums)
        if len(self.largest):
            both = torch.cat([self.largest, log_weights])
            self.largest = both.topk(len(self.largest), 0).values
        self._add_levels(log_weights, sums[0])

    def _add_levels(self, merged: Tensor, log_sum: Tensor) -> None:
        """Count single weights, merge them in pairs, count those, and so on; an odd one waits for the next block."""
        if self.centre is None:
            # Squares of log-weights of thousands of nats would hide their spread: distances from here are squared.
            first = log_sum - math.log(len(merged))
            self.centre = torch.where(first.isfinite(), first, 0.0)
        for level in range(len(self.pending)):
            # A merged pair is log(w + w'), not yet their mean.
            distance = merged - (self.centre + level * math.log(2))
            self.levels[level] += _sum(distance)
            self.squares[level] += _sum(distance**2)
            waiting = self.pending[level]
            if waiting is not None:
                merged = torch.cat([waiting, merged])
            pairs = len(merged) // 2
            self.pending[level] = merged[2 * pairs :].clone() if len(merged) % 2 else None
            if not pairs:
                return
            merged = _log_add(merged[0 : 2 * pairs : 2], merged[1 : 2 * pairs : 2])

    def summary(self, source: Tensor | None = None, least: Tensor | None = None) -> WeightSummary:
        """Return the statistics of all weights, on the CPU.

        Args:
            source: of the weights, (B,).
            least: k̂ that each datum has at least, (B,).
        """
        first, second = self.sums.cpu()
        sums = WeightSums(first, second, self.num_particles)
        largest = self.largest.cpu()
        # A copy of each column, so that every datum's fit sees memory of the same layout.
        rounding = self.rounding or Rounding(torch.finfo(self.dtype).eps)
        fits = [pareto_tail(column.clone(), self.num_particles, rounding) for column in largest.mT]
        pareto_k, change = torch.tensor(fits, dtype=torch.float64).mT
        if least is not None:
            pareto_k = torch.where(least > -math.inf, torch.maximum(pareto_k, least), pareto_k)
        share = torch.exp(_log_sum(largest[:-1]) - first) if len(largest) else torch.zeros_like(first)
        # Σ smoothed = Σ w (1 + share (e^change − 1)): the weights below the tail stay as they are.
        smoothed = sums.log_mean + torch.log1p(share * torch.expm1(change))
        error = sums.standard_error
        draws = torch.full_like(error, self.num_particles)
        source = torch.zeros_like(error) if source is None else source
        curve = self._curve(error)
        return WeightSummary(sums.log_mean, error, sums.ess, pareto_k, smoothed, *curve, draws, source)

    def _curve(self, error: Tensor) -> tuple[Tensor, Tensor]:
        """Return L_1, L_2, L_4, … and their errors from the spread of the merged weights."""
        assert self.centre is not None
        counts = (self.num_particles >> torch.arange(len(self.levels))).double().unsqueeze(-1)
        mean = self.levels.cpu() / counts
        variance = (self.squares.cpu() / counts - mean**2).clamp(min=0) / (counts - 1)
        # A single number has no spread: there the delta method's error, of K weights, is scaled to its size.
        largest = 1 << (len(self.levels) - 1)
        variance[-1] = error**2 * self.num_particles / largest
        return mean + self.centre.cpu(), variance.sqrt()


def _sum(values: Tensor) -> Tensor:
    """Return the sum over the first dimension, by halves, in an order that every column shares."""
    while len(values) > 1:
        half = len(values) // 2
        halved = values[:half] + values[half : 2 * half]
        values = torch.cat([halved, values[2 * half :]]) if len(values) % 2 else halved
    return values[0]


def _log_sum(log_values: Tensor) -> Tensor:
    """Return log Σ exp over the first dimension."""
    top = log_values.amax(0)
    shift = torch.where(top.isfinite(), top, 0.0)
    return _sum((log_values - shift).exp()).log() + shift


def _log_add(left: Tensor, right: Tensor) -> Tensor:
    """Return log(exp(left) + exp(right)), entry by entry."""
    # Two infinities of one sign have no difference.
    distance = torch.where(left == right, 0.0, (left - right).abs())
    return torch.maximum(left, right) + torch.log1p(torch.exp(-distance))
