"""Draw high-resolution images for a low-resolution one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from pyro import poutine
from torch import Tensor

from pyro_vae.inspection import inspect
from pyro_vae.inspection.arrays import takes_arrays
from pyro_vae.inspection.data import check_tensor
from pyro_vae.inspection.observed import find_x
from pyro_vae.pair.modes import drawing
from pyro_vae.pair.pair import Pair
from pyro_vae.pair.trace import run_model, run_program
from pyro_vae.pair.weights import weight_sums
from pyro_vae.predict.generate import placeholder_for
from pyro_vae.runtime.random_state import derived_seed, own_random_state
from pyro_vae.runtime.scalars import whole
from pyro_vae.runtime.threads import one_at_a_time

__all__ = ["SuperResolution", "super_resolve"]


class SuperResolution(NamedTuple):
    """High-resolution images.

    The draws are those of the guide, ∫ p(x | y, z) p(z | y, u) q(u | y) dz du. They are draws from p(x | y) only if
    q(u | y) is the posterior p(u | y). Else weight draw k by ``log_weights.softmax(0)[k]``.

    Args:
        samples: unweighted draws of the guide's u, then of the model, (K, B, …).
        means: E[x | y, z_k], (K, B, …).
        spread: standard deviation of ``samples`` at each pixel, with divisor K − 1, (B, …); NaN for K = 1.
        log_weights: log p(y, u) − log q(u | y), (K, B), in nats.
    """

    samples: Tensor
    means: Tensor
    spread: Tensor
    log_weights: Tensor

    @property
    def ess(self) -> Tensor:
        """Effective number of draws from p(x | y), (B,), between 1 and K; near K if q(u | y) is near p(u | y)."""
        return weight_sums(self.log_weights.double()).ess

    def resample(self, num_draws: int, *, seed: int | None = None) -> Tensor:
        """Choose among ``samples`` with replacement by their weights, (num_draws, B, …).

        The choices follow p(x | y) as K rises. Do not ask for many more than ``ess``: they repeat each other.

        Args:
            num_draws: number of choices for each y.
            seed: of the choices; fresh entropy without one.

        Raises:
            ValueError: for ``num_draws`` < 1, and for weights that are not finite.
        """
        num_draws = whole(num_draws, "num_draws")
        if num_draws < 1:
            raise ValueError(f"num_draws is {num_draws}; it must be at least 1")
        if not self.log_weights.logsumexp(0).isfinite().all():
            raise ValueError("the weights of a y are all zero, infinite or NaN, and choose no draw: train the guide")
        with own_random_state(None if seed is None else derived_seed(seed, "resample"), self.log_weights.device):
            chosen = self.log_weights.softmax(0).mT.multinomial(num_draws, replacement=True).mT
        return self.samples[chosen, torch.arange(chosen.shape[1], device=chosen.device)]


class _LowResolution(Pair):
    """The first stage of a pair: p(y, u) and q(u | y), without the sites of the model that come after them.

    Args:
        pair: a pair with a low-resolution stage.
        guide: its low-resolution guide, or a program in its place.
        latents: the sites of that.
    """

    def __init__(self, pair: Pair, guide: Callable[..., Any], latents: Iterable[str]) -> None:
        super().__init__()
        self.low_resolution = guide
        self.latents = tuple(latents)
        self.pair, self.x_shape, self.x_dtype = pair, tuple(pair.y_shape), pair.x_dtype  # type: ignore[arg-type,misc]
        self.max_plate_nesting = pair.max_plate_nesting  # type: ignore[misc]

    def model(self, y: Tensor) -> None:
        to_come = {"y", *self.latents}

        def comes_after(site: dict[str, Any]) -> bool:
            after = not to_come
            to_come.discard(site["name"])
            return after

        with poutine.block(hide_fn=comes_after), poutine.condition(data={"y": y}):
            self.pair.model(placeholder_for(self.pair, len(y)))

    def guide(self, y: Tensor) -> None:
        self.low_resolution(y)


@one_at_a_time
@takes_arrays
def super_resolve(
    pair: Pair,
    y: Tensor,
    *,
    num_samples: int = 16,
    seed: int | None = None,
    proposal: Callable[..., Any] | None = None,
) -> SuperResolution:
    """Draw many high-resolution images for each low-resolution one.

    u ~ q(u | y),   z ~ p(z | y, u),   x ~ p(x | y, z)

    Args:
        pair: a pair with a ``low_resolution_guide`` and a site ``y``, such as SRVAE.
        y: (B, C, h, w).
        num_samples: K, draws for each y.
        seed: of the draws; fresh entropy without one. Calls with one seed share their noise: pass different seeds to
            calls whose results you combine.
        proposal: a program in the place of the pair's ``low_resolution_guide`` q(u | y), called with y.

    Returns:
        :class:`SuperResolution`.

    Raises:
        ValueError: for a pair without a low-resolution stage or one that breaks its contract, K < 1, and bad images.
    """
    if not hasattr(pair, "low_resolution_guide"):
        raise ValueError(f"{type(pair).__name__} has no low-resolution stage: super_resolve needs a pair such as SRVAE")
    y_shape: Any = pair.y_shape
    if tuple(y.shape[1:]) != tuple(y_shape):
        raise ValueError(f"y has shape {tuple(y.shape)}; the pair's low resolution is {tuple(y_shape)}")
    num_samples = whole(num_samples, "num_samples")
    if num_samples < 1:
        raise ValueError(f"num_samples is {num_samples}; it must be at least 1")
    if len(y) == 0:
        raise ValueError("y holds no image")
    low_resolution: Any = pair.low_resolution_guide if proposal is None else proposal
    placeholder = placeholder_for(pair, len(y))
    check_tensor(y, placeholder.dtype, "y")
    y = y.to(placeholder.device)
    name_of_x = find_x(pair, placeholder).name
    with drawing(pair, seed=0):
        latents = run_program(pair, low_resolution, y[:1])
    inspect(_LowResolution(pair, low_resolution, latents), (y,), "y")
    with drawing(pair, seed):
        guide = run_program(pair, low_resolution, y, num_particles=num_samples)
        values = {"y": y} | {name: site.drawn for name, site in guide.items()}
        model = run_model(pair, placeholder, num_particles=num_samples, values=values, draw=(name_of_x,))
        x = model[name_of_x]
        log_weights: Any = sum(model[name].log_prob for name in values) - sum(s.log_prob for s in guide.values())
        # One draw has no spread; torch would warn.
        spread = x.drawn.std(0) if num_samples > 1 else torch.full_like(x.drawn[0], math.nan)
        return SuperResolution(x.drawn, x.fn.mean, spread, log_weights)
