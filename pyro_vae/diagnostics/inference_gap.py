"""The gap log p(x) − ELBO, split into approximation and amortisation."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal

from pyro_vae.inspection import inspect
from pyro_vae.inspection.arrays import takes_arrays
from pyro_vae.likelihood.fitting.flat import FlatLatents
from pyro_vae.likelihood.importance import log_likelihood
from pyro_vae.likelihood.psis import trust_threshold
from pyro_vae.likelihood.weights import WeightStream
from pyro_vae.pair.modes import chunks, drawing, to_pair
from pyro_vae.pair.pair import Pair
from pyro_vae.pair.site import Site, scored_entries
from pyro_vae.pair.trace import log_terms, run_model, trace_pair
from pyro_vae.runtime.memory import CHUNK
from pyro_vae.runtime.scalars import whole
from pyro_vae.runtime.threads import one_at_a_time

__all__ = ["InferenceGap", "inference_gap"]

# Particles per chunk of an estimate, and per step of the ascent.
SLICE, STEP_PARTICLES = 50, 8
# Adam's first step, in units of the guide's scale; it falls to zero along a half cosine.
FIRST_STEP = 0.1
# Latents of one datum up to which a full covariance is fitted: more take more memory than the draws.
MOST_LATENTS = 128


class InferenceGap(NamedTuple):
    """log p(x) − ELBO per datum and its two parts, each (B,), in nats.

    Args:
        log_likelihood: estimate of log p(x). The proposal is a Gaussian over all latents with full covariance, fitted
            to each datum. Above 128 latents, and under masks, it is the best member of the guide's family.
        best_elbo: ELBO of that member.
        elbo: ELBO of the guide.
        approximation: log p(x) − ``best_elbo``.
        approximation_error: its Monte Carlo error; ∞ where ``pareto_k`` is too large to know it, NaN for K < 25.
        amortisation: ``best_elbo`` − ``elbo``.
        amortisation_error: its Monte Carlo error.
        pareto_k: of the weights behind ``log_likelihood``. Above min(1 − 1/log10 K, 0.7) trust neither it nor
            ``approximation``; see :class:`~pyro_vae.LogLikelihood`.
    """

    log_likelihood: Tensor
    best_elbo: Tensor
    elbo: Tensor
    approximation: Tensor
    approximation_error: Tensor
    amortisation: Tensor
    amortisation_error: Tensor
    pareto_k: Tensor

    def __repr__(self) -> str:
        count = len(self.elbo)
        parts = [
            f"{name} {float(gap.mean()):.3f} ± {float((error**2).sum().sqrt()) / count:.3f}"
            for name, gap, error in (
                ("approximation", self.approximation, self.approximation_error),
                ("amortisation", self.amortisation, self.amortisation_error),
            )
        ]
        text = f"log p(x) − ELBO in nats (mean over {count} data ± Monte Carlo error): {', '.join(parts)}"
        text += f"; largest k̂ {float(self.pareto_k.max()):.2f}"
        if unknown := int(self.approximation_error.isinf().sum()):
            text += f"; the approximation gap of {unknown} data is unknown (k̂): raise num_particles, or anneal them"
        return text


@one_at_a_time
@takes_arrays
def inference_gap(
    pair: Pair,
    *batch: Tensor,
    num_particles: int = 1000,
    steps: int = 1000,
    seed: int | None = None,
    proposal: Literal["joint", "auto"] = "joint",
) -> InferenceGap:
    """Split log p(x) − ELBO into an approximation gap and an amortisation gap.

    log p(x) − ELBO(q) = [log p(x) − max_q* ELBO(q*)] + [max_q* ELBO(q*) − ELBO(q)],   q* over the family, per datum

    The first part is due to the guide's family, the second to its encoder. Gradient ascent on each datum's means and
    scales, from the guide's, finds q*. The gradient leaves out the score term: it has no noise at the posterior.

    A q* that misses correlations is too narrow a proposal for log p(x). A Gaussian with full covariance is therefore
    fitted in the same way, from q*, and log p(x) is estimated with draws from it.

    Args:
        pair: any pair whose guide is Gaussian or a point mass at every site, given x alone.
        batch: ``x`` (B, …) and the pair's conditions.
        num_particles: K, draws for each of the three estimates.
        steps: number of steps of each ascent.
        seed: of the draws; fresh entropy without one. Calls with one seed share their noise: pass different seeds to
            calls whose errors you combine.
        proposal: for log p(x): "joint", the Gaussian with full covariance, or "auto", as for
            :func:`~pyro_vae.log_likelihood`.

    Returns:
        :class:`InferenceGap`.

    Raises:
        ValueError: for bad data, K < 2, ``steps`` < 1, a site of another family, and a site that depends on an earlier
            draw: it has no best member per datum.

    Reference:
        Cremer, Li and Duvenaud (2018), Inference suboptimality in variational autoencoders, ICML; Roeder, Wu and
        Duvenaud (2017), Sticking the landing, NeurIPS, for the gradient.

    >>> import pyro_vae as pv
    >>> gap = inference_gap(pv.models.LinearGaussianVAE(5, 2), torch.randn(3, 5), num_particles=50, steps=5)
    >>> bool((gap.approximation.abs() < 1e-3).all())
    True
    """
    inspect(pair, batch)
    num_particles, steps = whole(num_particles, "num_particles"), whole(steps, "steps")
    if proposal not in ("joint", "auto"):
        raise ValueError(f"proposal is {proposal!r}; it must be 'joint' or 'auto'")
    if num_particles < 2 or steps < 1:
        raise ValueError(f"num_particles is {num_particles}, steps {steps}: they must be at least 2 and 1")
    with drawing(pair, seed):
        parts = [_split(pair, chunk, num_particles, steps) for chunk in chunks(to_pair(pair, batch), CHUNK)]
    gap = InferenceGap(*(torch.cat(fields).cpu() for fields in zip(*parts, strict=True)))
    return gap if proposal == "joint" else _settled(gap, pair, batch, num_particles, seed)


def _settled(
    gap: InferenceGap, pair: Pair, batch: tuple[Tensor, ...], num_particles: int, seed: int | None
) -> InferenceGap:
    """Return the gap with another estimate of log p(x)."""
    ll = log_likelihood(pair, *batch, num_particles=num_particles, seed=seed, progress=False)
    # The amortisation gap's error is no smaller than that of the best member's ELBO, which it holds.
    error = torch.hypot(torch.where(ll.settled, ll.standard_error, math.inf), gap.amortisation_error)
    return gap._replace(
        log_likelihood=ll.per_datum,
        approximation=ll.per_datum - gap.best_elbo,
        approximation_error=error,
        pareto_k=ll.pareto_k,
    )


def _split(pair: Pair, batch: tuple[Tensor, ...], num_particles: int, steps: int) -> InferenceGap:
    family = _Family(pair, batch)
    _ascend(family, steps)
    joint = _joint(family)
    if joint is not None:
        _ascend(joint, steps)
    weights = WeightStream(len(batch[0]), num_particles, batch[0].device)
    best, guide = [], []
    for begin in range(0, num_particles, SLICE):
        size = min(SLICE, num_particles - begin)
        best.append(family.log_weights(size).double())
        weights.add(best[-1] if joint is None else joint.log_weights(size).double())
        guide.append(log_terms(pair, *batch, num_particles=size).log_weights.double())
    best_weights, guide_weights = torch.cat(best), torch.cat(guide)
    summary = weights.summary()
    best_elbo, elbo = best_weights.mean(0), guide_weights.mean(0)
    best_error, error = (each.std(0) / math.sqrt(num_particles) for each in (best_weights, guide_weights))
    log_likelihood = summary.log_mean.to(best_elbo.device)
    threshold = trust_threshold(num_particles)
    # Weights without a k̂ do not tell their error.
    trusted = torch.where(summary.pareto_k > threshold, math.inf, summary.standard_error)
    trusted = torch.where(summary.pareto_k.isnan(), math.nan, trusted)
    return InferenceGap(
        log_likelihood,
        best_elbo,
        elbo,
        log_likelihood - best_elbo,
        torch.hypot(trusted.to(best_error.device), best_error),
        best_elbo - elbo,
        torch.hypot(best_error, error),
        summary.pareto_k,
    )


class _Member:
    """A Gaussian for one site with parameters per datum, in units of the guide's scale there."""

    def __init__(self, site: Site) -> None:
        base = site.bare
        self.event_dim, self.full = site.fn.event_dim, isinstance(base, MultivariateNormal)
        # The first of two equal particles; the axis stays.
        self.loc = base.loc[:1].clone()
        self.scale = (base.scale_tril if self.full else base.scale)[:1].clone()
        self.shift = torch.zeros_like(self.loc).requires_grad_()
        self.stretch = torch.zeros_like(self.scale).requires_grad_()
        # The mask of poutine.mask stays with the site.
        scored = scored_entries(site.fn)
        self.scored = None if scored is None else scored.expand_as(site.drawn)[:1]

    def distribution(self, *, fixed: bool) -> Any:
        """Return the Gaussian, with detached parameters if ``fixed``."""
        shift, stretch = (p.detach() if fixed else p for p in (self.shift, self.stretch))
        if not self.full:
            entries = dist.Normal(self.loc + self.scale * shift, self.scale * stretch.exp())
            return (entries if self.scored is None else entries.mask(self.scored)).to_event(self.event_dim)
        factor = stretch.tril(-1) + torch.diag_embed(stretch.diagonal(dim1=-2, dim2=-1).exp())
        loc = self.loc + (self.scale @ shift.unsqueeze(-1)).squeeze(-1)
        whole = dist.MultivariateNormal(loc, scale_tril=self.scale @ factor)
        return whole if self.scored is None else whole.mask(self.scored[..., 0])


