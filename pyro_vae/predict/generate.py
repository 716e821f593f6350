"""Draw new data from a pair."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyro_vae.pair.modes import device_of, drawing
from pyro_vae.pair.pair import Pair
from pyro_vae.pair.trace import run_model, site_of_x

__all__ = ["Generated", "generate", "placeholder_for"]


class Generated(NamedTuple):
    """New data: ``x`` (N, …) draws from the likelihood, ``mean`` (N, …) its means, ``latents`` by site (N, …)."""

    x: Tensor
    mean: Tensor
    latents: dict[str, Tensor]


def generate(
    pair: Pair, num_samples: int, *conditions: Tensor, given: dict[str, Tensor] | None = None, seed: int | None = None
) -> Generated:
    """Draw latents from their priors, then x from the likelihood.

    Args:
        pair: any pair that states ``x_shape``.
        num_samples: N.
        conditions: the model's conditions, N rows each.
        given: latents to hold at a value, by site, (N, …) each.
        seed: of the draws; fresh entropy without one.

    Returns:
        :class:`Generated`.

    Raises:
        ValueError: for N < 1, a pair without ``x_shape``, an unknown site in ``given``.

    >>> import torch, pyro_vae as pv
    >>> generate(pv.models.LinearGaussianVAE(5, 2), 64).x.shape
    torch.Size([64, 5])
    """
    if num_samples < 1:
        raise ValueError(f"num_samples is {num_samples}; it must be at least 1")
    placeholder = placeholder_for(pair, num_samples)
    with drawing(pair, seed):
        conditions = tuple(tensor.to(placeholder.device) for tensor in conditions)
        values = {name: value.to(placeholder.device) for name, value in (given or {}).items()}
        sites = run_model(pair, placeholder, *conditions, values=values, observe=False)
        if unknown := sorted(set(given or ()) - set(sites)):
            raise ValueError(f"given names {unknown}; the model's sites are {sorted(sites)}")
        x = site_of_x(sites, placeholder)
        latents = {name: site.drawn for name, site in sites.items() if site is not x}
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
