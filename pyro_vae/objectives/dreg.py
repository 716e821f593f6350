"""The doubly reparameterised gradient of the importance-weighted bound, as one more of Pyro's ELBOs."""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from torch import Tensor, nn
from torch.func import functional_call

from pyro_vae.objectives.loss import PairLoss
from pyro_vae.pair.modes import device_of, rehearsal, to_pair
from pyro_vae.pair.pair import Pair, Program
from pyro_vae.pair.trace import (
    bare,
    check_same_latents,
    particle_dim,
    particle_plate,
    point_masses,
    sample_sites,
    site_log_prob,
)
from pyro_vae.runtime.random_state import own_random_state

__all__ = ["DReG"]


class DReG(PairLoss):
    """Maximise the importance-weighted bound with a gradient whose signal does not drown as K grows.

    ∇_θ:  Σ_k w̃_k ∂ log w_k / ∂θ          ∇_φ:  Σ_k w̃_k² ∂ log w_k / ∂z_k · ∂z_k / ∂φ,      w̃_k = w_k / Σ_j w_j

    The plain gradient for φ has a score term of mean zero whose noise outlives the signal; here a second
    reparameterisation has taken its place. The guide is scored again at its own draws with its parameters held fixed.
    Parameters that model and guide share are allowed: the guide's share is then doubly reparameterised, the model's is
    not, and the sum is the gradient of the whole.

    Args:
        num_particles: K.

    Raises:
        ValueError: while training, for a guide site without ``rsample``, one that cannot be scored again apart from its
            draw (a planar flow), a point mass whose place is learned, and programs that are not a pair's.

    Reference:
        Tucker, Lawson, Gu and Maddison (2019), Doubly reparameterized gradient estimators for Monte Carlo objectives,
        ICLR.

    >>> import pyro_vae as pv
    >>> pair, x = pv.models.VAE((4,), pv.StandardNormal(2)), torch.randn(32, 4)
    >>> run = pv.fit(pair, x, epochs=1, batch_size=16, loss=DReG(num_particles=8), progress=False)
    """

    def negative(self, pair: Pair, model: Program, guide: Program, *batch: Tensor) -> Tensor:
        """Return minus the bound summed over the data, a scalar whose gradient is the doubly reparameterised one."""
        dim = particle_dim(pair)
        with particle_plate(pair, self.num_particles):
            drawn = poutine.trace(guide).get_trace(*batch)
            _check_reparameterised(drawn)
            copies, taps = _copied(drawn)
            replayed = poutine.trace(poutine.replay(model, trace=copies)).get_trace(*batch)
        check_same_latents(drawn, replayed)
        log_joint: Any = sum(site_log_prob(site, dim) for site in sample_sites(replayed).values())
        log_weights = log_joint - _log_guide(pair, copies, taps, batch)
        normalised = log_weights.detach().softmax(0)
        for name, tap in taps.items():
            # A second factor w̃ on what reaches the draw, and only there: the model's parameters see one.
            tap.register_hook(_times(_aligned(normalised, drawn.nodes[name])))
        bound = torch.logsumexp(log_weights, 0) - math.log(self.num_particles)
        surrogate = (normalised * log_weights).sum()
        return (surrogate - bound.sum()).detach() - surrogate

    def check(self, pair: Pair, batch: tuple[Tensor, ...]) -> None:
        """Refuse a guide whose density at given draws changes from run to run, since it is scored twice."""
        few, dim = tuple(tensor[:2] for tensor in to_pair(pair, batch)), particle_dim(pair)
        scores = []
        with rehearsal(pair), particle_plate(pair, self.num_particles):
            with own_random_state(0, device_of(pair)):
                drawn = poutine.trace(type(pair).guide).get_trace(pair, *few)
            for seed in (1, 2):
                with own_random_state(seed, device_of(pair)):
                    again = poutine.trace(poutine.replay(type(pair).guide, trace=drawn)).get_trace(pair, *few)
                    scores.append({n: site_log_prob(site, dim) for n, site in sample_sites(again).items()})
        for name, first in scores[0].items():
            if not torch.equal(first, scores[1][name]):
                raise ValueError(
                    f"the guide's density at '{name}' changes from run to run at the same draws (it corrupts its data, "
                    "or drops units out), so that scoring twice is scoring two guides: use the objective iwae"
                )


