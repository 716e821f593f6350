"""Effect handlers for a pair's sites."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_vae.pair.site import bare, is_point_mass, scored_entries

__all__ = ["DrawObserved", "EnoughError", "HoldLatents", "ReplaceLikelihood", "StopAfter", "scaled_latents"]


@contextmanager
def scaled_latents(beta: float | Tensor) -> Iterator[None]:
    """Weigh the divergence of any Pyro ELBO inside by β.

    log p(x | z) + β [log p(z) − log q(z | x)]

    ``poutine.scale`` cannot do this: it refuses β = 0, where warm-ups begin, and scales the data term too.
    """
    # In a captured step β is a tensor, whose value must not be read.
    if not isinstance(beta, Tensor) and beta == 1.0:
        yield
    else:
        with _ScaleLatents(beta):
            yield


class DrawObserved(Messenger):
    """Draw observed sites in place of their data; the others stay observed.

    Args:
        names: of the sites to draw.
    """

    def __init__(self, names: Collection[str]) -> None:
        super().__init__()
        self.names = names

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] and msg["name"] in self.names:
            msg["infer"] = {**msg["infer"], "was_observed": True, "obs": msg["value"]}
            msg["is_observed"], msg["value"], msg["done"] = False, None, False


class HoldLatents(Messenger):
    """Set latent sites to given values. They are scored, and stay latent.

    Args:
        values: by site, in the program's order.
    """

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.values and not msg["is_observed"]:
            msg["value"], msg["done"] = self.values[msg["name"]], True


class EnoughError(Exception):
    """A program has drawn all that was asked of it."""


class StopAfter(Messenger):
    """Leave a program by :class:`EnoughError` once it has sampled some sites: the rest, often a decoder, need not run.

    Args:
        names: of the sites.
    """

    def __init__(self, names: Collection[str]) -> None:
        super().__init__()
        self.to_come = set(names)

    def _pyro_post_sample(self, msg: Any) -> None:
        self.to_come.discard(msg["name"])
        if not self.to_come:
            raise EnoughError


class ReplaceLikelihood(Messenger):
    """Replace the distribution of observed sites. A mask of whole events stays.

    Args:
        replace: maps a site's distribution, without wrappers, to another one, or to None to leave it.
    """

    def __init__(self, replace: Callable[[Any], Any]) -> None:
        super().__init__()
        self.replace = replace

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] and (other := self.replace(bare(msg["fn"]))) is not None:
            scored = scored_entries(msg["fn"])
            msg["fn"] = other if scored is None else other.mask(scored[(..., *(0,) * other.event_dim)])


class _ScaleLatents(Messenger):
    """Scale the log-densities of latent sites by β ≥ 0, in the guide and in the model that replays it.

    A site that the guide fixes to a point mass counts as data and is not scaled.
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