class _Family:
    """The guide's family on one batch, with parameters for each datum."""

    def __init__(self, pair: Pair, batch: tuple[Tensor, ...]) -> None:
        self.pair, self.batch = pair, batch
        trace = trace_pair(pair, *batch, num_particles=2)
        self.fixed = {name: trace.guide[name].drawn[:1] for name in trace.point_masses}
        self.sites = trace.latents
        for site in self.sites.values():
            _check_member(site)
        self.members = {name: _Member(site) for name, site in self.sites.items()}

    def log_weights(self, num_particles: int) -> Tensor:
        """Return log p(x, z) − log q*(z), (K, B), with fixed parameters in the density of q*."""
        values, log_guide = {}, torch.zeros(())
        for name, member in self.members.items():
            draws = member.distribution(fixed=False).rsample((num_particles,)).squeeze(1)
            values[name] = draws
            site = self.sites[name].replace(fn=member.distribution(fixed=True), drawn=draws)
            log_guide = log_guide + site.log_prob
        held = {**self.fixed, **values}
        model = run_model(self.pair, *self.batch, num_particles=num_particles, values=held)
        log_joint: Any = sum(site.log_prob for site in model.values())
        return log_joint - log_guide

    @property
    def parameters(self) -> list[Tensor]:
        """Means and scales of all members."""
        return [p for member in self.members.values() for p in (member.shift, member.stretch)]


