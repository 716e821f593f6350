"""One training step: Pyro's ELBO run eagerly, and what every way of taking a step shares.

A step is a callable ``step(*batch, beta=1.0) -> loss`` that updates the parameters once and returns the mean loss per
datum in nats. ``fit`` knows no more than that, so that a faster step is one more function here.

Reading a number back from a CUDA device waits for all that the device has still to do. There a step may return its loss
as a tensor, which is read later, and a loss that is not finite then moves the parameters by no gradient of its own.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import pyro
import torch
from pyro.infer import ELBO
from torch import Tensor, nn

from pyro_vae.objectives.loss import Loss
from pyro_vae.pair.handlers import scaled_latents
from pyro_vae.pair.pair import Pair
from pyro_vae.pair.trace import log_terms, trace_pair

__all__ = [
    "Average",
    "NonFiniteLossError",
    "Step",
    "eager_backward",
    "eager_step",
    "non_finite_sites",
    "updating_step",
]


class NonFiniteLossError(ValueError):
    """The loss of a batch is NaN or infinite; the parameters are still those from before the step."""


# Devices whose numbers are not read back at every step.
READ_LATER = {"cuda"}


class Step(Protocol):
    """Update the parameters once and return the mean loss per datum, in nats; a tensor () where reading it would wait.

    A loss or gradient that is not finite raises :class:`NonFiniteLossError` before the update. Where reading it would
    wait, it is returned as NaN instead, and the optimiser is given gradients of zero.
    """

    def __call__(self, *batch: Tensor, beta: float = 1.0) -> float | Tensor: ...


class Average(Protocol):
    """Put means over processes in the place of ``p.grad``, and return those of the summed loss and the number of data.

    Where some process's loss is not finite, so is the mean, in all of them.
    """

    def __call__(self, total: float | Tensor, size: int) -> tuple[float | Tensor, float | Tensor]: ...


def eager_step(
    pair: Pair,
    loss: Loss,
    optimizer: torch.optim.Optimizer,
    *,
    num_particles: int = 1,
    clip_norm: float | None = None,
    average: Average | None = None,
) -> Step:
    """Return the reference step: the ELBO's own ``loss_and_grads``, which is what ``SVI.step`` calls.

    Gradients are those of the mean per datum, whatever the ELBO sums; clipping is by their global norm.

    Args:
        pair: the pair to train.
        loss: any Pyro ELBO, or an objective, a function of log-terms to maximise.
        optimizer: over the pair's parameters.
        num_particles: draws per datum for an objective; a Pyro ELBO holds its own.
        clip_norm: largest global norm of the gradient.
        average: averages gradients over processes.

    Returns:
        A step that raises :class:`NonFiniteLossError` before it would update from a loss that is not finite.
    """
    return updating_step(eager_backward(pair, loss, num_particles), optimizer, clip_norm, average)


class Backward(Protocol):
    """Leave the gradients of a batch's summed loss in ``p.grad`` and return that loss, in nats."""

    def __call__(self, *batch: Tensor, beta: float = 1.0) -> float | Tensor: ...


def eager_backward(pair: Pair, loss: Loss, num_particles: int = 1) -> Backward:
    """Return the pass through a Pyro ELBO or an objective, forth and back."""

    def backward(*batch: Tensor, beta: float = 1.0) -> float:
        with scaled_latents(beta):
            if isinstance(loss, ELBO):
                return loss.loss_and_grads(pair.model, pair.guide, *batch)
            value = -loss(log_terms(pair, *batch, num_particles=num_particles)).sum()
            value.backward()
            return value.item()

    return backward


def updating_step(
    backward: Backward, optimizer: torch.optim.Optimizer, clip_norm: float | None, average: Average | None = None
) -> Step:
    """Return the step that follows a backward pass by the mean per datum, clipping and the optimiser."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def step(*batch: Tensor, beta: float = 1.0) -> float | Tensor:
        # Before the pass, not after it: gradients that others left, or an interrupted step, must not enter.
        optimizer.zero_grad()
        failure: Exception | None = None
        size: float | Tensor = len(batch[0])
        try:
            # A process may have no share of a short last batch.
            total = backward(*batch, beta=beta) if size else 0.0
        except (ValueError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
            if average is None:
                raise
            # The other processes wait for this one's gradients: NaN tells them.
            failure, total = error, math.nan
        if average is not None:
            total, size = average(total, len(batch[0]))
        if failure is not None:
            raise failure
        later = isinstance(total, Tensor) and total.device.type in READ_LATER
        if not later and not math.isfinite(total):
            raise NonFiniteLossError(f"the loss is {float(total)}")
        gradients = [p.grad for p in parameters if p.grad is not None]
        # The division comes after the backward pass: a scale inside the program would enter RenyiELBO's logsumexp.
        torch._foreach_div_(gradients, size)
        norm = nn.utils.get_total_norm(gradients)
        if later:
            total = _without_bad_gradients(total, gradients, norm)
        elif not math.isfinite(norm):
            raise NonFiniteLossError(f"the loss is {float(total)}, the norm of its gradient {float(norm)}")
        if clip_norm is not None:
            nn.utils.clip_grads_with_norm_(parameters, clip_norm, norm)
        optimizer.step()
        optimizer.zero_grad()
        return total / size if later else float(total) / float(size)

    return step


def _without_bad_gradients(total: Any, gradients: list[Tensor], norm: Tensor) -> Tensor:
    """Zero the gradients of a loss that is not finite, on the device, and return the loss, or NaN."""
    bad = ~(torch.isfinite(total) & torch.isfinite(norm))
    for gradient in gradients:
        gradient.masked_fill_(bad, 0)
    # Clipping by a norm that is not finite would make them NaN again.
    norm.masked_fill_(bad, 0)
    return total.masked_fill(bad, math.nan)


def non_finite_sites(pair: Pair, *batch: Tensor) -> list[str]:
    """Return the sites whose log-density is not finite on a batch, model sites by name, guide sites as 'q(name)'."""
    with pyro.validation_enabled(False), torch.no_grad():
        trace = trace_pair(pair, *batch)
        return [
            form.format(name)
            for sites, form in ((trace.guide, "q({})"), (trace.model, "{}"))
            for name, site in sites.items()
            if not torch.isfinite(site.log_prob).all()
        ]
