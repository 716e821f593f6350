"""One training step, run eagerly, and the parts that every kind of step shares.

A :class:`Step` runs the guide and the model on one batch, takes the gradient of the loss, and lets the optimiser move
the parameters. It returns the mean loss per datum, in nats. ``fit`` only calls steps. To add a faster kind, write
another function that returns a ``Step``, as :mod:`pyro_vae.training.captured_step` does.

Reading a scalar from a GPU synchronises. On a GPU a step may therefore return its loss as a tensor, for ``fit`` to read
later. If that loss is not finite, the step passes zero gradients to the optimiser.
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
from pyro_vae.runtime.batches import Batch, unpacked

__all__ = [
    "READ_LATER",
    "Average",
    "NonFiniteLossError",
    "Step",
    "eager_backward",
    "eager_step",
    "non_finite_sites",
    "updating_step",
]


class NonFiniteLossError(ValueError):
    """The loss of a batch, or the norm of its gradient, is NaN or infinite; the parameters have not moved."""


# Types of device on which losses are not read back at every step.
READ_LATER = {"cuda"}


class Step(Protocol):
    """Move the parameters once, by one batch; return the mean loss per datum, in nats.

    Call it with ``x`` and the pair's conditions, ``step(x, condition)``, or with one
    :class:`~pyro_vae.runtime.batches.Batch`. ``beta`` multiplies log p(z) − log q(z | x).

    On a CPU a loss or gradient that is not finite raises :class:`NonFiniteLossError`, and no parameter moves. On a GPU
    the step returns the loss as a tensor () without synchronising: NaN then marks such a batch.
    """

    def __call__(self, *batch: Tensor | Batch, beta: float = 1.0) -> float | Tensor: ...


class Average(Protocol):
    """Combine the gradients of several processes that have each run the backward pass on a share of the batch.

    Put sums over processes into ``p.grad``; return the sums of the loss and of the number of data, whose ratio is the
    mean loss. If the loss is not finite in one process, every process gets a sum that is not finite.
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
    """Return the reference step, which runs Pyro eagerly: ``loss.loss_and_grads``, as ``SVI.step`` does.

    The gradient is that of the mean loss per datum. Clipping is by its global norm.

    Args:
        pair: the pair to train.
        loss: any Pyro ELBO, or an objective, i.e. a function of log-terms to maximise.
        optimizer: a torch optimiser over the pair's parameters.
        num_particles: draws per datum for an objective; a Pyro ELBO has an argument of that name.
        clip_norm: largest global norm of the gradient; None for no clipping.
        average: combines the gradients of several processes.

    Returns:
        A :class:`Step`.

    >>> import pyro_vae as pv
    >>> pair = pv.models.LinearGaussianVAE(3, 1)
    >>> step = eager_step(pair, pyro.infer.Trace_ELBO(), torch.optim.SGD(pair.parameters(), lr=0.1))
    >>> x = torch.randn(8, 3)
    >>> losses = [step(x) for _ in range(20)]
    >>> losses[-1] < losses[0]
    True
    """
    return updating_step(eager_backward(pair, loss, num_particles), optimizer, clip_norm, average)


class Backward(Protocol):
    """Put the gradient of a batch's summed loss into ``p.grad``; return that loss, in nats."""

    def __call__(self, *batch: Tensor, beta: float = 1.0) -> float | Tensor: ...


def eager_backward(pair: Pair, loss: Loss, num_particles: int = 1) -> Backward:
    """Return the forward and backward pass through a Pyro ELBO or an objective, run eagerly."""

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
    """Return the step that runs a backward pass, divides by the number of data, clips and updates."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def step(*batch: Tensor | Batch, beta: float = 1.0) -> float | Tensor:
        tensors = unpacked(batch)
        # Before the pass: an interrupted step, or other code, may have left gradients.
        optimizer.zero_grad()
        failure: Exception | None = None
        size: float | Tensor = len(tensors[0])
        try:
            # A process may have no share of a short last batch.
            total = backward(*tensors, beta=beta) if size else 0.0
        except (ValueError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
            if average is None:
                raise
            # The other processes wait for this one's gradients; NaN tells them.
            failure, total = error, math.nan
        if average is not None:
            total, size = average(total, len(tensors[0]))
        if failure is not None:
            raise failure
        later = isinstance(total, Tensor) and total.device.type in READ_LATER
        if not later and not math.isfinite(total):
            raise NonFiniteLossError(f"the loss is {float(total)}")
        gradients = [p.grad for p in parameters if p.grad is not None]
        # After the backward pass: a scale inside the program would enter RenyiELBO's logsumexp.
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
    """Zero the gradients of a loss that is not finite, without synchronising; return the loss, or NaN."""
    bad = ~(torch.isfinite(total) & torch.isfinite(norm))
    for gradient in gradients:
        gradient.masked_fill_(bad, 0)
    # Clipping by a NaN norm would make them NaN again.
    norm.masked_fill_(bad, 0)
    return total.masked_fill(bad, math.nan)


def non_finite_sites(pair: Pair, *batch: Tensor) -> list[str]:
    """Return the sites whose log-density is not finite on a batch; a site of the guide is named 'q(name)'."""
    with pyro.validation_enabled(False), torch.no_grad():
        trace = trace_pair(pair, *batch)
        return [
            form.format(name)
            for sites, form in ((trace.guide, "q({})"), (trace.model, "{}"))
            for name, site in sites.items()
            if not torch.isfinite(site.log_prob).all()
        ]