class _Joint:
    """A Gaussian with full covariance over all latents of each datum, (B, L), begun at the best member."""

    def __init__(self, family: _Family) -> None:
        self.family = family
        locs, scales = [], []
        for name, member in family.members.items():
            site, base = family.sites[name], member.distribution(fixed=True)
            locs.append(site.lay_out(base.mean)[0].reshape(len(family.batch[0]), -1))
            scales.append(site.lay_out(base.stddev)[0].reshape(len(family.batch[0]), -1))
        self.loc, self.scale = torch.cat(locs, -1).detach(), torch.cat(scales, -1).detach()
        self.shift = torch.zeros_like(self.loc).requires_grad_()
        self.stretch = self.loc.new_zeros(*self.loc.shape, self.loc.shape[-1]).requires_grad_()
        self.parameters = [self.shift, self.stretch]

    def log_weights(self, num_particles: int) -> Tensor:
        """Return log p(x, z) − log q(z), (K, B), with fixed parameters in the density of q."""
        draws = self._distribution(self.shift, self.stretch).rsample((num_particles,))
        family = self.family
        values, _ = FlatLatents(family.sites).take_apart(draws)
        held = {**family.fixed, **values}
        model = run_model(family.pair, *family.batch, num_particles=num_particles, values=held)
        log_joint: Any = sum(site.log_prob for site in model.values())
        return log_joint - self._distribution(self.shift.detach(), self.stretch.detach()).log_prob(draws)

    def _distribution(self, shift: Tensor, stretch: Tensor) -> Any:
        factor = stretch.tril(-1) + torch.diag_embed(stretch.diagonal(dim1=-2, dim2=-1).exp())
        return dist.MultivariateNormal(self.loc + self.scale * shift, scale_tril=self.scale.unsqueeze(-1) * factor)


