"""A pair with another guide in place of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from pyro_vae.pair.pair import Pair

__all__ = ["with_guide"]


class _Guided(Pair):
    """The model of one pair, and another program over the same latents as its guide."""

    def __init__(self, pair: Pair, program: Callable[..., Any]) -> None:
        super().__init__()
        # A module among the attributes is trained, moved and recorded with the pair.
        self.pair, self.program = pair, program
        self.x_shape, self.x_dtype = tuple(pair.x_shape), pair.x_dtype  # type: ignore[misc]
        self.max_plate_nesting = pair.max_plate_nesting  # type: ignore[misc]
        if (dimensions := getattr(pair, "num_dimensions", None)) is not None:
            self.num_dimensions = dimensions
        self.train(pair.training)

    def model(self, *batch: Any) -> None:
        type(self.pair).model(self.pair, *batch)

    def guide(self, *batch: Any) -> None:
        self.program(*batch)


def with_guide(pair: Pair, program: Callable[..., Any]) -> Pair:
    """Return a pair of the same model and another guide.

    Args:
        pair: any pair.
        program: called as the pair's guide is, with ``x`` and the conditions; a Pyro program that samples every latent
            site of the model inside ``pyro.plate("data", len(x))``. It may be an ``nn.Module``.

    >>> import pyro, torch, pyro.distributions as dist, pyro_vae as pv
    >>> def wide(x):
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 2.0).to_event(1))
    >>> pair = with_guide(pv.models.LinearGaussianVAE(5, 2), wide)
    >>> pv.log_terms(pair, torch.zeros(3, 5)).log_guide.shape
    torch.Size([1, 3])
    """
    if isinstance(program, nn.Module):
        program.train(pair.training)
    return _Guided(pair, program)
