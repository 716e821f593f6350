"""Mixtures of Gaussians at a posterior's modes, of the guide and of the prior, as proposals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_vae.inspection import Inspection
from pyro_vae.likelihood.fitting.density import Density
from pyro_vae.likelihood.fitting.modes import MODES, Mode
from pyro_vae.likelihood.proposals import Proposal, described
from pyro_vae.pair.site import ExactSite, exact
from pyro_vae.pair.trace import run_guide
from pyro_vae.pair.weights import Rounding, rounding_of

__all__ = ["GUIDE", "PRIOR", "Mixture", "MixtureProposal"]

# Places of the guide's and the prior's share.
GUIDE, PRIOR = MODES, MODES + 1


class Mixture(NamedTuple):
    """A mixture for one datum: of M components over u, of the guide and of the prior.

    Args:
        means: μ, (M, L), float64.
        factors: F with F Fᵀ the covariance, (M, L, L), float64.
        whiteners: F⁻¹, (M, L, L), float64.
        log_dets: log |F|, (M,), float64.
        log_shares: of the components, the guide and the prior, in this order, (M + 2,), float64.
        degrees: of freedom, ν, of Student's t; ∞ for Gaussians, (1,), float64.
    """

    means: Tensor
    factors: Tensor
    whiteners: Tensor
    log_dets: Tensor
    log_shares: Tensor
    degrees: Tensor

    @classmethod
    def of(
        cls,
        modes: Sequence[Mode],
        like: Tensor,
        *,
        width: float = 1.0,
        degrees: float = math.inf,
        guide: float = 0.0,
        prior: float = 0.0,
    ) -> Mixture:
        """Return components of some width at modes, with shares of guide and prior.

        Args:
            modes: M at most; the mixture always has as many places, so that one recording fits all data.
            like: any point, (L,), float64.
            width: factor of the components' standard deviations.
            degrees: of freedom of the components.
            guide, prior: their shares.
        """
        unit = torch.eye(len(like), dtype=like.dtype, device=like.device).repeat(MODES, 1, 1)
        mixture = cls(
            like.new_zeros(MODES, len(like)),
            unit,
            unit.clone(),
            like.new_zeros(MODES),
            like.new_full((MODES + 2,), -math.inf),
            like.new_tensor([degrees]),
        )
        count = len(modes)
        if count:
            # A Gaussian's mass is a rough one: no mode gets less than a hundredth of the share.
            weights = torch.stack([mode.log_evidence for mode in modes]).softmax(0).clamp(min=0.01)
            mixture.log_shares[:count] = (weights / weights.sum()).log() + math.log1p(-guide - prior)
            mixture.means[:count] = torch.stack([mode.point for mode in modes])
            mixture.factors[:count] = width * torch.stack([mode.factor for mode in modes])
            mixture.whiteners[:count] = torch.stack([mode.whitener for mode in modes]) / width
            lengths = torch.stack([mode.lengths for mode in modes])
            mixture.log_dets[:count] = len(like) * math.log(width) - 0.5 * lengths.log().sum(-1)
        for place, share in ((GUIDE, guide), (PRIOR, prior)):
            if share > 0:
                mixture.log_shares[place] = math.log(share)
        return mixture

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """Return which part each draw is of, (K,), and a draw of a component, (K, L), whatever the part."""
        chosen = torch.multinomial(self.log_shares.exp(), count, replacement=True)
        of = chosen.clamp(max=len(self.means) - 1)
        noise = self.means.new_empty(count, self.means.shape[-1]).normal_()
        half = self._half
        # χ²_ν / ν: one for a Gaussian.
        stretch = torch.where(self.degrees.isinf(), 1.0, torch._standard_gamma(half.expand(count)) / half)
        spread = self.factors @ (noise / stretch.sqrt().unsqueeze(-1)).mT
        spread = spread.gather(0, of.expand(1, spread.shape[1], -1)).squeeze(0).mT
        return chosen, self.means[of] + spread

    def log_components(self, points: Tensor) -> Tensor:
        """Return log π_m N(u; μ_m, F_m F_mᵀ), or of Student's t, of points (K, L), as (K, M)."""
        size, half = points.shape[-1], self._half
        away = points.unsqueeze(0) - self.means.unsqueeze(1)
        squares = (away @ self.whiteners.mT).square().sum(-1).mT
        gauss = -0.5 * squares - 0.5 * size * math.log(2 * math.pi)
        student = (
            torch.lgamma(half + size / 2)
            - torch.lgamma(half)
            - 0.5 * size * torch.log(2 * math.pi * half)
            - (half + size / 2) * torch.log1p(squares / (2 * half))
        )
        return torch.where(self.degrees.isinf(), gauss, student) - self.log_dets + self.log_shares[:GUIDE]

    @property
    def _half(self) -> Tensor:
        return torch.where(self.degrees.isinf(), 1.0, self.degrees / 2)


