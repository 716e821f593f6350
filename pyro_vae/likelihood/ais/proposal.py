"""Annealing from a fitted proposal, as a proposal on chains."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_vae.inspection import Inspection
from pyro_vae.likelihood.ais.annealing import forward
from pyro_vae.likelihood.ais.hmc import HMC, tuned_steps
from pyro_vae.likelihood.ais.temperatures import sigmoidal_schedule
from pyro_vae.likelihood.fitting.density import Density
from pyro_vae.likelihood.fitting.mixture import GUIDE, PRIOR, Mixture, MixtureProposal
from pyro_vae.likelihood.proposals import Proposal
from pyro_vae.pair.site import exact
from pyro_vae.pair.weights import Rounding, rounding_of

__all__ = ["AnnealedProposal"]

# From a proposal that is nearly right few temperatures and short trajectories are enough, and few chains to tune them.
TEMPERATURES, LEAPFROG, TUNING = 30, 3, 16


class AnnealedProposal(Proposal):
    """Chains from a fitted mixture to the posterior: log w = Σ_t (β_t − β_{t−1}) [log p(x, z_t) − log r(z_t)].

    They move by Hamiltonian Monte Carlo in units of the first mode's width. Step sizes come from a pilot run.

    Args:
        inspection: of the pair.
        density: of the pair.

    Reference:
        Neal (2001), Annealed importance sampling, Statistics and Computing 11.
    """

    name, records = "annealed", False

    def __init__(self, inspection: Inspection, density: Density) -> None:
        super().__init__(inspection)
        self.inspection, self.density = inspection, density

    def log_weights(self, batch: tuple[Tensor, ...], num_particles: int) -> Tensor:
        betas = sigmoidal_schedule(TEMPERATURES)
        # Gradients need ordinary tensors, also where the caller evaluates in inference mode.
        with torch.inference_mode(False), torch.no_grad():
            batch = tuple(tensor.clone() for tensor in batch)
            tuning, path = (_Path(self.density, batch, count) for count in (TUNING, num_particles))
            steps = tuned_steps(HMC(tuning, LEAPFROG), tuning.draw(), betas)
            return forward(HMC(path, LEAPFROG), path.draw(), betas, steps)

    def draws(self, batch: tuple[Tensor, ...], num_particles: int) -> tuple[dict[str, Tensor], Tensor]:
        # Chains end far from where their weights come from: the mixture that they begin at has draws of its own.
        return MixtureProposal(self.inspection, self.density).draws(batch, num_particles)

    def site_log_densities(self, batch: tuple[Tensor, ...], num_particles: int) -> dict[str, Tensor]:
        with torch.inference_mode(False), torch.no_grad():
            path = _Path(self.density, tuple(tensor.clone() for tensor in batch), num_particles)
            start, joint = path.log_densities(path.draw())
        return {"the model": joint, "the fitted proposal": start}

    def rounding(self, inspection: Inspection) -> Rounding:
        return rounding_of(exact(inspection.trace.model).values())

    def quantity(self, inspection: Inspection) -> str:
        return inspection.quantity

    def beside(self, inspection: Inspection) -> str:
        return inspection.beside


class _Path:
    """From a mixture, its guide left out, to the posterior, at v with u = μ + F v; chains v are (C, 1, L)."""

    def __init__(self, density: Density, batch: tuple[Tensor, ...], num_chains: int) -> None:
        parts = len(Mixture._fields)
        self.density, self.datum, self.num_chains = density, batch[:-parts], num_chains
        mixture = Mixture(*batch[-parts:])
        shares = mixture.log_shares.clone()
        # The guide's density would take runs of its own. The prior's comes with the model's, and its chains may reach
        # modes that no component knows.
        shares[GUIDE] = -math.inf
        self.mixture = mixture._replace(log_shares=shares - torch.logsumexp(shares, 0))

    def draw(self) -> Tensor:
        """Return C independent draws of the mixture, (C, 1, L)."""
        chosen, points = self.mixture.draw(self.num_chains)
        (priors,) = self.density.calls(self._priors, *self.datum)
        points = torch.where((chosen == PRIOR).unsqueeze(-1), priors, points)
        return ((points - self.mixture.means[0]) @ self.mixture.whiteners[0].mT).unsqueeze(1)

    def points(self, v: Tensor) -> Tensor:
        """Return u, (C, L)."""
        return self.mixture.means[0] + v[:, 0] @ self.mixture.factors[0].mT

    def log_densities(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return log r(u) and log p(x, z(u)) |∂z/∂u|, each (C, 1)."""
        start, joint, _ = self.with_gradient(v, 1.0)
        return start, joint

    def with_gradient(self, v: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor]:
        """Return both log-densities (C, 1), and the gradient (C, 1, L) of (1 − β) log r + β log p."""
        points = self.points(v)
        joint, slope, prior, prior_slope = self.density.with_prior(self.datum, points)
        with torch.enable_grad():
            at = points.detach().requires_grad_()
            components = torch.logsumexp(self.mixture.log_components(at), -1)
            (start_slope,) = torch.autograd.grad(components.sum(), at)
        components, prior = components.detach(), prior + self.mixture.log_shares[PRIOR]
        start = torch.logaddexp(components, prior)
        share = (prior - start).exp().unsqueeze(-1)
        start_slope = (1 - share) * start_slope + torch.where(share > 0, share * prior_slope, 0.0)
        gradient = ((1 - beta) * start_slope + beta * slope) @ self.mixture.factors[0]
        return start.unsqueeze(-1), joint.unsqueeze(-1), gradient.unsqueeze(1)

    def _priors(self, *datum: Tensor) -> tuple[Tensor, ...]:
        guide = self.density.guide_sites(datum, self.num_chains)
        fixed = {name: guide[name].drawn for name in self.density.fixed}
        return (self.density.prior_points(datum, self.num_chains, fixed)[:, 0].double(),)
