"""The joint density of one datum's latents, as a function of points of R^L, and draws of guide and prior there."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyro_vae.inspection import Inspection
from pyro_vae.likelihood.captured import Calls
from pyro_vae.likelihood.fitting.flat import FlatLatents
from pyro_vae.pair.site import ExactSite, exact
from pyro_vae.pair.trace import run_guide, run_model, trace_pair

__all__ = ["Density", "Draws"]

# Draws of the guide and of the prior, from which searches for modes start.
DRAWS = 128


class Draws(NamedTuple):
    """Draws of guide and prior for one datum.

    Args:
        guides: of the guide, (N, L), float64.
        log_weights: log p(x, z) − log q(z | x) of these, (N,), in nats.
        priors: of the prior, (N, L), float64.
        log_lik: log p(x | z) of these, (N,), in nats.
    """

    guides: Tensor
    log_weights: Tensor
    priors: Tensor
    log_lik: Tensor


class Density:
    """log p(x, z(u)) |∂z/∂u| of one datum at many points u, with its gradient.

    Args:
        inspection: of the pair; its latents are continuous, see :func:`~pyro_vae.likelihood.fitting.flat.unfit`.
        calls: runs the pair's programs.

    Attributes:
        like: any point, (L,), float64.
        dtype: of the points that the programs see.
        is_guide_scored: whether the guide scores points that it has not drawn; some flows do not, or do it slowly.
    """

    def __init__(self, inspection: Inspection, calls: Calls) -> None:
        trace = inspection.trace
        self.pair, self.calls = inspection.pair, calls
        self.latents = list(trace.latents)
        self.fixed = sorted(trace.point_masses)
        self.flat = FlatLatents(trace.latents, {name: trace.model[name].entry_support for name in trace.latents})
        points = self.flat.points_of(trace.latents)
        self.dtype, self.like = points.dtype, points[0, 0].double()
        self.is_guide_scored = self._scores_points(inspection)

    def _scores_points(self, inspection: Inspection) -> bool:
        fns = [site.bare for site in inspection.trace.latents.values()]
        if any(getattr(part, "autoregressive", False) for fn in fns for part in getattr(fn, "transforms", ())):
            # An inverse entry by entry takes as many runs of its network as there are entries.
            return False
        datum = tuple(tensor[:1] for tensor in inspection.batch)
        # Sites have validated their own draws; others are held here.
        values, _ = self.flat.take_apart(self.flat.points_of(self.guide_sites(datum, 2)).flip(0))
        try:
            guide = run_guide(self.pair, *datum, num_particles=2, values=values)
            return all(guide[name].log_prob.isfinite().all() for name in self.latents)
        except (ValueError, NotImplementedError):
            return False

    def draws(self, datum: tuple[Tensor, ...]) -> Draws:
        """Return draws of guide and prior."""
        return Draws(*self.calls(self._draws, *datum))

    def __call__(self, datum: tuple[Tensor, ...], points: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log-density (N,), in nats, and its gradient (N, L), at points (N, L), all float64."""
        value, slope = self.calls(self._gradient, *datum, points)
        return value, slope

    def curvature(self, datum: tuple[Tensor, ...], point: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return log-density, gradient (L,) and negative Hessian (L, L) at a point (L,)."""
        value, slope, hessian = self.calls(self._curvature, *datum, point)
        return value, slope, hessian

    def with_prior(self, datum: tuple[Tensor, ...], points: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return log-density and gradient as a call does, then those of the prior p(z(u)) |∂z/∂u|."""
        value, slope, prior, prior_slope = self.calls(self._both_gradients, *datum, points)
        return value, slope, prior, prior_slope

    def guide_sites(self, datum: tuple[Tensor, ...], count: int) -> dict[str, ExactSite]:
        """Return the sites of a run of the guide with K particles."""
        return exact(run_guide(self.pair, *datum, num_particles=count))

    def prior_points(self, datum: tuple[Tensor, ...], count: int, fixed: dict[str, Tensor]) -> Tensor:
        """Return draws of the prior, (K, 1, L); the model is left after its last latent."""
        model = run_model(self.pair, *datum, num_particles=count, values=fixed, until=self.latents)
        return self.flat.points_of(model)

    def joint(
        self, datum: tuple[Tensor, ...], points: Tensor, fixed: dict[str, Tensor]
    ) -> tuple[dict[str, ExactSite], Tensor]:
        """Return the model's sites at points (K, 1, L), and log |∂z/∂u|, (K, 1)."""
        values, log_det = self.flat.take_apart(points)
        model = run_model(self.pair, *datum, num_particles=len(points), values={**fixed, **values})
        return exact(model), log_det

    def _draws(self, *datum: Tensor) -> tuple[Tensor, ...]:
        trace = trace_pair(self.pair, *datum, num_particles=DRAWS)
        fixed = {name: trace.guide[name].drawn for name in self.fixed}
        model = exact(run_model(self.pair, *datum, num_particles=DRAWS, values=fixed))
        log_lik = torch.stack([site.log_prob for name, site in model.items() if name not in self.latents]).sum(0)
        guides, priors = (self.flat.points_of(sites)[:, 0].double() for sites in (trace.guide, model))
        return guides, trace.terms.log_weights[:, 0].double(), priors, log_lik[:, 0].double()

    def _gradient(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            at, log_joint, _ = self._at(inputs)
            slope = _slope(log_joint.sum(), at)
        return log_joint.detach().double(), slope[:, 0].double()

    def _curvature(self, *inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # A copy of the point for each row of the Hessian.
        points = inputs[-1].expand(len(inputs[-1]), -1)
        with torch.enable_grad():
            at, log_joint, _ = self._at((*inputs[:-1], points))
            slope = _slope(log_joint.sum(), at, create_graph=True)
            rows = _slope(slope[:, 0].diagonal().sum(), at)
        rows = rows[:, 0].double()
        return log_joint[0].detach().double(), slope[0, 0].detach().double(), -0.5 * (rows + rows.mT)

    def _both_gradients(self, *inputs: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        with torch.enable_grad():
            at, *values = self._at(inputs)
            slopes = [_slope(value.sum(), at, retain_graph=True)[:, 0].double() for value in values]
        log_joint, log_prior = (value.detach().double() for value in values)
        return log_joint, slopes[0], log_prior, slopes[1]

    def _at(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """Return points that gradients can be taken of (N, 1, L), log p(x, z(u)) |∂z/∂u| and log p(z(u)) |∂z/∂u|."""
        datum, points = inputs[:-1], inputs[-1]
        fixed = {}
        if self.fixed:
            guide = run_guide(self.pair, *datum, num_particles=len(points))
            fixed = {name: guide[name].drawn.detach() for name in self.fixed}
        at = points.to(self.dtype).unsqueeze(1).requires_grad_()
        model, log_det = self.joint(datum, at, fixed)
        log_prior = torch.stack([model[name].log_prob for name in self.latents]).sum(0) + log_det
        others = [site.log_prob for name, site in model.items() if name not in self.latents]
        return at, (torch.stack([log_prior, *others]).sum(0))[:, 0], log_prior[:, 0]


def _slope(value: Tensor, at: Tensor, *, create_graph: bool = False, retain_graph: bool = False) -> Tensor:
    """Return the gradient of a number; zero where it does not depend on the point, e.g. under a constant likelihood."""
    if not value.requires_grad:
        return torch.zeros_like(at)
    keep = create_graph or retain_graph
    (slope,) = torch.autograd.grad(value, at, allow_unused=True, create_graph=create_graph, retain_graph=keep)
    return torch.zeros_like(at) if slope is None else slope
