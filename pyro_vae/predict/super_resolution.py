"""Draw high-resolution images for a low-resolution one."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from pyro_vae.pair.checks import check_tensor, refuse_outside
from pyro_vae.pair.modes import drawing
from pyro_vae.pair.observed import find_x
from pyro_vae.pair.pair import Pair
from pyro_vae.pair.trace import run_model, run_program
from pyro_vae.predict.generate import placeholder_for

__all__ = ["SuperResolution", "super_resolve"]


class SuperResolution(NamedTuple):
    """High-resolution images.

    Args:
        samples: draws from p(x | y), (K, B, …).
        means: E[x | y, z_k], (K, B, …).
        spread: standard deviation of the draws at each pixel, (B, …).
        log_weights: log p(y, u) − log q(u | y), (K, B), in nats.
    """

    samples: Tensor
    means: Tensor
    spread: Tensor
    log_weights: Tensor


def super_resolve(pair: Pair, y: Tensor, *, num_samples: int = 16, seed: int | None = None) -> SuperResolution:
    """Draw many high-resolution images for each low-resolution one.

    u ~ q(u | y),   z ~ p(z | y, u),   x ~ p(x | y, z)

    Args:
        pair: a pair with a ``low_resolution_guide`` and a site ``y``, such as SRVAE.
        y: (B, C, h, w).
        num_samples: K, draws for each y.
        seed: of the draws; fresh entropy without one.

    Returns:
        :class:`SuperResolution`.

    Raises:
        ValueError: for a pair without a low-resolution stage, K < 1, and bad images.
    """
    if not hasattr(pair, "low_resolution_guide"):
        raise ValueError(f"{type(pair).__name__} has no low-resolution stage: super_resolve needs a pair such as SRVAE")
    y_shape: Any = pair.y_shape
    if tuple(y.shape[1:]) != tuple(y_shape):
        raise ValueError(f"y has shape {tuple(y.shape)}; the pair's low resolution is {tuple(y_shape)}")
    if num_samples < 1:
        raise ValueError(f"num_samples is {num_samples}; it must be at least 1")
    if len(y) == 0:
        raise ValueError("y holds no image")
    low_resolution: Any = pair.low_resolution_guide
    placeholder = placeholder_for(pair, len(y))
    check_tensor(y, placeholder.dtype, "y")
    y = y.to(placeholder.device)
    name_of_x = find_x(pair, placeholder).name
    with drawing(pair, seed):
        guide = run_program(pair, low_resolution, y, num_particles=num_samples)
        values = {"y": y} | {name: site.drawn for name, site in guide.items()}
        model = run_model(pair, placeholder, num_particles=num_samples, values=values, draw=(name_of_x,))
        refuse_outside(model["y"], y, "y")
        x = model[name_of_x]
        log_weights: Any = sum(model[name].log_prob for name in values) - sum(s.log_prob for s in guide.values())
        return SuperResolution(x.drawn, x.fn.mean, x.drawn.std(0, correction=0), log_weights)
