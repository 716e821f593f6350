"""Effect handlers that change how a pair's sites count, while its programs stay as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_vae.pair.site import bare, is_point_mass

__all__ = ["ReplaceLikelihood", "scaled_latents"]


class _ScaleLatents(Messenger):
    """Scale the log-densities of latent sites by β ≥ 0, in the guide and in the model that replays it.

    A site that the guide fixes to a point mass is data, not a latent to regularise, and keeps its weight.
    """

    def __init__(self, beta: float | Tensor) -> None:
        super().__init__()
        self.beta = beta
        self.fixed: set[str] = set()

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"]:
            return
        if is_point_mass(msg["fn"]):
            self.fixed.add(msg["name"])
        if msg["name"] not in self.fixed:
            msg["scale"] = msg["scale"] * self.beta


@contextmanager
def scaled_latents(beta: float | Tensor) -> Iterator[None]:
    """Weigh the divergence terms of any Pyro ELBO inside by β: log p(x | z) + β [log p(z) − log q(z | x)].

    ``poutine.scale`` refuses β = 0, where warm-ups begin, and weighs the data term too.
    """
    # In a captured step β is a tensor, whose value must not be read.
    if not isinstance(beta, Tensor) and beta == 1.0:
        yield
    else:
        with _ScaleLatents(beta):
            yield


class ReplaceLikelihood(Messenger):
    """Put another distribution in the place of an observed site's.

    Args:
        replace: maps the site's distribution, without wrappers, to another one, or to None to leave it.
    """

    def __init__(self, replace: Callable[[Any], Any]) -> None:
        super().__init__()
        self.replace = replace

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] and (other := self.replace(bare(msg["fn"]))) is not None:
            msg["fn"] = other
