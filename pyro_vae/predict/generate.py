"""Draw new data from a pair."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_vae.inspection.arrays import takes_arrays
from pyro_vae.inspection.contract.checks import check_parameters
from pyro_vae.inspection.data import check_conditions
from pyro_vae.inspection.observed import dependent_on_draws, model_on_few
from pyro_vae.pair.modes import device_of, drawing
from pyro_vae.pair.pair import Pair
from pyro_vae.pair.trace import run_model, site_of_x
from pyro_vae.runtime.scalars import whole
from pyro_vae.runtime.threads import one_at_a_time

__all__ = ["Generated", "generate", "placeholder_for"]


class Generated(NamedTuple):
    """New data: ``x`` (N, …) draws from the likelihood, ``mean`` (N, …) its means, ``latents`` by site (N, …)."""

    x: Tensor
    mean: Tensor
    latents: dict[str, Tensor]


@one_at_a_time
@takes_arrays
def generate(
    pair: Pair,
    num_samples: int,
    *conditions: Tensor,
    given: dict[str, Tensor] | None = None,
    draw: Sequence[str] = (),
    seed: int | None = None,
) -> Generated:
    """Draw latents from their priors, then x from the likelihood.

    A condition that the model observes stays as it is, e.g. a label: the draws are given it. This needs a distribution
    of the label that depends on no latent and not on x. Else name its site in ``draw``.

    Args:
        pair: any pair that states ``x_shape``.
        num_samples: N.
        conditions: the model's conditions, N rows each.
        given: latents to hold at a value, by site, (N, …) each.
        draw: observed sites to draw with x, e.g. a second kind of data; of their conditions the shape alone counts.
        seed: of the draws; fresh entropy without one.

    Returns:
        :class:`Generated`.

    Raises:
        ValueError: for N < 1, a pair without ``x_shape``, conditions that the model cannot take, an unknown site in
            ``given`` or ``draw``, a latent that all data share, and an observed condition that depends on draws.

    >>> import torch, pyro_vae as pv
    >>> generate(pv.models.LinearGaussianVAE(5, 2), 64).x.shape
    torch.Size([64, 5])
    """
    num_samples = whole(num_samples, "num_samples")
    if num_samples < 1:
        raise ValueError(f"num_samples is {num_samples}; it must be at least 1")
    placeholder = placeholder_for(pair, num_samples)
    conditions = tuple(tensor.to(placeholder.device) for tensor in conditions)
    values = {name: value.to(placeholder.device) for name, value in (given or {}).items()}
    batch = (placeholder, *conditions)
    check_parameters(pair)
    for tensor in conditions:
        if len(tensor) != num_samples:
            raise ValueError(f"a condition has {len(tensor)} rows for num_samples = {num_samples}; they must be equal")
    model, few = model_on_few(pair, *batch)
    name_of_x = site_of_x(model, few[0]).name
    drawn = {name_of_x, *draw, *values}
    check_conditions(pair, {name: site for name, site in model.items() if name not in drawn}, few, batch)
    if conditions and (held := [name for name in dependent_on_draws(pair, *batch) if name not in drawn]):
        raise ValueError(
            f"the model observes {held}, whose distribution depends on latents or on x: given a value of it they "
            f"follow a posterior, which generate does not draw from; draw it with x by draw={tuple(held)}"
        )
    with drawing(pair, seed):
        sites = run_model(pair, *batch, values=values, draw=drawn)
        for argument, names in (("given", given or {}), ("draw", draw)):
            if unknown := sorted(set(names) - set(sites)):
                raise ValueError(f"{argument} names {unknown}; the model's sites are {sorted(sites)}")
        for site in sites.values():
            site.check_plates()
        x = sites[name_of_x]
        latents = {name: site.drawn for name, site in sites.items() if site is not x and not site.is_factor}
        return Generated(x.drawn, x.fn.mean, latents)


def placeholder_for(pair: Pair, size: int) -> Tensor:
    """Return an x of N = ``size`` zeros, for a model that only reads its length.

    Raises:
        ValueError: for a pair without ``x_shape``.
    """
    if not hasattr(pair, "x_shape"):
        raise ValueError(f"{type(pair).__name__} states no x_shape, the shape of one datum: set it in __init__")
    dtype = pair.x_dtype or next((p.dtype for p in pair.parameters()), torch.get_default_dtype())
    return torch.zeros(size, *pair.x_shape, dtype=dtype, device=device_of(pair))
