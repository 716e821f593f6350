"""Modes of a datum's posterior, and their curvature."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_vae.likelihood.flat import FlatLatents
from pyro_vae.pair.pair import Pair
from pyro_vae.pair.site import exact
from pyro_vae.pair.trace import run_guide, run_model

__all__ = ["Mode", "find_modes"]

# Starts of the search: the mean of the guide's draws, some of them, some of the prior's, and of the prior's chosen by
# their weights p(x | z), which lie near modes in few dimensions.
MEAN_OF, GUIDES, PRIORS, CHOSEN = 256, 1, 2, 6
# Newton steps, and the shares of a step that are tried at once.
ROUNDS, SHARES = 30, (1.0, 0.5, 0.2, 0.05, 0.01)
# A search ends where a Newton step would gain less, in nats.
GAIN = 1e-9
# Modes nearer than this in units of their width are one; a mode of so little evidence adds nothing.
APART, LITTLE = 0.5, 20.0
# The curvature is never taken to be below this share of its largest.
FLOOR = 1e-8


class Mode(NamedTuple):
    """A mode of log p(x, z(u)) |∂z/∂u|.

    Args:
        point: u, (L,), float64.
        factor: F with F Fᵀ the inverse of the negative Hessian, (L, L), float64.
        log_evidence: log of the integral of the Gaussian there, Laplace's approximation, in nats.
    """

    point: Tensor
    factor: Tensor
    log_evidence: Tensor


class _Density:
    """log p(x, z(u)) |∂z/∂u| of one datum at many points, with gradient and Hessian."""

    def __init__(
        self, pair: Pair, datum: tuple[Tensor, ...], supports: Mapping[str, Any], fixed: Sequence[str]
    ) -> None:
        self.pair, self.datum, self.fixed = pair, datum, fixed
        sites = exact(run_guide(pair, *datum, num_particles=MEAN_OF))
        self.flat = FlatLatents(sites, supports)
        points = self.flat.points_of(sites)[:, 0]
        self.dtype, draws = points.dtype, points.double()
        held = {name: sites[name].drawn for name in fixed}
        model = exact(run_model(pair, *datum, num_particles=MEAN_OF, values=held))
        priors = self.flat.points_of(model)[:, 0].double()
        data = torch.stack([site.log_prob for name, site in model.items() if name not in supports]).sum(0)[:, 0]
        # Adding Gumbel noise and taking the largest draws without replacement in proportion to the weights.
        noisy = data.nan_to_num(nan=-math.inf) - torch.empty_like(data).exponential_().log()
        chosen = priors[noisy.topk(CHOSEN).indices]
        self.starts = torch.cat([draws.mean(0, keepdim=True), draws[:GUIDES], priors[:PRIORS], chosen])
        self.step = self._step(draws.std(0).clamp(min=1e-4, max=1.0))

    def _step(self, scale: Tensor) -> Tensor:
        """Return the step of central differences: rounding of a gradient over it balances its square."""
        return (1e-4 if self.dtype == torch.float64 else 3e-2) * scale

    def adapt(self, curvature: Tensor) -> None:
        """Take steps in units of the posterior's width, from a negative Hessian (L, L), in place of the guide's."""
        widths = curvature.diagonal().abs().clamp(min=1e-12).rsqrt()
        if bool(widths.isfinite().all()):
            self.step = self._step(widths.clamp(max=1.0))

    def __call__(self, points: Tensor, *, gradient: bool = False) -> tuple[Tensor, Tensor]:
        """Return the density (N,) and its gradient (N, L), or zeros, at points (N, L)."""
        count = len(points)
        flat_points = points.to(self.dtype).unsqueeze(1)
        fixed = {}
        if self.fixed:
            sites = run_guide(self.pair, *self.datum, num_particles=count)
            fixed = {name: sites[name].drawn.detach() for name in self.fixed}
        with torch.set_grad_enabled(gradient):
            flat_points.requires_grad_(gradient)
            values, log_det = self.flat.take_apart(flat_points)
            model = exact(run_model(self.pair, *self.datum, num_particles=count, values={**fixed, **values}))
            log_joint = (torch.stack([site.log_prob for site in model.values()]).sum(0) + log_det)[:, 0]
            if not gradient:
                return log_joint, torch.zeros_like(points)
            (slope,) = torch.autograd.grad(log_joint.sum(), flat_points)
        return log_joint.detach(), slope[:, 0].double()

    def curvature(self, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return density (N,), gradient (N, L) and negative Hessian (N, L, L), by central differences of gradients."""
        count, size = points.shape
        moves = torch.diag(self.step)
        around = torch.cat([torch.zeros_like(moves[:1]), moves, -moves])
        value, slope = self((points.unsqueeze(1) + around).reshape(-1, size), gradient=True)
        slope = slope.reshape(count, 2 * size + 1, size)
        difference = (slope[:, size + 1 :] - slope[:, 1 : size + 1]) / (2 * self.step.unsqueeze(-1))
        return value.reshape(count, -1)[:, 0], slope[:, 0], 0.5 * (difference + difference.mT)


