"""Losses that need more of a pair than its log-terms: the guide's distributions, or its programs run again."""

from __future__ import annotations

import abc
from typing import Any

import torch
from pyro.infer import ELBO
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_vae.pair import Pair, Program, trace_pair

__all__ = ["PairLoss"]


class PairLoss(ELBO, abc.ABC):
    """One more of Pyro's ELBOs, which reaches the pair behind the programs that it is given.

    An objective is a function of :class:`~pyro_vae.LogTerms`; what needs more writes :meth:`negative` and, where not
    every pair will do, :meth:`check`. It then trains in :func:`~pyro_vae.fit` and in a loop of Pyro's own alike.

    Args:
        num_particles: K, draws per datum.

    Raises:
        ValueError: for K < 1; in use, for programs that are not a pair's.
    """

    def __init__(self, num_particles: int = 1) -> None:
        if num_particles < 1:
            raise ValueError(f"num_particles is {num_particles}; it counts draws per datum and must be at least 1")
        super().__init__(num_particles=num_particles, vectorize_particles=True)

    @abc.abstractmethod
    def negative(self, pair: Pair, model: Program, guide: Program, *batch: Tensor) -> Tensor:
        """Return what is minimised, summed over the data: a scalar with its gradient, in nats."""

    def check(self, pair: Pair, batch: tuple[Tensor, ...]) -> None:
        """Refuse a pair, or training data, that this loss cannot take; ``fit`` asks before it takes a step."""

    def loss(self, model: Program, guide: Program, *batch: Tensor) -> float:
        """Return the loss summed over the data, in nats."""
        with torch.no_grad():
            return self.differentiable_loss(model, guide, *batch).item()

    def loss_and_grads(self, model: Program, guide: Program, *batch: Tensor) -> float:
        """Return the loss summed over the data, in nats, and leave its gradients in the parameters."""
        loss = self.differentiable_loss(model, guide, *batch)
        loss.backward()
        return loss.item()

    def differentiable_loss(self, model: Program, guide: Program, *batch: Tensor) -> Tensor:
        """Return the loss summed over the data, a scalar with its gradient."""
        if not isinstance(guide, Program) or not isinstance(model, Program):
            raise ValueError(f"{type(self).__name__} reaches the pair itself: give it pair.model, pair.guide")
        return self.negative(guide.pair, model, guide, *batch)

    def _get_trace(self, model: Program, guide: Program, args: Any, kwargs: Any) -> tuple[Trace, Trace]:
        # Pyro's base class asks for it; both traces are of one plain draw.
        drawn, replayed = trace_pair(guide.pair, *args, num_particles=self.num_particles)
        return replayed, drawn
