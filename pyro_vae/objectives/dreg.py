"""The doubly reparameterised gradient of the importance-weighted bound, as a Pyro ELBO."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from pyro_vae.inspection import Inspection
from pyro_vae.objectives.loss import PairLoss
from pyro_vae.pair.agreement import check_same_latents
from pyro_vae.pair.modes import rehearsal
from pyro_vae.pair.pair import Pair, Program
from pyro_vae.pair.site import Site
from pyro_vae.pair.trace import run_guide, run_program

__all__ = ["DReG"]


class DReG(PairLoss):
    """Maximise the importance-weighted bound with a gradient that is not lost in noise as K grows.

    ∇_θ:  Σ_k w̃_k ∂ log w_k / ∂θ          ∇_φ:  Σ_k w̃_k² ∂ log w_k / ∂z_k · ∂z_k / ∂φ,      w̃_k = w_k / Σ_j w_j

    The plain gradient for φ has a score term of mean zero; with many particles its noise hides the signal. A second
    reparameterisation replaces this term. To do so, the guide is scored again at its draws with fixed parameters.
    Model and guide may share parameters: the gradient through the guide is doubly reparameterised, the one through the
    model is not.

    Args:
        num_particles: K.

    Raises:
        ValueError: while training, for a guide site without ``rsample``, a site that cannot be scored apart from its
            draw (a planar flow), a learned point mass, and programs that are not a pair's.

    Reference:
        Tucker, Lawson, Gu and Maddison (2019), Doubly reparameterized gradient estimators for Monte Carlo objectives,
        ICLR.

    >>> import pyro_vae as pv
    >>> pair, x = pv.models.VAE((4,), pv.StandardNormal(2)), torch.randn(32, 4)
    >>> run = pv.fit(pair, x, epochs=1, batch_size=16, loss=DReG(num_particles=8), progress=False)
    """

    def negative(self, pair: Pair, model: Program, guide: Program, *batch: Tensor) -> Tensor:
        """Return minus the bound, summed over the data, with the doubly reparameterised gradient."""
        drawn = run_program(pair, guide, *batch, num_particles=self.num_particles)
        _check_reparameterised(drawn)
        # Hooks go on copies: the draws themselves feed later sites, and such a path would be weighted twice. A flow
        # finds no cached inverse for a copy; the cache would hide its gradient.
        copies = {name: site.drawn.clone() for name, site in drawn.items()}
        replayed = run_program(pair, model, *batch, num_particles=self.num_particles, values=copies)
        check_same_latents(drawn, replayed)
        log_joint: Any = sum(site.log_prob for site in replayed.values())
        log_weights = log_joint - _log_guide(pair, copies, self.num_particles, batch)
        normalised = log_weights.detach().softmax(0)
        for name, copy in copies.items():
            # A second factor w̃ on the draw's gradient alone; the model's parameters see one.
            if copy.requires_grad:
                copy.register_hook(_times(drawn[name].broadcast(normalised)))
        bound = torch.logsumexp(log_weights, 0) - math.log(self.num_particles)
        surrogate = (normalised * log_weights).sum()
        return (surrogate - bound.sum()).detach() - surrogate

    def check(self, inspection: Inspection, batch: tuple[Tensor, ...]) -> None:
        """Refuse a guide whose density at fixed draws changes from run to run: it is scored twice."""
        pair, values = inspection.pair, {name: site.drawn for name, site in inspection.training.guide.items()}
        scores = []
        for seed in (1, 2):
            with rehearsal(pair, seed):
                again = run_guide(pair, *inspection.batch, num_particles=1, values=values)
                scores.append({name: site.log_prob for name, site in again.items()})
        for name, first in scores[0].items():
            if not torch.equal(first, scores[1][name]):
                raise ValueError(
                    f"the guide's density at '{name}' changes from run to run at the same draws (it corrupts its data, "
                    "or drops units out); DReG scores it twice and needs one density: use the objective iwae"
                )


def _times(factor: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda gradient: gradient * factor


class _Scored(nn.Module):
    """Score given values under the guide, as a module for ``functional_call`` with fixed parameters.

    The log-densities are computed inside the call, where a flow's transforms read their parameters. The guide runs as
    a plain function: Pyro's optimisers must not see the fixed parameters.
    """

    def __init__(self, pair: Pair) -> None:
        super().__init__()
        self.pair = pair

    def forward(self, copies: dict[str, Tensor], num_particles: int, *batch: Tensor) -> dict[str, Tensor]:
        scored = run_guide(self.pair, *batch, num_particles=num_particles, values=copies)
        return {name: self._log_prob(site) for name, site in scored.items()}

    @staticmethod
    def _log_prob(site: Site) -> Tensor:
        try:
            return site.log_prob
        except (KeyError, NotImplementedError) as error:
            raise ValueError(_UNSCORED.format(site.name)) from error


_UNSCORED = (
    "the guide's site '{}' cannot be scored again apart from its draw, with the parameters held fixed: use the "
    "objective iwae, or transforms that have an inverse and cache nothing of the draw"
)


def _log_guide(pair: Pair, copies: dict[str, Tensor], num_particles: int, batch: tuple[Tensor, ...]) -> Tensor:
    """Return log q of the copies, (K, B), with a gradient for them alone."""
    fixed = {f"pair.{name}": parameter.detach() for name, parameter in pair.named_parameters()}
    parameters = {id(parameter) for parameter in pair.parameters()}
    terms = functional_call(_Scored(pair), fixed, (copies, num_particles, *batch))
    for name, term in terms.items():
        if _leaves(term, copies) & parameters:
            # A transform may cache the draw's log-determinant, computed with the parameters themselves.
            raise ValueError(_UNSCORED.format(name))
    total: Any = sum(terms.values())
    return total


def _leaves(result: Tensor, copies: dict[str, Tensor]) -> set[int]:
    """Return the ids of the leaves that a result depends on, other than through the copies."""
    leaves, seen = set(), {copy.grad_fn for copy in copies.values() if copy.requires_grad}
    pending = [result.grad_fn]
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.add(id(node.variable))
        pending.extend(parent for parent, _ in node.next_functions)
    return leaves


def _check_reparameterised(guide: Mapping[str, Site]) -> None:
    for name, site in guide.items():
        if not site.is_reparameterised:
            raise ValueError(
                f"the guide's site '{name}' ({site.family}) has no rsample, its draws no "
                "gradient: train with Pyro's Trace_ELBO, TraceGraph_ELBO or TraceEnum_ELBO"
            )
        if site.is_point_mass and site.drawn.requires_grad:
            raise ValueError(
                f"the guide's site '{name}' is a point mass at a learned place, which has no density to reparameterise "
                "twice: use the objective iwae"
            )
