"""Networks that accept any number of leading batch dimensions (K, B, …) and several inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, glu, interpolate, silu
from torch.nn.functional import batch_norm as batch_norm_

__all__ = ["MLP", "ConvDecoder", "ConvEncoder", "GatedMLP", "default_decoder", "default_encoder", "flatten_inputs"]

Shape = Sequence[int]


def flatten_inputs(inputs: Sequence[Tensor], shapes: Sequence[Shape]) -> Tensor:
    """Flatten each input's event, broadcast their batch dimensions and concatenate them.

    Args:
        inputs: tensors (…, *shape), one for each of ``shapes``.
        shapes: the event shapes.

    Returns:
        (…, total size).

    Raises:
        ValueError: for another number of inputs, or an input whose trailing dimensions are not its shape.

    >>> flatten_inputs([torch.zeros(5, 1, 4, 4), torch.zeros(2, 5, 3)], [(1, 4, 4), (3,)]).shape
    torch.Size([2, 5, 19])
    """
    if len(inputs) != len(shapes):
        raise ValueError(f"the network takes {len(shapes)} inputs of shapes {list(shapes)}, got {len(inputs)}")
    flat = []
    for tensor, shape in zip(inputs, shapes, strict=True):
        batch = tensor.dim() - len(shape)
        if batch < 0 or tuple(tensor.shape[batch:]) != tuple(shape):
            raise ValueError(f"an input has shape {tuple(tensor.shape)}; its last dimensions must be {tuple(shape)}")
        flat.append(tensor.reshape(*tensor.shape[:batch], math.prod(shape)))
    batch_shape = torch.broadcast_shapes(*(tensor.shape[:-1] for tensor in flat))
    return torch.cat([tensor.expand(*batch_shape, tensor.shape[-1]) for tensor in flat], -1)


class MLP(nn.Module):
    """Map the concatenated inputs through hidden layers to ``outputs`` numbers.

    Args:
        shapes: event shape of each input.
        outputs: size of the output.
        hidden: widths of the hidden layers; none makes the network affine.
        activation: the function between layers, SiLU by default.
        batch_norm: whether hidden layers are batch normalised, over all leading dimensions. A datum's output then
            depends on its batch while training; in evaluation mode, by running averages, it is its own. So it is where
            a batch has one row, a short last one perhaps, which has no spread.

    Reference:
        Ioffe and Szegedy (2015), Batch normalization, ICML.

    >>> MLP([(1, 8, 8)], 10, hidden=(32,))(torch.zeros(3, 5, 1, 8, 8)).shape
    torch.Size([3, 5, 10])
    """

    def __init__(
        self,
        shapes: Sequence[Shape],
        outputs: int,
        hidden: Sequence[int] = (256, 256),
        activation: Callable[[Tensor], Tensor] = silu,
        *,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.shapes = [tuple(shape) for shape in shapes]
        sizes = [sum(math.prod(shape) for shape in shapes), *hidden, outputs]
        # A norm takes away what a bias before it adds, and leaves its gradient to rounding.
        layers = [nn.Linear(a, b, bias=not batch_norm) for a, b in pairwise(sizes[:-1])]
        self.layers = nn.ModuleList([*layers, nn.Linear(sizes[-2], outputs)])
        self.norms = nn.ModuleList(nn.BatchNorm1d(width) for width in hidden if batch_norm)

    def forward(self, *inputs: Tensor) -> Tensor:
        h = flatten_inputs(inputs, self.shapes)
        for i, layer in enumerate(self.layers[:-1]):
            h = layer(h)
            h = self.activation(_normalised(self.norms[i], h) if self.norms else h)
        return self.layers[-1](h)


def _normalised(norm: nn.Module, h: Tensor) -> Tensor:
    """Normalise over all rows, which batch normalisation takes in one dimension; one row by the running averages."""
    assert isinstance(norm, nn.BatchNorm1d)
    rows = h.reshape(-1, h.shape[-1])
    if len(rows) > 1:
        return norm(rows).reshape(h.shape)
    return batch_norm_(rows, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps).reshape(h.shape)


class GatedMLP(nn.Module):
    """Map the concatenated inputs through gated layers, h ← (W h + b) ⊙ σ(V h + c), to ``outputs`` numbers.

    Args:
        shapes: event shape of each input.
        outputs: size of the output.
        hidden: widths of the gated layers; the last layer is affine.

    Reference:
        Dauphin, Fan, Auli and Grangier (2017), Language modeling with gated convolutional networks, ICML.

    >>> GatedMLP([(1, 8, 8)], 10, hidden=(32,))(torch.zeros(3, 5, 1, 8, 8)).shape
    torch.Size([3, 5, 10])
    """

    def __init__(self, shapes: Sequence[Shape], outputs: int, hidden: Sequence[int] = (300, 300)) -> None:
        super().__init__()
        self.shapes = [tuple(shape) for shape in shapes]
        sizes = [sum(math.prod(shape) for shape in shapes), *hidden]
        # W and V are the halves of one matrix: one product in place of two.
        self.gated = nn.ModuleList(nn.Linear(a, 2 * b) for a, b in pairwise(sizes))
        self.last = nn.Linear(sizes[-1], outputs)

    def forward(self, *inputs: Tensor) -> Tensor:
        h = flatten_inputs(inputs, self.shapes)
        for layer in self.gated:
            h = glu(layer(h))
        return self.last(h)


class ConvEncoder(nn.Module):
    """Halve an image twice by strided convolutions, then map it to ``outputs`` numbers.

    Striding at once keeps a training step short: full-resolution feature maps are what a small net spends its time on.

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
        self.first = nn.Conv2d(self.shape[0], channels, 4, stride=2, padding=1 if _even(self.shape) else 2)
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


def _even(shape: Shape) -> bool:
    return all(side % 2 == 0 for side in shape[1:])


class ConvDecoder(nn.Module):
    """Map vectors and low-resolution images to an image by two transposed convolutions.

    All inputs enter through one linear layer; an input that is an image also joins the feature maps at half
    resolution, so that its pixels reach the output where they are.

    Args:
        shapes: event shape of each input; (C, H, W) marks an image.
        shape: (C, H, W) of the output.
        channels: feature maps at half resolution; a quarter resolution has twice as many.

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
    """Return an MLP, from 16 × 16 pixels up a strided conv net."""
    return ConvEncoder(shape, outputs) if _is_large_image(shape) else MLP([shape], outputs)


def default_decoder(inputs: Sequence[Shape], shape: Shape, outputs: int) -> nn.Module:
    """Return an MLP, from 16 × 16 pixels up a strided conv net whose channels make up the ``outputs`` numbers."""
    if _is_large_image(shape):
        return ConvDecoder(inputs, (outputs // math.prod(shape[1:]), *shape[1:]))
    return MLP(inputs, outputs)


def _is_large_image(shape: Shape) -> bool:
    """Tell whether full-resolution layers would dominate a training step."""
    return len(shape) == 3 and min(shape[1:]) >= 16
