"""The path of densities from a proposal to the posterior."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_vae.likelihood.fitting.flat import FlatLatents
from pyro_vae.pair.pair import Pair
from pyro_vae.pair.site import Site
from pyro_vae.pair.trace import run_guide, run_model, trace_pair

__all__ = ["AnnealingPath", "Start"]

Start: TypeAlias = Literal["prior", "guide"]


class AnnealingPath:
    """The two densities of an annealing run, on all latents of all sites side by side, z (C, B, L)."""

    def __init__(self, pair: Pair, batch: tuple[Tensor, ...], num_chains: int, start: Start) -> None:
        self.pair, self.batch, self.num_chains, self.start = pair, batch, num_chains, start
        trace = trace_pair(pair, *batch, num_particles=num_chains)
        self.fixed = {name: trace.guide[name].drawn for name in sorted(trace.point_masses)}
        self.sites = trace.latents
        for name in self.sites:
            _check_real(trace.model[name])
        self.flat = FlatLatents(self.sites)

    def draw(self) -> Tensor:
        """Return C × B independent draws of p_0, (C, B, L)."""
        run = run_model if self.start == "prior" else run_guide
        sites = run(self.pair, *self.batch, num_particles=self.num_chains, values=self.fixed)
        return self.flat.points_of(sites)

    def posterior_draw(self, latents: dict[str, Tensor], rows: Tensor) -> Tensor:
        """Return each datum's simulated latents for every chain, (C, B, L)."""
        chosen = {}
        for name, site in self.sites.items():
            # One draw, without an axis of particles.
            value = latents[name].movedim(site.data_dim, 0)[rows.to(latents[name].device)]
            chosen[name] = site.lay_out(value.movedim(0, site.data_dim))
        return self.flat.lay_out(chosen)

    def log_densities(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return log p_0(z) and log p(x, z), each (C, B)."""
        values, _ = self.flat.take_apart(z)
        model = run_model(self.pair, *self.batch, num_particles=self.num_chains, values={**self.fixed, **values})
        log_joint: Any = sum(site.log_prob for site in model.values())
        start: Mapping[str, Site] = model
        if self.start == "guide":
            start = run_guide(self.pair, *self.batch, num_particles=self.num_chains, values=values)
        log_start: Any = sum(start[name].log_prob for name in self.sites)
        return log_start, log_joint

    def with_gradient(self, z: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor]:
        """Return both log-densities (C, B), and the gradient (C, B, L) of (1 − β) log p_0 + β log p."""
        z = z.detach().requires_grad_()
        with torch.enable_grad():
            start, joint = self.log_densities(z)
            (gradient,) = torch.autograd.grad(((1 - beta) * start + beta * joint).sum(), z)
        return start.detach(), joint.detach(), gradient

    def refuse_point_masses(self) -> None:
        """Refuse a guide that fixes a site: a simulated value would differ from the guide's."""
        for name in self.fixed:
            raise ValueError(
                f"the guide fixes site '{name}' to a point mass at a function of x, where a simulated '{name}' is not: "
                "use annealed_log_likelihood on data"
            )


def _check_real(site: Site) -> None:
    if site.entry_support is not constraints.real:
        raise ValueError(
            f"site '{site.name}' ({type(site.fn).__name__}) has support {site.entry_support}: annealing moves latents "
            "by their gradients and needs every one real; use log_likelihood, or write the site as a transformed real "
            "one"
        )
