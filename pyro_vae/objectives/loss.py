"""Losses that need more of a pair than its log-terms, and the checks of every loss."""

from __future__ import annotations

import abc
from typing import Any, TypeAlias

import torch
from pyro.infer import (
    ELBO,
    EnergyDistance,
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_vae.distributions.batch_optimal import BatchOptimalNormal
from pyro_vae.inspection import Inspection
from pyro_vae.objectives.bounds import Objective, beta_elbo, capacity_elbo, elbo, free_bits, renyi
from pyro_vae.objectives.reconstruction import MASKED_AROUND
from pyro_vae.pair.modes import device_of
from pyro_vae.pair.pair import Pair, Program
from pyro_vae.pair.terms import LogTerms, SiteTerms
from pyro_vae.pair.trace import PairTrace, pyro_traces
from pyro_vae.runtime.random_state import own_random_state

__all__ = ["WEIGHED", "Loss", "PairLoss", "check_is_loss", "check_loss"]


class PairLoss(ELBO, abc.ABC):
    """A Pyro ELBO with access to the pair.

    Most objectives are functions of :class:`~pyro_vae.LogTerms`. Subclass this for one that needs more, e.g. the
    guide's distributions. Write :meth:`negative`, and :meth:`check` if some pairs must be refused. The loss then trains
    in :func:`~pyro_vae.fit` and in Pyro's ``SVI``.

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
        """Return the loss to minimise, summed over the data: a scalar with its gradient, in nats."""

    def check(self, inspection: Inspection, batch: tuple[Tensor, ...]) -> None:
        """Refuse a pair, or training data, that this loss cannot take. ``fit`` calls it before the first step."""

    def loss(self, model: Program, guide: Program, *batch: Tensor) -> float:
        """Return the loss summed over the data, in nats."""
        with torch.no_grad():
            return self.differentiable_loss(model, guide, *batch).item()

    def loss_and_grads(self, model: Program, guide: Program, *batch: Tensor) -> float:
        """Return the loss summed over the data, in nats, and accumulate its gradient in the parameters."""
        loss = self.differentiable_loss(model, guide, *batch)
        loss.backward()
        return loss.item()

    def differentiable_loss(self, model: Program, guide: Program, *batch: Tensor) -> Tensor:
        """Return the loss summed over the data, a scalar with its gradient."""
        if not isinstance(guide, Program) or not isinstance(model, Program):
            raise ValueError(f"{type(self).__name__} reaches the pair itself: give it pair.model, pair.guide")
        return self.negative(guide.pair, model, guide, *batch)

    def _get_trace(self, model: Program, guide: Program, args: Any, kwargs: Any) -> tuple[Trace, Trace]:
        # Pyro's base class requires it.
        drawn, replayed = pyro_traces(guide.pair, model, guide, *args, num_particles=self.num_particles)
        return replayed, drawn


Loss: TypeAlias = ELBO | Objective
# The losses that have a divergence for β to weigh.
WEIGHED = (Trace_ELBO, TraceGraph_ELBO, TraceEnum_ELBO)


def check_is_loss(loss: object) -> None:
    """Refuse what is no loss, and what only makes one.

    Raises:
        ValueError: with the way to write it.
    """
    ways = "pass pv.objectives.elbo, another objective, or an ELBO of Pyro such as Trace_ELBO()"
    if isinstance(loss, str):
        raise ValueError(f"loss is the text {loss!r}, and no loss: {ways}")
    if isinstance(loss, type):
        raise ValueError(f"loss is the class {loss.__name__}: call it with its settings, as in Trace_ELBO()")
    if loss in (beta_elbo, capacity_elbo, free_bits, renyi):
        name = getattr(loss, "__name__", "")
        raise ValueError(f"loss is {name}, which makes an objective: call it with its numbers, as in renyi(0.5)")
    # Pyro's EnergyDistance can be called, and bounds nothing.
    if not isinstance(loss, ELBO) and (not callable(loss) or isinstance(loss, EnergyDistance)):
        raise ValueError(f"loss is of type {type(loss).__name__}, and no loss: {ways}")


def check_loss(
    inspection: Inspection, loss: Loss, batch: tuple[Tensor, ...], *, num_particles: int, uses_beta: bool
) -> None:
    """Refuse a loss that would silently train on something else.

    Args:
        inspection: of the pair.
        loss: the loss.
        batch: the training data and conditions.
        num_particles: K as passed to ``fit``.
        uses_beta: whether ``fit`` was passed β or a warm-up.

    Raises:
        ValueError: for a Pyro loss that cannot see the pair's parameters, K for a Pyro ELBO, β for a loss without a
            divergence to weight, a bound of several draws with K = 1, a mask around a batch-optimal scale, closed
            divergences if their conditions fail, an objective that does not return one number per datum, and one
            without a gradient through the guide's draws.
    """
    name = getattr(loss, "__name__", type(loss).__name__)
    if name.startswith("Jit") or isinstance(loss, ReweightedWakeSleep):
        raise ValueError(f"{name} looks parameters up in Pyro's store or has two losses: use it in a loop of your own")
    if isinstance(loss, ELBO) and num_particles != 1:
        raise ValueError(f"num_particles is {num_particles}; a Pyro ELBO holds its own: {name}(…)")
    if isinstance(loss, RenyiELBO) and loss.num_particles == 1:
        raise ValueError(_ONE_DRAW.format(name))
    if uses_beta and not isinstance(loss, WEIGHED):
        raise ValueError(
            f"beta weighs the divergence of Pyro's ELBOs; {name} has no such term: leave beta at 1, or use the "
            "objective beta_elbo(beta)"
        )
    # As the pair trains: it may sample other sites then, which this run refuses.
    trace = inspection.training
    for site in trace.model.values():
        if site.scored is not None and isinstance(site.bare, BatchOptimalNormal):
            raise ValueError(MASKED_AROUND.format(f"site '{site.name}'"))
    if isinstance(loss, TraceMeanField_ELBO):
        _check_order(list(trace.guide), [name for name, site in trace.model.items() if not site.is_observed])
        _check_reparameterised(trace)
    if isinstance(loss, PairLoss):
        loss.check(inspection, batch)
    if not isinstance(loss, ELBO):
        _check_reparameterised(trace)
        with own_random_state(0, device_of(inspection.pair)), torch.no_grad():
            value = loss(trace.terms)
        _check_shape(name, value, len(trace.data))
        if loss is not elbo and num_particles == 1 and _needs_draws(loss, trace.terms, value):
            raise ValueError(_ONE_DRAW.format(name))
        # fit moves and saves the numbers that are modules of the pair, and no others.
        if (annealed := getattr(loss, "annealed", None)) is not None and annealed not in list(
            inspection.pair.modules()
        ):
            raise ValueError(
                f"{getattr(loss, '__name__', 'the objective')} follows a number that is no module of the pair, and "
                "nothing would move it: store it as an attribute of the pair"
            )


_ONE_DRAW = (
    "{} of one draw per datum is the ELBO, and the run would be the ELBO's: ask for more draws (num_particles=5), or "
    "for the ELBO itself (loss=pv.objectives.elbo)"
)


def _needs_draws(loss: Objective, terms: LogTerms, value: Tensor) -> bool:
    """Whether an objective is the ELBO at one draw, and another number at two."""
    with torch.no_grad():
        if not torch.allclose(value, elbo(terms), rtol=1e-5):
            return False
        latents = {
            name: SiteTerms(site.log_model.expand(2, -1), site.log_guide.expand(2, -1))
            for name, site in terms.latents.items()
        }
        # Weights far apart, by the likelihood: a nat would be lost among thousands.
        log_lik = torch.cat([terms.log_lik, terms.log_lik + 1 + terms.log_lik.abs()])
        two = LogTerms(log_lik, terms.log_prior.expand(2, -1), terms.log_guide.expand(2, -1), latents)
        return not torch.allclose(loss(two), elbo(two), rtol=1e-5)


def _check_shape(name: str, value: object, size: int) -> None:
    shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
    if shape != (size,):
        raise ValueError(
            f"{name} returns {shape} for {size} data; an objective returns one number per datum, ({size},): reduce "
            "over the particles, the first dimension, and over nothing else"
        )


def _check_order(guide: list[str], model: list[str]) -> None:
    if guide != model:
        raise ValueError(
            f"TraceMeanField_ELBO closes each site's divergence by itself, which is wrong where a site of the guide "
            f"depends on an earlier draw; the guide samples {guide}, the model {model}: use Trace_ELBO, or sample in "
            "the model's order where nothing depends on it"
        )


def _check_reparameterised(trace: PairTrace) -> None:
    for name, site in trace.guide.items():
        if not site.is_reparameterised:
            raise ValueError(
                f"the guide's site '{name}' ({site.family}) has no rsample, and this loss's gradient would leave out "
                "the dependence of its draws on the parameters: train with Pyro's Trace_ELBO, TraceGraph_ELBO (lower "
                "variance) or TraceEnum_ELBO (sums over it)"
            )
