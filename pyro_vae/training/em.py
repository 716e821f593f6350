"""``em``: expectation–maximisation as coordinate ascent on the ELBO, for pairs whose posterior is exact."""

from __future__ import annotations

import math
import time
from typing import Any, NamedTuple, Protocol, runtime_checkable

import pyro
import torch
from torch import Tensor

from pyro_vae.inspection import inspect
from pyro_vae.inspection.arrays import takes_arrays
from pyro_vae.pair.modes import to_pair
from pyro_vae.pair.pair import Pair, programs_after
from pyro_vae.runtime.threads import one_at_a_time

__all__ = ["ExpectationMaximisation", "HasExactSteps", "em"]


@runtime_checkable
class HasExactSteps(Protocol):
    """A pair that knows its posterior and maximises over its parameters in closed form.

    ``e_step`` returns the posterior q = p(z | x) at the current parameters. ``elbo`` returns the bound of any such q,
    (B,), in nats. ``m_step`` sets the parameters that maximise Σ_b ELBO_b at this q.
    """

    def e_step(self, x: Tensor) -> Any: ...

    def elbo(self, x: Tensor, q: Any) -> Tensor: ...

    def m_step(self, x: Tensor, q: Any) -> None: ...


class ExpectationMaximisation(NamedTuple):
    """The trained pair and the ELBO after each step, in nats per datum.

    ``after_e`` are the ELBOs after the E-steps, where they equal log p(x). ``after_m`` are those after the M-steps, at
    the same posterior: after_e[i] ≤ after_m[i] ≤ after_e[i + 1]. There is one E-step more than there are M-steps.
    ``seconds`` is the time since the start, for each of ``after_e``.
    """

    pair: Pair
    after_e: list[float]
    after_m: list[float]
    seconds: list[float]
    converged: bool


@one_at_a_time
@takes_arrays
def em(pair: Pair, x: Tensor, *, steps: int = 200, tolerance: float = 1e-7) -> ExpectationMaximisation:
    """Train a pair by expectation–maximisation, coordinate ascent on its ELBO.

    E-step  q ← p(z | x; θ), which closes the gap: ELBO(q, θ) = log p(x; θ)
    M-step  θ ← argmax_θ Σ_b ELBO_b(q, θ)

    Neither step lowers Σ_b ELBO_b(q, θ): the log-likelihood never falls. The pair is trained in place.

    Args:
        pair: a pair with the methods of :class:`HasExactSteps`: ``LinearGaussianVAE``, ``GaussianMixture``.
        x: all data, (N, …).
        steps: largest number of M-steps.
        tolerance: the ascent has converged once a step gains less than this in mean log p(x), in nats; 0 takes every
            step.

    Returns:
        :class:`ExpectationMaximisation`.

    Raises:
        ValueError: for a pair without exact steps, or with those of another model, bad data, fewer than one step, a
            negative tolerance.

    Reference:
        Neal and Hinton (1998), A view of the EM algorithm that justifies incremental, sparse, and other variants,
        Learning in Graphical Models.

    >>> import pyro_vae as pv
    >>> run = em(pv.models.LinearGaussianVAE(3, 1), torch.randn(50, 3), steps=20)
    >>> run.after_e == sorted(run.after_e)
    True
    """
    if not isinstance(pair, HasExactSteps):
        raise ValueError(
            f"{type(pair).__name__} has no exact steps: give it the methods e_step, elbo and m_step (see "
            "pyro_vae.training.em.HasExactSteps), or train it with pv.fit"
        )
    for method in ("e_step", "elbo", "m_step"):
        if changed := programs_after(pair, method):
            raise ValueError(
                f"{type(pair).__name__} inherits {method} from a class with another "
                f"{' and another '.join(changed)}: define {method} beside it, or train it with pv.fit"
            )
    if steps < 1:
        raise ValueError(f"steps is {steps}; it must be at least 1")
    if not tolerance >= 0:
        raise ValueError(f"tolerance is {tolerance}; it is a gain in nats and cannot be negative")
    trace = inspect(pair, (x,)).trace
    if masked := sorted(name for name, site in trace.model.items() if site.scored is not None):
        raise ValueError(
            f"{masked} are masked, which exact steps do not see: train with pv.fit, which scores what the mask leaves"
        )
    (x,) = to_pair(pair, (x,))
    after_e: list[float] = []
    after_m: list[float] = []
    seconds: list[float] = []
    converged = False
    start = time.perf_counter()
    # No validation: a collapse raises below, with a clearer message.
    with torch.no_grad(), pyro.validation_enabled(False):
        while True:
            q = pair.e_step(x)
            after_e.append(_mean(pair, x, q))
            seconds.append(time.perf_counter() - start)
            converged = len(after_e) > 1 and after_e[-1] - after_e[-2] < tolerance
            if converged or len(after_m) == steps:
                return ExpectationMaximisation(pair, after_e, after_m, seconds, converged)
            pair.m_step(x, q)
            after_m.append(_mean(pair, x, q))


def _mean(pair: HasExactSteps, x: Tensor, q: Any) -> float:
    value = float(pair.elbo(x, q).double().mean())
    if not math.isfinite(value):
        raise ValueError(
            f"the ELBO is {value}: a component or a scale has collapsed onto a point; take fewer components, or data "
            "without repeated rows"
        )
    return value