def find_modes(
    pair: Pair, datum: tuple[Tensor, ...], supports: Mapping[str, Any], fixed: Sequence[str]
) -> tuple[list[Mode], Tensor]:
    """Return the modes that damped Newton steps from several starts reach, the one of most evidence first, and a start.

    Args:
        pair: a pair in evaluation mode.
        datum: one datum and its conditions.
        supports: of the latent sites, by name.
        fixed: sites that the guide fixes to a point mass.
    """
    density = _Density(pair, datum, supports, fixed)
    points = density.starts.clone()
    active = torch.arange(len(points), device=points.device)
    for _ in range(ROUNDS):
        value, slope, curvature = density.curvature(points[active])
        density.adapt(curvature[value.nan_to_num(nan=-math.inf).argmax()])
        lengths, axes = _spectrum(curvature)
        step = (axes @ ((axes.mT @ slope.unsqueeze(-1)) / lengths.unsqueeze(-1))).squeeze(-1)
        gain = (step * slope).sum(-1)
        tried = points[active].unsqueeze(1) + step.unsqueeze(1) * points.new_tensor(SHARES).unsqueeze(-1)
        values, _ = density(tried.reshape(-1, points.shape[-1]))
        best, index = values.reshape(len(active), -1).nan_to_num(nan=-math.inf, neginf=-math.inf).max(-1)
        better = (best > value) & (gain > GAIN)
        points[active[better]] = tried[better, index[better]]
        active = active[better]
        if not len(active):
            break
    value, _, curvature = density.curvature(points)
    return _distinct(points, value, curvature), density.starts[0]


def _spectrum(curvature: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sizes of a matrix's eigenvalues, floored, and its axes."""
    values, axes = torch.linalg.eigh(curvature.nan_to_num())
    sizes = values.abs()
    return sizes.clamp(min=1e-12).maximum(FLOOR * sizes.amax(-1, keepdim=True)), axes


def _distinct(points: Tensor, value: Tensor, curvature: Tensor) -> list[Mode]:
    lengths, axes = _spectrum(curvature)
    factors = axes / lengths.sqrt().unsqueeze(-2)
    evidence = value + 0.5 * points.shape[-1] * math.log(2 * math.pi) - 0.5 * lengths.log().sum(-1)
    modes: list[Mode] = []
    for i in evidence.nan_to_num(nan=-math.inf).argsort(descending=True).tolist():
        if not bool(evidence[i].isfinite()) or (modes and evidence[i] < modes[0].log_evidence - LITTLE):
            continue
        away = [torch.linalg.solve(mode.factor, points[i] - mode.point).norm() for mode in modes]
        if all(distance > APART for distance in away):
            modes.append(Mode(points[i], factors[i], evidence[i]))
    return modes