class MixtureProposal(Proposal):
    """A mixture of Gaussians at the posterior's modes, of the guide and of the prior.

    r(z) = Σ_m π_m N(u; μ_m, s² Λ_m⁻¹) |∂u/∂z| + π_q q(z | x) + π_p p(z),   Λ_m = −∇² log p(x, z(u)) |∂z/∂u| at μ_m

    The batch of :meth:`log_weights` is one datum, its conditions, and the tensors of its :class:`Mixture`.

    Args:
        inspection: of the pair.
        density: of the pair.

    Reference:
        Tierney and Kadane (1986), Accurate approximations for posterior moments and marginal densities, JASA 81; Owen
        and Zhou (2000), Safe and effective importance sampling, JASA 95, for the guide's share.
    """

    name = "fitted"

    def __init__(self, inspection: Inspection, density: Density) -> None:
        super().__init__(inspection)
        self.density = density

    def log_weights(self, batch: tuple[Tensor, ...], num_particles: int) -> Tensor:
        model, log_det, log_proposal = self._run(batch, num_particles)
        return torch.stack([site.log_prob for site in model.values()]).sum(0) + log_det - log_proposal

    def draws(self, batch: tuple[Tensor, ...], num_particles: int) -> tuple[dict[str, Tensor], Tensor]:
        model, log_det, log_proposal = self._run(batch, num_particles)
        names = [*self.density.fixed, *self.density.latents]
        log_weights = torch.stack([site.log_prob for site in model.values()]).sum(0) + log_det - log_proposal
        return {name: model[name].value for name in names}, log_weights

    def site_log_densities(self, batch: tuple[Tensor, ...], num_particles: int) -> dict[str, Tensor]:
        model, _, log_proposal = self._run(batch, num_particles)
        return described("model", model) | {"the fitted proposal": log_proposal}

    def rounding(self, inspection: Inspection) -> Rounding:
        return rounding_of(exact(inspection.trace.model).values())

    def quantity(self, inspection: Inspection) -> str:
        return inspection.quantity

    def beside(self, inspection: Inspection) -> str:
        return inspection.beside

    def _run(self, batch: tuple[Tensor, ...], count: int) -> tuple[dict[str, ExactSite], Tensor, Tensor]:
        """Draw; return the model's sites, log |det ∂z/∂u| and log r(u), each (K, 1)."""
        parts = len(Mixture._fields)
        datum, mixture, density = batch[:-parts], Mixture(*batch[-parts:]), self.density
        drawn = density.guide_sites(datum, count)
        fixed = {name: drawn[name].drawn for name in density.fixed}
        guides, priors = density.flat.points_of(drawn), density.prior_points(datum, count, fixed)
        chosen, components = mixture.draw(count)
        is_guides, is_priors = ((chosen == place)[:, None, None] for place in (GUIDE, PRIOR))
        # Rounded before it is scored: the densities are those of the point that the programs see.
        points = torch.where(is_guides, guides, components.to(density.dtype).unsqueeze(1))
        points = torch.where(is_priors, priors, points)
        model, log_det = density.joint(datum, points, fixed)
        values, _ = density.flat.take_apart(points)
        prior = torch.stack([model[name].log_prob for name in density.latents]).sum(0)
        guide = torch.full_like(prior, -math.inf)
        if density.is_guide_scored:
            sites = exact(run_guide(self.pair, *datum, num_particles=count, values={**fixed, **values}))
            guide = torch.stack([sites[name].log_prob for name in density.latents]).sum(0)
        programs = [guide, prior]
        shares = mixture.log_shares[GUIDE:]
        # A share of zero has no term, whatever the density there.
        others = torch.where(shares.isneginf(), -math.inf, torch.cat(programs, -1) + log_det + shares)
        each = torch.cat([mixture.log_components(points[:, 0].double()), others], -1)
        return model, log_det, torch.logsumexp(each, -1, keepdim=True)
