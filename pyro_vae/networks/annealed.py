"""Numbers that change while a pair trains, e.g. a temperature or a capacity."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

__all__ = ["Annealed", "advance", "annealed"]


class Annealed(nn.Module):
    """Move from ``start`` to ``end`` over the first epochs of a run, then stay there.

    :func:`~pyro_vae.fit` moves it before each step. In a loop that you write, call :func:`advance`. ``value`` is a
    buffer: a captured step reads it at each replay, and checkpoints save it.

    Args:
        start, end: the first value and the last.
        epochs: length of the move; 0 starts at ``end``.
        geometric: interpolate log-values instead of values.

    Raises:
        ValueError: for values that are not finite, negative epochs, and a geometric move unless both values are
            positive.

    >>> capacity = Annealed(0.0, 25.0, epochs=10)
    >>> capacity.move_to(2.0)
    >>> capacity()
    tensor(5.)
    """

    value: Tensor

    def __init__(self, start: float, end: float, epochs: float, *, geometric: bool = False) -> None:
        super().__init__()
        if not (math.isfinite(start) and math.isfinite(end) and 0 <= epochs < math.inf):
            raise ValueError(f"start is {start}, end {end}, epochs {epochs}: all finite, and epochs not negative")
        if geometric and not min(start, end) > 0:
            raise ValueError(f"start is {start}, end {end}: a geometric way leads from one positive number to another")
        self.start, self.end, self.epochs, self.geometric = float(start), float(end), float(epochs), geometric
        self.register_buffer("value", torch.tensor(self.start if epochs else self.end))

    def move_to(self, epochs: float) -> None:
        """Set the value for a time in epochs since the start of the run."""
        share = min(1.0, epochs / self.epochs) if self.epochs else 1.0
        if self.geometric:
            self.value.fill_(self.start ** (1 - share) * self.end**share)
        else:
            self.value.fill_((1 - share) * self.start + share * self.end)

    def forward(self) -> Tensor:
        return self.value


def advance(module: nn.Module, epochs: float) -> None:
    """Move every :class:`Annealed` number of a module to its value after ``epochs`` epochs."""
    for part in annealed(module):
        part.move_to(epochs)


def annealed(module: nn.Module) -> list[Annealed]:
    """Return every :class:`Annealed` number of a module."""
    return [part for part in module.modules() if isinstance(part, Annealed)]