def _joint(family: _Family) -> _Joint | None:
    """Return a start for the full covariance; None if the best member has one, for many latents, and under masks."""
    members = list(family.members.values())
    latents = sum(math.prod(site.value.shape[2:]) for site in family.sites.values())
    if not members or latents > MOST_LATENTS or latents == 1:
        return None
    if len(members) == 1 and members[0].full and members[0].loc.shape[-1] == latents:
        return None
    for site in family.sites.values():
        entries = site.lay_out(site.bare.log_prob(site.drawn), site.fn.event_dim - len(site.bare.event_shape))
        # A mask takes entries out of the density that a Gaussian over all latents would count.
        if not torch.allclose(entries.flatten(2).sum(-1) if entries.dim() > 2 else entries, site.log_prob):
            return None
    return _Joint(family)


def _ascend(family: _Family | _Joint, steps: int) -> None:
    """Maximise the ELBO of all data at once; they share no parameter, and Adam scales each separately."""
    parameters = family.parameters
    if not parameters:
        return
    # Near its maximum the ELBO curves by about one nat per squared scale of the guide. With ``eps`` equal to the
    # first step, Adam is plain ascent with a unit step there; a smaller ``eps`` turns rounding into steps of 0.05.
    optimizer = torch.optim.Adam(parameters, lr=FIRST_STEP, eps=FIRST_STEP)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = FIRST_STEP * (1 + math.cos(math.pi * step / steps)) / 2
        with torch.enable_grad():
            loss = -family.log_weights(STEP_PARTICLES).mean(0).sum()
            gradients = torch.autograd.grad(loss, parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()


def _check_member(site: Site) -> None:
    name, base = site.name, site.bare
    if not isinstance(base, Normal | MultivariateNormal):
        raise ValueError(
            f"the guide's site '{name}' is a {site.family}: the best member of its family is found for diagonal and "
            "full Gaussians only (Normal, MultivariateNormal); look at log_likelihood and its pareto_k instead"
        )
    scale = base.scale_tril if isinstance(base, MultivariateNormal) else base.scale
    # A network's matmuls over two equal halves of a batch may round differently.
    near = 1e3 * torch.finfo(scale.dtype).eps
    if not all(torch.allclose(part[0], part[1], rtol=near, atol=near) for part in (base.loc, scale)):
        raise ValueError(
            f"the guide's site '{name}' depends on an earlier draw: the best member of its family for a datum is then "
            "not defined; split the bound with log_likelihood and an ELBO instead"
        )