def _times(factor: Tensor) -> Any:
    return lambda gradient: gradient * factor


def _copied(guide: Trace) -> tuple[Trace, dict[str, Tensor]]:
    """Return the trace with copies of its values, and the copies by site that carry a gradient.

    Being copies, they leave the graph in which later sites depend on earlier ones without a hook, so that no path is
    weighed twice, and a flow finds no cached inverse for them, which would hide their gradient.
    """
    copies, taps = guide.copy(), {}
    for name, site in sample_sites(guide).items():
        node = dict(site)
        node["value"] = site["value"].clone()
        copies.nodes[name] = node
        if node["value"].requires_grad:
            taps[name] = node["value"]
    return copies, taps


class _Scored(nn.Module):
    """log q of given values as a module, so that ``functional_call`` can put fixed parameters in for the pair's.

    The log-densities are taken inside the call, since a flow's transform is a module and reads its parameters then;
    the parameters are not announced to Pyro, since no optimiser must see the fixed ones.
    """

    def __init__(self, pair: Pair) -> None:
        super().__init__()
        self.pair = pair

    def forward(self, copies: Trace, *batch: Tensor) -> dict[str, Tensor]:
        guide = poutine.replay(type(self.pair).guide, trace=copies)
        with particle_plate(self.pair, _num_particles(copies)):
            scored = poutine.trace(guide).get_trace(self.pair, *batch)
        return {name: self._log_prob(name, site) for name, site in sample_sites(scored).items()}

    def _log_prob(self, name: str, site: Any) -> Tensor:
        try:
            return site_log_prob(site, particle_dim(self.pair))
        except (KeyError, NotImplementedError) as error:
            raise ValueError(_UNSCORED.format(name)) from error


_UNSCORED = (
    "the guide's site '{}' cannot be scored again apart from its draw, with the parameters held fixed: use the "
    "objective iwae, or transforms that have an inverse and keep nothing of the draw"
)


def _log_guide(pair: Pair, copies: Trace, taps: dict[str, Tensor], batch: tuple[Tensor, ...]) -> Tensor:
    """Return log q of the copies, (K, B), as a function of them alone."""
    fixed = {f"pair.{name}": parameter.detach() for name, parameter in pair.named_parameters()}
    parameters = {id(parameter) for parameter in pair.parameters()}
    terms = functional_call(_Scored(pair), fixed, (copies, *batch))
    for name, term in terms.items():
        if _leaves(term, taps) & parameters:
            # A transform may keep the draw's log-determinant, made with the parameters themselves.
            raise ValueError(_UNSCORED.format(name))
    total: Any = sum(terms.values())
    return total


def _num_particles(trace: Trace) -> int:
    site = next(iter(sample_sites(trace).values()))
    return next(frame.size for frame in site["cond_indep_stack"] if frame.name == "particles")


def _leaves(result: Tensor, taps: dict[str, Tensor]) -> set[int]:
    """Return the ids of the leaves that a result depends on, other than through the taps."""
    leaves, seen = set(), {tap.grad_fn for tap in taps.values()}
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


def _aligned(weights: Tensor, site: Any) -> Tensor:
    """Lay weights (K, B) out along the particles and data of a site's value."""
    dims = {frame.name: frame.dim for frame in site["cond_indep_stack"]}
    event = site["fn"].event_dim
    shape = [1] * (event - min(dims.values()))
    shape[dims["particles"] - event] = weights.shape[0]
    shape[dims["data"] - event] = weights.shape[1]
    return weights.reshape(shape)


def _check_reparameterised(guide: Trace) -> None:
    masses = point_masses(guide)
    for name, site in sample_sites(guide).items():
        if not site["fn"].has_rsample:
            raise ValueError(
                f"the guide's site '{name}' ({type(bare(site['fn'])).__name__}) has no rsample, its draws no "
                "gradient: train with Pyro's Trace_ELBO, TraceGraph_ELBO or TraceEnum_ELBO"
            )
        if name in masses and site["value"].requires_grad:
            raise ValueError(
                f"the guide's site '{name}' is a point mass at a learned place, which has no density to reparameterise "
                "twice: use the objective iwae"
            )
