"""Log-densities of both programs at given latents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_vae.pair.agreement import check_same_latents
from pyro_vae.pair.pair import Pair
from pyro_vae.pair.site import Site
from pyro_vae.pair.trace import run_guide, run_model

__all__ = ["densities", "runs", "scores"]


def scores(guide: Mapping[str, Site]) -> bool:
    """Whether the guide's distributions score values that are not their latest draws; a one-way flow does not."""
    try:
        for site in guide.values():
            site.fn.log_prob(site.drawn.clone())
    except (KeyError, NotImplementedError):
        return False
    return True


def densities(
    pair: Pair,
    batch: tuple[Tensor, ...],
    values: Mapping[str, Tensor],
    num_particles: int | None,
    noise: bool = False,
    seed: int = 0,
) -> tuple[dict[str, Tensor], dict[str, Site], dict[str, Tensor]]:
    """Return both programs' log-densities by name, at given latents, the model's sites, and the latents' values.

    With ``noise``, the guide draws its latents again. All that it draws here comes from noise that is the same for
    every datum and particle.
    """
    torch.manual_seed(seed)
    with _EqualNoise():
        # A guide may draw more than its latents, e.g. corruptions of x: its weights average to p(x) all the same.
        held = None if noise else values
        guide = run_guide(pair, *batch, num_particles=num_particles, values=held)
        terms = {f"guide's site '{name}'": site.log_prob for name, site in guide.items()}
    values = {name: site.drawn for name, site in guide.items()}
    model = run_model(pair, *batch, num_particles=num_particles, values=values)
    terms |= {f"model's site '{name}'": site.log_prob for name, site in model.items()}
    return terms, model, values


def runs(pair: Pair, batch: tuple[Tensor, ...], num_particles: int | None) -> bool:
    """Whether both programs run on this batch."""
    try:
        guide = run_guide(pair, *batch, num_particles=num_particles)
        values = {name: site.drawn for name, site in guide.items()}
        model = run_model(pair, *batch, num_particles=num_particles, values=values)
        check_same_latents(guide, model)
        for site in (*guide.values(), *model.values()):
            _ = site.log_prob
    except Exception:
        return False
    return True


class _EqualNoise(TorchDispatchMode):
    """Give draws of normal, uniform and Bernoulli noise the same values for every datum and particle."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.__name__.split(".")[0]
        if name in ("normal", "normal_", "randn", "randn_like"):
            mean, deviation = args[:2] if name == "normal" else (0.0, 1.0)
            return out.copy_(mean + deviation * _pattern(out, -1.0, 1.2))
        if name in ("rand", "rand_like", "uniform_"):
            return out.copy_(_pattern(out, 0.1, 0.9))
        if name == "bernoulli":
            return out.copy_(args[0] > 0.5)
        return out


def _pattern(tensor: Tensor, low: float, high: float) -> Tensor:
    """Return numbers that change along the last dimension only."""
    size = tensor.shape[-1] if tensor.dim() else 1
    return torch.linspace(low, high, size, dtype=tensor.dtype, device=tensor.device)
