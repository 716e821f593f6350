"""What is kept of importance weights that stream by, per datum: sums, the largest ones, and bounds at smaller K."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_vae.likelihood.psis import pareto_tail, tail_size

__all__ = ["WeightStream", "WeightSummary"]


class WeightSummary(NamedTuple):
    """What K weights per datum say, in nats.

    ``log_mean`` (B,): log (1/K) Σ w; ``standard_error`` (B,) its error by the delta method; ``ess`` (B,): (Σ w)²/Σ w²;
    ``pareto_k`` (B,); ``smoothed`` (B,): log_mean with the tail Pareto-smoothed; ``curve`` (J, B): L_1, L_2, L_4, …,
    ``curve_standard_error`` (J, B) their errors.
    """

    log_mean: Tensor
    standard_error: Tensor
    ess: Tensor
    pareto_k: Tensor
    smoothed: Tensor
    curve: Tensor
    curve_standard_error: Tensor


class WeightStream:
    """Accumulate log-weights of some data over chunks of particles, in float64.

    Args:
        num_data: B.
        num_particles: K, in all.
        device: where the weights are.

    >>> stream = WeightStream(2, 4, torch.device("cpu"))
    >>> stream.add(torch.zeros(3, 2)), stream.add(torch.zeros(1, 2))
    (None, None)
    >>> stream.summary().curve[0]
    tensor([0., 0.], dtype=torch.float64)
    """

    def __init__(self, num_data: int, num_particles: int, device: torch.device) -> None:
        self.num_particles, self.dtype = num_particles, torch.float64
        tail, levels = tail_size(num_particles), num_particles.bit_length()
        nothing = torch.full((1, num_data), -math.inf, dtype=torch.float64, device=device)
        self.sums = nothing.repeat(2, 1)
        self.largest = nothing.repeat(tail + 1 if tail else 0, 1)
        self.levels = torch.zeros(levels, num_data, dtype=torch.float64, device=device)
        self.squares = torch.zeros_like(self.levels)
        self.centre: Tensor | None = None
        self.pending: list[Tensor | None] = [None] * levels

    def add(self, log_weights: Tensor) -> None:
        """Take in a chunk of log-weights, (k, B)."""
        self.dtype = log_weights.dtype
        log_weights = log_weights.double()
        self.sums[0] = torch.logaddexp(self.sums[0], torch.logsumexp(log_weights, 0))
        self.sums[1] = torch.logaddexp(self.sums[1], torch.logsumexp(2 * log_weights, 0))
        if len(self.largest):
            both = torch.cat([self.largest, log_weights])
            self.largest = both.topk(len(self.largest), 0).values
        self._add_blocks(log_weights)

    def _add_blocks(self, blocks: Tensor) -> None:
        """Count blocks of 1, merge them in pairs, count those, and so on; an odd one waits for the next chunk."""
        if self.centre is None:
            # Squares are of distances from here, or those of log-weights of thousands of nats would hide the spread.
            first = torch.logsumexp(blocks, 0) - math.log(len(blocks))
            self.centre = torch.where(first.isfinite(), first, 0.0)
        for level in range(len(self.pending)):
            # A merged pair is log(w + w'), not yet their mean.
            distance = blocks - (self.centre + level * math.log(2))
            self.levels[level] += distance.sum(0)
            self.squares[level] += (distance**2).sum(0)
            waiting = self.pending[level]
            if waiting is not None:
                blocks = torch.cat([waiting, blocks])
            pairs = len(blocks) // 2
            self.pending[level] = blocks[2 * pairs :].clone() if len(blocks) % 2 else None
            blocks = torch.logaddexp(blocks[0 : 2 * pairs : 2], blocks[1 : 2 * pairs : 2])

    def summary(self) -> WeightSummary:
        """Return what the weights say, on the CPU."""
        first, second = self.sums.cpu()
        count = self.num_particles
        ess = torch.exp(2 * first - second)
        # The sample variance of the weights over their squared mean is (K/ESS − 1) K/(K − 1).
        variance = (count / ess - 1).clamp(min=0) / (count - 1) if count > 1 else math.nan * ess
        largest = self.largest.cpu()
        fits = [pareto_tail(column, count, self.dtype) for column in largest.mT]
        pareto_k, change = torch.tensor(fits, dtype=torch.float64).mT
        log_mean = first - math.log(count)
        share = torch.exp(torch.logsumexp(largest[:-1], 0) - first) if len(largest) else torch.zeros_like(first)
        error = variance.sqrt()
        # Σ smoothed = Σ w (1 + share (e^change − 1)): the weights below the tail stay as they are.
        smoothed = log_mean + torch.log1p(share * torch.expm1(change))
        return WeightSummary(log_mean, error, ess, pareto_k, smoothed, *self._curve(error))

    def _curve(self, error: Tensor) -> tuple[Tensor, Tensor]:
        """Return L_1, L_2, L_4, … and their errors from the spread of the blocks."""
        assert self.centre is not None
        blocks = (self.num_particles >> torch.arange(len(self.levels))).double().unsqueeze(-1)
        mean = self.levels.cpu() / blocks
        variance = (self.squares.cpu() / blocks - mean**2).clamp(min=0) / (blocks - 1)
        # One block has no spread: there the delta method's error, of K weights, is scaled to the block's number.
        largest = 1 << (len(self.levels) - 1)
        variance[-1] = error**2 * self.num_particles / largest
        return mean + self.centre.cpu(), variance.sqrt()
