"""A proposal fitted to each datum: Gaussians at the modes of its posterior, where the guide alone does not settle."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_vae.inspection import Inspection
from pyro_vae.likelihood.fitting.modes import Mode, find_modes
from pyro_vae.likelihood.flat import FlatLatents
from pyro_vae.likelihood.proposals import Proposal, described
from pyro_vae.likelihood.psis import pareto_tail, tail_size
from pyro_vae.pair.site import ExactSite, exact
from pyro_vae.pair.trace import run_guide, run_model
from pyro_vae.pair.weights import Rounding, rounding_of

__all__ = ["FittedProposal"]

# Components at most, beside guide and prior.
MODES = 8
# Draws of a pilot, which chooses a proposal and is thrown away.
PILOT = 400
# A pilot's k̂ up to which a proposal is taken, below the threshold of trust: the estimate has other draws.
ENOUGH = 0.3
# The prior's draws are few and far from most posteriors. They show a mode that no start led to, by a large weight.
PRIOR = 0.05
# Several modes are rarely all: then the prior has a larger share.
SEVERAL, PRIOR_OF_SEVERAL = 4, 0.4
# The guide's share beside components.
GUIDE = 0.1
# Widths and degrees of freedom of the components, tried in turn. All reach beyond the modes: a posterior's tails are
# longer than a pilot shows.
CANDIDATES = ((1.0, 7.0), (1.15, math.inf), (1.2, 5.0), (1.3, math.inf))


class Fit(NamedTuple):
    """A mixture for one datum: of M components over u, of the guide and of the prior.

    Args:
        means: (1, M, L), float64.
        factors: Cholesky-like factors of the covariances, (1, M, L, L), float64.
        log_shares: of the components, the guide and the prior, in this order, (1, M + 2), float64.
        degrees: of freedom, ν, of Student's t; ∞ for Gaussians, (1,), float64.
    """

    means: Tensor
    factors: Tensor
    log_shares: Tensor
    degrees: Tensor


class FittedProposal(Proposal):
    """A mixture of Gaussians at the posterior's modes, the guide and the prior, chosen by a pilot for each datum.

    r(z) = Σ_m π_m N(u; μ_m, s² Λ_m⁻¹) |∂u/∂z| + π_q q(z | x) + π_p p(z),   Λ_m = −∇² log p(x, z(u)) |∂z/∂u| at μ_m

    Modes are looked for from draws of the guide and of the prior. A guide that settles a datum of one mode is kept. The
    pilot's draws choose widths s, Student's t in place of a Gaussian, and shares. They are thrown away, so that
    E L_K ≤ log p(x) stays true.

    Args:
        inspection: of the pair. Its latents must be continuous: see :func:`~pyro_vae.likelihood.flat.unfit`.

    Reference:
        Tierney and Kadane (1986), Accurate approximations for posterior moments and marginal densities, JASA 81; Owen
        and Zhou (2000), Safe and effective importance sampling, JASA 95, for the guide's share.
    """

    name, fits = "auto", True

    def __init__(self, inspection: Inspection) -> None:
        super().__init__(inspection)
        trace = inspection.trace
        self.fixed = sorted(trace.point_masses)
        self.supports = {name: trace.model[name].entry_support for name in trace.latents}

    def fit(self, datum: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        # Gradients need ordinary tensors, also where the caller evaluates in inference mode.
        with torch.inference_mode(False), torch.no_grad():
            datum = tuple(tensor.clone() for tensor in datum)
            modes, empty = find_modes(self.pair, datum, self.supports, self.fixed)
            best = _mixture([], empty, guide=1.0)
            least = self._pilot(datum, best)
            if least > -math.inf:
                best = _mixture([], empty, guide=1.0 - PRIOR, prior=PRIOR)
                least = self._pilot(datum, best)
            if not modes or (len(modes) == 1 and least <= ENOUGH):
                return best
            exactly = _mixture(modes, empty)
            if self._pilot(datum, exactly) == -math.inf and self._is_whole(datum, modes, exactly):
                return exactly
            if len(modes) > 1:
                # No weight of the guide's draws tells of a mode that it does not know.
                least = math.inf
            prior = PRIOR if len(modes) < SEVERAL else PRIOR_OF_SEVERAL
            for width, degrees in CANDIDATES:
                candidate = _mixture(modes, empty, width=width, degrees=degrees, guide=GUIDE, prior=prior)
                shape = self._pilot(datum, candidate)
                if shape < least:
                    best, least = candidate, shape
                if shape <= ENOUGH:
                    break
            return best

    def is_fitted(self, fit: tuple[Tensor, ...]) -> bool:
        return bool(Fit(*fit).log_shares[0, -2] < math.log(0.5))

    def log_weights(self, batch: tuple[Tensor, ...], num_particles: int) -> Tensor:
        datum, fit = batch[: -len(Fit._fields)], Fit(*batch[-len(Fit._fields) :])
        model, log_det, log_proposal = self._run(datum, fit, num_particles)
        log_joint = torch.stack([site.log_prob for site in model.values()]).sum(0)
        return log_joint + log_det - log_proposal

    def site_log_densities(self, batch: tuple[Tensor, ...], num_particles: int) -> dict[str, Tensor]:
        datum, fit = batch[: -len(Fit._fields)], Fit(*batch[-len(Fit._fields) :])
        model, _, log_proposal = self._run(datum, fit, num_particles)
        return described("model", model) | {"the fitted proposal": log_proposal}

    def rounding(self, inspection: Inspection) -> Rounding:
        return rounding_of(exact(inspection.trace.model).values())

    def quantity(self, inspection: Inspection) -> str:
        return inspection.quantity

    def beside(self, inspection: Inspection) -> str:
        return inspection.beside

    def _run(self, datum: tuple[Tensor, ...], fit: Fit, count: int) -> tuple[dict[str, ExactSite], Tensor, Tensor]:
        """Draw; return the model's sites, log |det ∂z/∂u| and log r(u), each (K, 1)."""
        drawn = exact(run_guide(self.pair, *datum, num_particles=count))
        fixed = {name: drawn[name].drawn for name in self.fixed}
        prior = exact(run_model(self.pair, *datum, num_particles=count, values=fixed))
        flat = FlatLatents(drawn, self.supports)
        guides, priors = flat.points_of(drawn), flat.points_of(prior)
        means, factors, log_shares, degrees = (part[0] for part in fit)
        size = means.shape[-1]
        chosen = torch.multinomial(log_shares.exp(), count, replacement=True)
        of = chosen.clamp(max=len(means) - 1)
        noise = torch.randn(count, size, dtype=means.dtype, device=means.device)
        # χ²_ν / ν: one for a Gaussian.
        half = torch.where(degrees.isinf(), 1.0, degrees / 2)
        stretch = torch.where(degrees.isinf(), 1.0, torch._standard_gamma(half.expand(count)) / half)
        gaussian = means[of] + (factors[of] @ (noise / stretch.sqrt().unsqueeze(-1)).unsqueeze(-1)).squeeze(-1)
        is_guides, is_priors = ((chosen == len(means) + i).unsqueeze(-1) for i in range(2))
        # Rounded before it is scored: the densities are those of the point that the programs see.
        points = torch.where(is_priors, priors[:, 0], torch.where(is_guides, guides[:, 0], gaussian.to(guides.dtype)))
        points = points.unsqueeze(1)
        values, log_det = flat.take_apart(points)
        guide = exact(run_guide(self.pair, *datum, num_particles=count, values={**fixed, **values}))
        model = exact(run_model(self.pair, *datum, num_particles=count, values={**fixed, **values}))
        programs = torch.stack(
            [torch.stack([sites[name].log_prob for name in self.supports]).sum(0)[:, 0] for sites in (guide, model)], -1
        )
        away = (points.double() - means).unsqueeze(-1)
        squares = torch.linalg.solve(factors, away).squeeze(-1).square().sum(-1)
        gauss = -0.5 * squares - 0.5 * size * math.log(2 * math.pi)
        student = (
            torch.lgamma(half + size / 2)
            - torch.lgamma(half)
            - 0.5 * size * torch.log(2 * math.pi * half)
            - (half + size / 2) * torch.log1p(squares / (2 * half))
        )
        each = torch.where(degrees.isinf(), gauss, student) - torch.linalg.slogdet(factors)[1] + log_shares[:-2]
        # A share of zero has no term, whatever the density there.
        others = torch.where(log_shares[-2:].isneginf(), -math.inf, programs + log_det + log_shares[-2:])
        return model, log_det, torch.logsumexp(torch.cat([each, others], -1), -1, keepdim=True)

    def _is_whole(self, datum: tuple[Tensor, ...], modes: list[Mode], exactly: Fit) -> bool:
        """Whether the prior's draws show no mode beside those of a proposal with equal weights."""
        half = _mixture(modes, exactly.means[0, 0], prior=0.5)
        log_p = self.log_weights((*datum, *exactly), 1)
        weights = self.log_weights((*datum, *half), PILOT)
        # Half of the draws are of the posterior, if that is all of it: no weight is above 2 p(x).
        return bool((weights <= log_p + math.log(2) + 1e-3).all())

    def _pilot(self, datum: tuple[Tensor, ...], fit: Fit) -> float:
        """Return k̂ of a pilot's weights; ∞ where it has none."""
        weights = self.log_weights((*datum, *fit), PILOT)[:, 0]
        largest = weights.nan_to_num(nan=math.inf).topk(tail_size(PILOT) + 1).values.cpu()
        rounding = Rounding(torch.finfo(datum[0].dtype).eps if datum[0].is_floating_point() else 1e-7)
        shape, _ = pareto_tail(largest, PILOT, rounding)
        return math.inf if math.isnan(shape) else shape


def _mixture(
    modes: list[Mode],
    like: Tensor,
    *,
    width: float = 1.0,
    degrees: float = math.inf,
    guide: float = 0.0,
    prior: float = 0.0,
) -> Fit:
    """Return the mixture of components at modes with shares of guide and prior; ``like`` is any point, (L,)."""
    means = like.new_zeros(MODES, len(like))
    factors = torch.eye(len(like), dtype=like.dtype, device=like.device).repeat(MODES, 1, 1)
    log_shares = like.new_full((MODES + 2,), -math.inf)
    kept = modes[:MODES]
    if kept:
        # A Gaussian's mass is a rough one: no mode gets less than a hundredth of the share.
        weights = torch.stack([mode.log_evidence for mode in kept]).softmax(0).clamp(min=0.01)
        log_shares[: len(kept)] = (weights / weights.sum()).log() + math.log1p(-guide - prior)
        means[: len(kept)] = torch.stack([mode.point for mode in kept])
        factors[: len(kept)] = width * torch.stack([mode.factor for mode in kept])
    for place, share in ((-2, guide), (-1, prior)):
        if share > 0:
            log_shares[place] = math.log(share)
    return Fit(means[None], factors[None], log_shares[None], like.new_tensor([degrees]))
