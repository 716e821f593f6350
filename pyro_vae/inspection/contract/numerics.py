"""Densities that are known to be wrong, and the change of volume that a flow reports against its Jacobian."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.transforms import Sylvester
from pyro.distributions.transforms.matrix_exponential import ConditionedMatrixExponential
from torch import Tensor
from torch.distributions import TransformedDistribution

from pyro_vae.pair.site import Site

__all__ = ["check_numerics"]

# A Jacobian takes a backward pass for each entry of the event: larger events are not checked.
ENTRIES = 128
# Nats by which a density may be off, beside the rounding of its terms.
ERROR = 0.01
# Roundings of a term of the density, relative to its size.
ROUNDINGS = 1000


def check_numerics(program: str, sites: Mapping[str, Site]) -> None:
    """Refuse distributions whose log-density is known, or seen at a draw, to be wrong.

    log q(y) = log q₀(x) − log |det ∂y/∂x|,   y = f(x)

    A flow forgets the draw that its site holds: score the sites before.

    Args:
        program: "model" or "guide", for messages.
        sites: its sites.

    Raises:
        ValueError: for torch's continuous Bernoulli, Pyro's matrix exponential and Sylvester, and a flow whose density
            differs from its base's over the Jacobian, with the way out.
    """
    for name, site in sites.items():
        for part in _parts(site.fn):
            _check_family(f"the {program}'s site '{name}'", part)
            if isinstance(part, TransformedDistribution):
                _check_volume(f"the {program}'s site '{name}'", part)


def _parts(distribution: Any) -> Iterator[Any]:
    """Yield a distribution and those inside it: of a wrapper or a mixture, and under a flow."""
    yield distribution
    for name in ("base_dist", "component_distribution", "components"):
        inner = getattr(distribution, name, None)
        if isinstance(inner, torch.distributions.Distribution):
            yield from _parts(inner)


def _check_family(place: str, part: Any) -> None:
    # Exact types: a subclass may mend what is wrong here.
    if type(part) in (torch.distributions.ContinuousBernoulli, dist.ContinuousBernoulli):
        raise ValueError(
            f"{place} is torch's ContinuousBernoulli, which clamps its normaliser from logits of 16 on and is then off "
            "by nats for each entry: use pyro_vae.distributions.ContinuousBernoulli(logits)"
        )
    layers = part.transforms if isinstance(part, TransformedDistribution) else []
    if any(type(layer) is Sylvester for layer in layers):
        raise ValueError(
            f"{place} has Pyro's Sylvester among its transforms, whose determinant is that of another map, off by nats "
            "for weights of order one: use pv.Sylvester, with the same parameters"
        )
    if any(isinstance(layer, ConditionedMatrixExponential) for layer in layers):
        raise ValueError(
            f"{place} has Pyro's matrix exponential among its transforms, a series of a few terms beside the exact "
            "determinant, off by nats once its matrix has a norm of 3: use affine_autoregressive, affine_coupling or "
            "pv.Sylvester in its place"
        )


def _check_volume(place: str, flow: TransformedDistribution) -> None:
    found = _densities(flow)
    if found is None:
        return
    reported, exact, rounding = found
    error = (reported - exact).abs()
    # NaN and infinities are refused where data or parameters are checked; here they compare as false.
    if bool((error > ERROR + rounding).any()):
        names = ", ".join(dict.fromkeys(type(layer).__name__ for layer in flow.transforms))
        raise ValueError(
            f"{place}: the density of a draw is off by {float(error.nan_to_num().max()):.3g} nats from the base's over "
            f"the Jacobian of the transforms ({names}): mend log_abs_det_jacobian, or use another "
            "transform"
        )


def _densities(flow: TransformedDistribution) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return the density of a new draw as reported and by the Jacobian, with a bound on rounding, in nats, (…).

    None for a map between spaces of different size, one that is not bijective or differentiable, and a large one.
    """
    base: Any = flow.base_dist
    size = math.prod(flow.event_shape)
    if size > ENTRIES or math.prod(base.event_shape) != size or not all(t.bijective for t in flow.transforms):
        return None
    with torch.enable_grad():
        x = base.sample().detach()
        if not x.is_floating_point():
            return None
        x.requires_grad_()
        y: Tensor = x
        for transform in flow.transforms:
            y = transform(y)
        if y.shape != x.shape or not y.requires_grad:
            return None
        columns = y.reshape(*y.shape[: y.dim() - len(flow.event_shape)], size).unbind(-1)
        rows = [torch.autograd.grad(column.sum(), x, retain_graph=True)[0] for column in columns]
        reported = flow.log_prob(y).detach().double()
    jacobian = torch.stack([row.reshape(*row.shape[: row.dim() - len(base.event_shape)], size) for row in rows], -2)
    before = base.log_prob(x.detach()).double()
    exact = before - torch.linalg.slogdet(jacobian.double())[1]
    eps = torch.finfo(x.dtype).eps
    singular = torch.linalg.svdvals(jacobian.double())
    # An entry of the Jacobian is off by a few roundings of its largest: log |det| by as many times the condition.
    condition = singular[..., 0] / singular[..., -1]
    return reported, exact, ROUNDINGS * eps * (reported.abs() + before.abs()) + 10 * size * eps * condition
