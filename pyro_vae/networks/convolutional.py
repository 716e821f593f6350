"""Strided convolutional networks for images."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, interpolate, silu

from pyro_vae.networks.mlp import MLP, Shape

__all__ = ["ConvDecoder", "ConvEncoder", "default_decoder", "default_encoder"]


class ConvEncoder(nn.Module):
    """Halve an image twice by strided convolutions, then map it to ``outputs`` numbers.

    The first layer is strided: full-resolution feature maps would take most of the time of a step.

    Args:
        shape: (C, H, W).
        outputs: size of the output.
        channels: feature maps after the first stride; the second has twice as many.
        hidden: width of the layer between feature maps and output.

    >>> ConvEncoder((1, 28, 28), 10)(torch.zeros(3, 5, 1, 28, 28)).shape
    torch.Size([3, 5, 10])
    """

    def __init__(self, shape: Shape, outputs: int, channels: int = 16, hidden: int = 256) -> None:
        super().__init__()
        self.shape = tuple(shape)
        rows, columns = (math.ceil(math.ceil(side / 2) / 2) for side in self.shape[1:])
        even = all(side % 2 == 0 for side in self.shape[1:])
        self.first = nn.Conv2d(self.shape[0], channels, 4, stride=2, padding=1 if even else 2)
        self.second = nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1)
        self.pooled = (rows, columns)
        self.head = MLP([(2 * channels * rows * columns,)], outputs, (hidden,))

    def forward(self, image: Tensor) -> Tensor:
        batch = image.shape[: image.dim() - 3]
        h = silu(self.first(image.reshape(-1, *self.shape)))
        h = silu(self.second(h))
        if h.shape[-2:] != self.pooled:
            h = adaptive_avg_pool2d(h, self.pooled)
        return self.head(h.reshape(*batch, -1))


class ConvDecoder(nn.Module):
    """Map vectors and low-resolution images to an image by two transposed convolutions.

    All inputs enter through one linear layer. An image also joins the feature maps at half resolution: its pixels
    reach the output at their places.

    Args:
        shapes: event shape of each input; (C, H, W) marks an image.
        shape: (C, H, W) of the output.
        channels: feature maps at half resolution; a quarter resolution has twice as many.
        hidden: width of the layer between inputs and feature maps.

    >>> ConvDecoder([(1, 14, 14), (8,)], (2, 28, 28))(torch.zeros(5, 1, 14, 14), torch.zeros(3, 5, 8)).shape
    torch.Size([3, 5, 2, 28, 28])
    """

    def __init__(self, shapes: Sequence[Shape], shape: Shape, channels: int = 16, hidden: int = 256) -> None:
        super().__init__()
        self.shapes = [tuple(s) for s in shapes]
        self.shape = tuple(shape)
        self.half_size = (math.ceil(shape[1] / 2), math.ceil(shape[2] / 2))
        self.quarter_shape = (2 * channels, math.ceil(self.half_size[0] / 2), math.ceil(self.half_size[1] / 2))
        images = sum(s[0] for s in self.shapes if len(s) == 3)
        self.trunk = MLP(self.shapes, math.prod(self.quarter_shape), (hidden,))
        self.first = nn.ConvTranspose2d(2 * channels, channels, 4, stride=2, padding=1)
        self.second = nn.ConvTranspose2d(channels + images, self.shape[0], 4, stride=2, padding=1)

    def forward(self, *inputs: Tensor) -> Tensor:
        h = silu(self.trunk(*inputs))
        batch = h.shape[:-1]
        h = silu(_crop(self.first(h.reshape(-1, *self.quarter_shape)), self.half_size))
        maps = [h]
        for tensor, shape in zip(inputs, self.shapes, strict=True):
            if len(shape) == 3:
                image = tensor.expand(*batch, *shape).reshape(-1, *shape)
                maps.append(image if image.shape[-2:] == self.half_size else interpolate(image, self.half_size))
        out = _crop(self.second(torch.cat(maps, 1)), self.shape[1:])
        return out.reshape(*batch, *self.shape)


def _crop(image: Tensor, size: Shape) -> Tensor:
    return image[..., : size[0], : size[1]]


def default_encoder(shape: Shape, outputs: int) -> nn.Module:
    """Return an MLP, or for images from 16 × 16 pixels a strided convolutional network."""
    return ConvEncoder(shape, outputs) if _is_large_image(shape) else MLP([shape], outputs)


def default_decoder(inputs: Sequence[Shape], shape: Shape, outputs: int) -> nn.Module:
    """Return an MLP, or for images from 16 × 16 pixels a convolutional network; both give ``outputs`` numbers."""
    if _is_large_image(shape):
        return ConvDecoder(inputs, (outputs // math.prod(shape[1:]), *shape[1:]))
    return MLP(inputs, outputs)


def _is_large_image(shape: Shape) -> bool:
    """Return whether full-resolution layers would take most of a training step."""
    return len(shape) == 3 and min(shape[1:]) >= 16
