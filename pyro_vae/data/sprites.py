"""Binary images of one white shape, with known factors of variation."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_vae.data.transforms import shuffled

__all__ = ["Sprites", "sprites"]

SIDE = 32
SIZES = {"shape": 3, "scale": 4, "rotation": 6, "x": 8, "y": 8}


class Sprites(NamedTuple):
    """Hold images and their factors.

    Attributes:
        images: (N, 1, 32, 32), zeros and ones in the default float type.
        factors: indices of the factors' values, (N, 5) int64, in the order of ``names``.
        names: shape, scale, rotation, x, y.
        sizes: number of values of each factor.
    """

    images: Tensor
    factors: Tensor
    names: tuple[str, ...]
    sizes: tuple[int, ...]


def sprites(size: int | None = None, seed: int = 0) -> Sprites:
    """Draw a square, an ellipse or a heart for each of 4608 combinations of factors.

    Half-widths have 4 values from 0.22 to 0.385, in units of half the image. Rotations have 6 values from 0° to 75°,
    and each position 8 from −0.42 to 0.42. Rotations stop before 90°, at which a square repeats: all images differ.

    Args:
        size: number of combinations, drawn without replacement; all by default.
        seed: seed of their order.

    Returns:
        :class:`Sprites`.

    Raises:
        ValueError: for a size outside 1 … 4608.

    Reference:
        After dSprites: Matthey, Higgins, Hassabis and Lerchner (2017).

    >>> sprites(100).images.shape
    torch.Size([100, 1, 32, 32])
    """
    total = math.prod(SIZES.values())
    count = total if size is None else size
    if not 1 <= count <= total:
        raise ValueError(f"size={size} is not between 1 and the number of combinations, {total}")
    every = torch.cartesian_prod(*(torch.arange(n) for n in SIZES.values()))
    factors = every[shuffled(total, seed)[:count]]
    return Sprites(_draw(factors), factors, tuple(SIZES), tuple(SIZES.values()))


def _draw(factors: Tensor) -> Tensor:
    shape, scale, rotation, column, row = factors.unbind(-1)
    width = (0.22 + 0.055 * scale).reshape(-1, 1, 1)
    angle = (rotation * math.radians(15)).reshape(-1, 1, 1)
    pixels = (torch.arange(SIDE) + 0.5) / SIDE * 2 - 1
    x = pixels - (-0.42 + 0.12 * column).reshape(-1, 1, 1)
    y = pixels.unsqueeze(-1) - (-0.42 + 0.12 * row).reshape(-1, 1, 1)
    # Coordinates along the sprite's axes, in units of its half-width.
    u = (torch.cos(angle) * x + torch.sin(angle) * y) / width
    v = (torch.cos(angle) * y - torch.sin(angle) * x) / width
    a, b = 1.2 * u, -1.2 * v + 0.1
    heart = (a**2 + b**2 - 1) ** 3 - a**2 * b**3 <= 0
    inside = torch.stack([(u.abs() <= 0.9) & (v.abs() <= 0.9), u**2 + (v / 0.55) ** 2 <= 1, heart])
    chosen = inside.gather(0, shape.reshape(1, -1, 1, 1).expand(1, *u.shape)).squeeze(0)
    return chosen.to(torch.get_default_dtype()).unsqueeze(1)
