"""The continuous latents of a pair side by side, without constraints: points of R^L."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributions import biject_to, constraints

from pyro_vae.pair.site import Site
from pyro_vae.pair.trace import PairTrace

__all__ = ["FlatLatents", "unfit"]

# Latents of a datum at most: their Hessian has as many rows, each from two gradients.
MOST_LATENTS = 300
REAL = (-math.inf, math.inf)
# Supports whose bijection from R^n depends on no tensor.
FREE = (constraints.real, constraints.positive, constraints.nonnegative, constraints.unit_interval)


def unfit(trace: PairTrace) -> str:
    """Return why no proposal can be fitted to a pair's latents, empty if one can.

    Args:
        trace: of the pair on a few data.
    """
    size = 0
    for name, site in trace.latents.items():
        if site.is_discrete:
            return f"site '{name}' is discrete"
        if site.scored is not None:
            return f"site '{name}' is masked"
        if trace.model[name].entry_support is constraints.real and trace.model[name].interval not in (None, REAL):
            # torch calls a circle's support real.
            return f"site '{name}' is periodic"
        if not any(trace.model[name].entry_support is free for free in FREE):
            return f"site '{name}' has support {trace.model[name].entry_support}, which is no fixed interval"
        size += math.prod(site.value.shape[2:])
    if not size:
        return "the guide draws no latent"
    return f"there are {size} latents a datum, more than {MOST_LATENTS}" if size > MOST_LATENTS else ""


class FlatLatents:
    """The map between the latent sites of one run and points u of R^L.

    Args:
        sites: the latent sites of a run, each laid out as (K, B, …).
        supports: the support of each site's entries, by name; sites without one are left out. All real by default.
    """

    def __init__(self, sites: Mapping[str, Site], supports: Mapping[str, Any] | None = None) -> None:
        supports = dict.fromkeys(sites, constraints.real) if supports is None else supports
        self.sites = {name: sites[name] for name in supports}
        # Shapes, not values: a recording may hold no tensor of another run.
        self.shapes = {name: tuple(site.value.shape[2:]) for name, site in self.sites.items()}
        self.maps = {name: biject_to(support) for name, support in supports.items()}

    @property
    def size(self) -> int:
        """L."""
        return sum(map(math.prod, self.shapes.values()))

    def points_of(self, sites: Mapping[str, Site]) -> Tensor:
        """Return the values of another run's sites as points, (K, B, L)."""
        return self.lay_out({name: sites[name].value for name in self.sites})

    def lay_out(self, values: Mapping[str, Tensor]) -> Tensor:
        """Return values that are laid out as (K, B, …) as points, (K, B, L)."""
        parts = [self.maps[name].inv(values[name]) for name in self.sites]
        return torch.cat([part.reshape(*part.shape[:2], -1) for part in parts], -1)

    def take_apart(self, points: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Return the sites' values in the program's order, and log |det ∂z/∂u|, (K, B), in nats."""
        values, begin = {}, 0
        log_det = torch.zeros(points.shape[:2], dtype=torch.float64, device=points.device)
        for name, site in self.sites.items():
            shape = (*points.shape[:2], *self.shapes[name])
            end = begin + math.prod(self.shapes[name])
            part = points[..., begin:end].reshape(shape)
            value = self.maps[name](part)
            values[name] = site.as_drawn(value)
            change = self.maps[name].log_abs_det_jacobian(part, value)
            log_det = log_det + change.reshape(*points.shape[:2], -1).double().sum(-1)
            begin = end
        return values, log_det
