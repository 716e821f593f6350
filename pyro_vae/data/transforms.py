"""Maps between gray levels, bits and real numbers, and seeded subsets."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["binarise", "dequantise", "shuffled", "subset_after_shuffle", "unit"]

# Do not change it: scores on two splits do not compare.
_SPLIT_SEED = 0
# Largest distance of a pixel from its grid, in levels. Rounding in float32 at 256 levels is far below it, 3e-5. With a
# wrong number of levels some pixel is far above it.
_GRID_TOLERANCE = 0.01


def binarise(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw each pixel from a Bernoulli distribution with its gray level as probability.

    Call it in each epoch for the dynamically binarised MNIST.

    Args:
        x: gray levels in [0, 1], any shape.
        generator: random generator on the device of ``x``; the global one if None.

    Returns:
        Zeros and ones, in the shape and type of ``x``.

    Raises:
        ValueError: for values outside [0, 1].

    >>> binarise(torch.tensor([0.0, 1.0])).tolist()
    [0.0, 1.0]
    """
    _check_unit_interval(x)
    return torch.bernoulli(x, generator=generator)


def dequantise(x: Tensor, levels: int, generator: torch.Generator | None = None) -> Tensor:
    """Add uniform noise to each gray level, within its share of [0, 1).

    y = (k + u) / levels,   k = (levels - 1) x,   u ~ Uniform(0, 1)

    Then k = floor(levels y). A density of y bounds the probability of k:
    log P(k) >= E[log p(y)] - log(levels) per pixel.

    Args:
        x: gray levels k / (levels - 1), any shape.
        levels: number of levels, at least 2.
        generator: random generator on the device of ``x``; the global one if None.

    Returns:
        Values in [0, 1), in the shape and type of ``x``.

    Raises:
        ValueError: for ``levels`` below 2 or beyond the resolution of the type of ``x``, and for ``x`` off the grid.

    Reference:
        Theis, van den Oord and Bethge (2016), A note on the evaluation of generative models, ICLR, section 3.1.

    >>> y = dequantise(torch.tensor([0.0, 0.5, 1.0]), levels=3)
    >>> (3 * y).floor().tolist()
    [0.0, 1.0, 2.0]
    """
    if levels < 2:
        raise ValueError(f"levels={levels} leaves nothing to tell apart; pass 2 or more, e.g. the data set's own")
    _check_unit_interval(x)
    # In levels, an upper bound on rounding in k + u, in the division, and in a later multiplication by `levels`. Noise
    # at least this far from 0 and 1 is never rounded into the neighbouring level, nor to y = 1.
    margin = 2 * levels * torch.finfo(x.dtype).eps
    if margin > _GRID_TOLERANCE:
        raise ValueError(f"x of type {x.dtype} cannot resolve levels={levels}; convert x to a wider type")
    scaled = x * (levels - 1)
    level = scaled.round()
    if not torch.all((scaled - level).abs() < _GRID_TOLERANCE):
        raise ValueError(f"x is not on the grid k / {levels - 1}; pass levels=data_set.levels and images as loaded")
    noise = torch.rand(x.shape, generator=generator, dtype=x.dtype, device=x.device)
    return (level + margin + (1 - 2 * margin) * noise) / levels


def subset_after_shuffle(x: Tensor, size: int, seed: int = 0) -> Tensor:
    """Take ``size`` rows at random, the same rows at every call.

    Use it instead of the first rows: data sets may be sorted. Take images and labels with the same ``seed`` to match
    them.

    Args:
        x: rows, (N, ...).
        size: number of rows, from 1 to N.
        seed: seed of the shuffle.

    Returns:
        The first rows after the shuffle, (size, ...).

    Raises:
        ValueError: for a ``size`` outside 1 … N.

    >>> sorted(subset_after_shuffle(torch.arange(3), 3).tolist())
    [0, 1, 2]
    """
    if not 1 <= size <= len(x):
        raise ValueError(f"size={size} is not between 1 and the number of rows, {len(x)}")
    return x[shuffled(len(x), seed)[:size].to(x.device)]


def shuffled(size: int, seed: int = _SPLIT_SEED) -> Tensor:
    """Return a seeded permutation of 0 … size − 1."""
    # On the CPU: random streams differ between devices.
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))


def _check_unit_interval(x: Tensor) -> None:
    if not x.is_floating_point():
        raise ValueError(f"x has type {x.dtype}; pass gray levels in [0, 1] as floats")
    if x.numel() == 0:
        return
    low, high = (bound.item() for bound in x.aminmax())
    # The negation refuses NaN too.
    if not (low >= 0 and high <= 1):
        raise ValueError(f"x is not in [0, 1]: it runs from {low:g} to {high:g}; divide it by its highest level")


def unit(images: Tensor, highest: int) -> Tensor:
    """Return (N, C, H, W) whole numbers 0..highest as floats in [0, 1]."""
    # Divide in place: MNIST takes 188 MB in float32, and a second copy would double that.
    return images.to(torch.get_default_dtype(), memory_format=torch.contiguous_format).div_(highest)
