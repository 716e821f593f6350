"""The path of densities from a proposal to the posterior."""

from __future__ import annotations

import math
from typing import Any, Literal, TypeAlias

import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import constraints

from pyro_vae.pair.pair import Pair
from pyro_vae.pair.trace import particle_dim, particle_plate, point_masses, sample_sites, site_log_prob, trace_pair

__all__ = ["AnnealingPath", "Start"]

Start: TypeAlias = Literal["prior", "guide"]


class AnnealingPath:
    """The densities that annealing goes between, on all latents of all sites laid side by side, z (C, B, L)."""

    def __init__(self, pair: Pair, batch: tuple[Tensor, ...], num_chains: int, start: Start) -> None:
        self.pair, self.batch, self.num_chains, self.start = pair, batch, num_chains, start
        guide, model = trace_pair(pair, *batch, num_particles=num_chains)
        self.fixed = {name: guide.nodes[name]["value"] for name in sorted(point_masses(guide))}
        self.sites = {name: site for name, site in sample_sites(guide).items() if name not in self.fixed}
        for name in self.sites:
            _check_real(name, model.nodes[name]["fn"])
        self.shapes = {name: site["value"].shape for name, site in self.sites.items()}

    def draw(self) -> Tensor:
        """Return C × B independent draws of p_0, (C, B, L)."""
        sites = sample_sites(self._trace("model" if self.start == "prior" else "guide", self.fixed))
        return self._lay_out({name: sites[name]["value"] for name in self.sites})

    def posterior_draw(self, latents: dict[str, Tensor], rows: Tensor) -> Tensor:
        """Return each datum's own latents for every chain, (C, B, L)."""
        chosen = {}
        for name, shape in self.shapes.items():
            value = latents[name].movedim(self._data_dim(name), 0)[rows.to(latents[name].device)]
            chosen[name] = value.movedim(0, self._data_dim(name)).expand(shape)
        return self._lay_out(chosen)

    def log_densities(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return log p_0(z) and log p(x, z), each (C, B)."""
        dim = particle_dim(self.pair)
        values = self._take_apart(z)
        model = sample_sites(self._trace("model", {**self.fixed, **values}))
        terms = {name: site_log_prob(site, dim) for name, site in model.items()}
        log_joint: Any = sum(terms.values())
        if self.start == "guide":
            terms = {
                name: site_log_prob(site, dim) for name, site in sample_sites(self._trace("guide", values)).items()
            }
        log_start: Any = sum(terms[name] for name in self.sites)
        return log_start, log_joint

    def refuse_point_masses(self) -> None:
        """Raise where the guide fixes a site, whose simulated value would not be the guide's."""
        for name in self.fixed:
            raise ValueError(
                f"the guide fixes site '{name}' to a point mass at a function of x, where a simulated '{name}' is not: "
                "use annealed_log_likelihood on data"
            )

    def _trace(self, program: str, values: dict[str, Tensor]) -> Trace:
        with particle_plate(self.pair, self.num_chains):
            conditioned = poutine.condition(getattr(type(self.pair), program), data=values)
            return poutine.trace(conditioned).get_trace(self.pair, *self.batch)

    def _data_dim(self, name: str) -> int:
        site = self.sites[name]
        return next(f.dim for f in site["cond_indep_stack"] if f.name == "data") - site["fn"].event_dim

    def _lay_out(self, values: dict[str, Tensor]) -> Tensor:
        parts = [values[name].expand(shape).movedim(self._data_dim(name), 1) for name, shape in self.shapes.items()]
        return torch.cat([part.reshape(*part.shape[:2], -1) for part in parts], -1)

    def _take_apart(self, z: Tensor) -> dict[str, Tensor]:
        values, begin = {}, 0
        for name, shape in self.shapes.items():
            moved = torch.empty(shape, device="meta").movedim(self._data_dim(name), 1).shape
            end = begin + math.prod(moved[2:])
            values[name] = z[..., begin:end].reshape(moved).movedim(1, self._data_dim(name))
            begin = end
        return values


def _check_real(name: str, distribution: Any) -> None:
    support = distribution.support
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    if support is not constraints.real:
        raise ValueError(
            f"site '{name}' ({type(distribution).__name__}) has support {support}: annealing moves latents by their "
            "gradients and needs every one real; use log_likelihood, or write the site as a transformed real one"
        )
