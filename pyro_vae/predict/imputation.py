"""Draw the missing entries of data given the seen ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from pyro.distributions import MaskedDistribution
from torch import Tensor

from pyro_vae.inspection import inspect
from pyro_vae.inspection.arrays import takes_arrays
from pyro_vae.inspection.observed import dependent_on_x
from pyro_vae.pair.guided import with_guide
from pyro_vae.pair.modes import drawing, to_pair
from pyro_vae.pair.pair import Pair
from pyro_vae.pair.site import Site
from pyro_vae.pair.trace import PairTrace, run_guide, run_model, trace_pair
from pyro_vae.pair.weights import weight_sums
from pyro_vae.predict.generate import placeholder_for
from pyro_vae.runtime.memory import MEBIBYTE, chunk_sizes
from pyro_vae.runtime.random_state import derived_seed, fresh_seed
from pyro_vae.runtime.scalars import whole
from pyro_vae.runtime.threads import one_at_a_time

__all__ = ["Imputation", "impute"]


class Imputation(NamedTuple):
    """Completed data.

    The draws follow p(x_missing | x_seen) only as K or the number of sweeps rises. At finite ones they are biased
    towards the guide's draws; the bias is not estimated. It is small if ``ess`` is well above 1, or if results stay the
    same with twice the particles and sweeps.

    Args:
        samples: draws of the whole x, (S, B, …), equal to the data at seen entries.
        ess: effective sample size of the first importance sampling, (B,), between 1 and K.
        approximate: True if the guide fixes a site to a point mass. Sweeps are then pseudo-Gibbs, not exact.
    """

    samples: Tensor
    ess: Tensor
    approximate: bool

    def __repr__(self) -> str:
        chains, count = self.samples.shape[:2]
        text = (
            f"{chains} imputations of {count} data, effective candidates of the first draw: median "
            f"{float(self.ess.median()):.1f}, least {float(self.ess.min()):.1f}"
        )
        return text + ("; pseudo-Gibbs, not exact" if self.approximate else "; biased at finite K and sweeps")


@one_at_a_time
@takes_arrays
def impute(
    pair: Pair,
    x: Tensor,
    mask: Tensor,
    *conditions: Tensor,
    num_samples: int = 16,
    num_particles: int = 64,
    sweeps: int = 10,
    memory: int = 512 * MEBIBYTE,
    seed: int | None = None,
    proposal: Callable[..., Any] | None = None,
) -> Imputation:
    """Draw the missing part of x given the seen part.

    A chain fills x in by a draw from the model. Its first z is one of K draws of the guide at this x, chosen with
    weights p(x_seen, z) / q(z | x filled). A sweep draws z among the current one and K draws of the guide at the
    completed x, with weights p(x, z) / q(z | x). It then draws x_missing ~ p(x | z). Both steps leave
    p(z, x_missing | x_seen) invariant.

    Args:
        pair: any pair whose likelihood factorises over the entries of x.
        x: (B, …); its missing entries are not read.
        mask: True at seen entries, shaped as x or as one datum.
        conditions: the pair's conditions.
        num_samples: S, independent chains per datum, one draw from each.
        num_particles: K, candidates in each draw of z.
        sweeps: number of Gibbs sweeps.
        memory: bytes for a chunk of chains, beside the result. Seeded draws depend on it.
        seed: of the draws; fresh entropy without one. Calls with one seed share their noise: pass different seeds to
            calls whose results you combine.
        proposal: a program in the guide's place, called as the pair's guide is. A proposal fitted to each datum would
            need another fit for every completed x.

    Returns:
        :class:`Imputation`.

    Raises:
        ValueError: for a mask that is not boolean or of another shape, bad seen data, a likelihood that does not
            factorise, an observed site that depends on x, and a ``memory`` too small for one chain.

    Reference:
        Rezende, Mohamed and Wierstra (2014), Stochastic backpropagation, ICML; Andrieu, Doucet and Holenstein (2010),
        Particle Markov chain Monte Carlo methods, JRSS B 72, for the draw of z.
    """
    if mask.dtype != torch.bool or tuple(mask.shape) not in (tuple(x.shape), tuple(x.shape[1:])):
        raise ValueError(
            f"mask is {mask.dtype} of shape {tuple(mask.shape)}; it must be boolean, shaped as x or one datum"
        )
    num_samples, sweeps = whole(num_samples, "num_samples"), whole(sweeps, "sweeps")
    num_particles = whole(num_particles, "num_particles")
    if min(num_samples, num_particles) < 1 or sweeps < 0:
        raise ValueError("num_samples and num_particles must be at least 1, sweeps at least 0")
    if pair.max_plate_nesting > 1:
        raise ValueError(f"{type(pair).__name__} has plates of its own; impute knows the data plate only")
    pair = pair if proposal is None else with_guide(pair, proposal)
    mask = mask.expand_as(x)
    batch = (torch.where(mask, x, torch.zeros_like(x)), *conditions)
    x_site = inspect(pair, batch, seen=mask).x
    if conditions and (read := dependent_on_x(pair, *to_pair(pair, batch))):
        raise ValueError(
            f"the model's observed sites {list(read)} depend on x: its missing entries then follow more than p(x | z), "
            "which impute draws from; give the sites latents in place of x"
        )
    seen, mask, *others = to_pair(pair, (batch[0], mask, *conditions))
    # Each chain is a row: S copies of each datum, S × B in all.
    rows = torch.arange(len(x), device=seen.device).repeat(num_samples)
    chains = (seen[rows], mask[rows], *(tensor[rows] for tensor in others))
    seed = fresh_seed() if seed is None else seed

    def run(chunk: tuple[Tensor, ...], sweeps: int, start: int = 0) -> tuple[Tensor, Tensor, bool]:
        seen, mask, *conditions = chunk
        # Another stream than the chains', which would repeat the noise that drew this x.
        with drawing(pair, derived_seed(seed, "imputation", start)):
            begun = run_model(pair, placeholder_for(pair, len(seen)), *conditions, draw=(x_site.name,))
        filled = torch.where(mask, seen, begun[x_site.name].drawn)
        chain = _Chain(pair, filled, mask, tuple(conditions), num_particles)
        weights = chain.start()
        for _ in range(sweeps):
            chain.sweep()
        return chain.x, weights, chain.approximate

    with drawing(pair, seed):
        unit = f"one chain and its {num_particles} candidates"
        size, _ = chunk_sizes(lambda chunk, _: run(chunk, min(sweeps, 1)), chains, 1, memory, unit, len(rows))
        starts = range(0, len(rows), size)
        parts = [run(tuple(tensor[i : i + size] for tensor in chains), sweeps, i) for i in starts]
    weights = torch.cat([part[1] for part in parts], 1)
    ess = weight_sums(weights).ess
    samples = torch.cat([part[0] for part in parts]).unflatten(0, (num_samples, len(x)))
    return Imputation(samples, ess.view(num_samples, -1).mean(0), parts[0][2])


class _Chain:
    """A Markov chain over (z, x_missing) for each row of x."""

    def __init__(self, pair: Pair, x: Tensor, mask: Tensor, conditions: tuple[Tensor, ...], num_particles: int) -> None:
        self.pair, self.x, self.mask, self.conditions, self.num_particles = pair, x, mask, conditions, num_particles
        self.current: dict[str, Tensor] = {}
        self.approximate = False

    def start(self) -> Tensor:
        """Draw the first z by weights of the seen part alone, then complete x. Return the log-weights (K, B)."""
        trace = self._propose(self.num_particles)
        seen = torch.where(self.mask, _entrywise(trace.x), 0.0).flatten(2).sum(-1)
        weights = trace.terms.log_weights - trace.x.log_prob + seen
        self._choose(trace, weights)
        return weights

    def sweep(self) -> None:
        """Draw z among the current one and K proposals, then the missing part of x."""
        size = self.num_particles + 1
        proposed = self._propose(size).guide
        values = {name: site.drawn for name, site in proposed.items()}
        for name, value in self.current.items():
            site = proposed[name]
            values[name] = site.as_drawn(torch.cat([value.unsqueeze(0), site.value[1:]]))
        # Scored again: the guide's later sites may depend on the current values of earlier ones.
        guide = run_guide(self.pair, self.x, *self.conditions, num_particles=size, values=values)
        values = {name: site.drawn for name, site in guide.items()}
        model = run_model(self.pair, self.x, *self.conditions, num_particles=size, values=values)
        trace = PairTrace(guide, model, self.x)
        self._choose(trace, trace.terms.log_weights)

    def _propose(self, size: int) -> PairTrace:
        return trace_pair(self.pair, self.x, *self.conditions, num_particles=size)

    def _choose(self, trace: PairTrace, log_weights: Tensor) -> None:
        chosen = torch.distributions.Categorical(logits=log_weights.mT).sample()
        rows = torch.arange(len(self.x), device=self.x.device)
        self.approximate = bool(trace.point_masses)
        self.current = {name: site.value[chosen, rows] for name, site in trace.latents.items()}
        drawn = trace.x.fn.sample()[chosen, rows]
        self.x = torch.where(self.mask, self.x, drawn)


def _entrywise(site: Site) -> Tensor:
    """Return log p of each entry of x, (K, B, …), zero where a mask leaves it out."""
    distribution = site.fn
    while isinstance(distribution, MaskedDistribution):
        distribution = distribution.base_dist
    if not isinstance(distribution, torch.distributions.Independent) or distribution.base_dist.event_shape:
        raise ValueError(
            f"site '{site.name}' has a {type(distribution).__name__} likelihood: impute needs one that factorises "
            "over the entries of x, a .to_event() of univariate distributions"
        )
    log_prob, scored = distribution.base_dist.log_prob(site.drawn), site.scored
    return log_prob if scored is None else torch.where(scored, log_prob, 0.0)
