"""Networks with several inputs and any number of leading batch dimensions (K, B, …)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm as batch_norm_
from torch.nn.functional import glu, silu

__all__ = ["MLP", "GatedMLP", "Shape", "flatten_inputs"]

# Shape of one event.
Shape: TypeAlias = Sequence[int]


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
        batch_norm: whether hidden layers are batch normalised over all leading dimensions. While training, a datum's
            output then depends on its batch. Evaluation mode, and a batch of one row, use running averages.

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
        # No bias before a norm: the norm cancels it, and its gradient is rounding error.
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
    """Normalise over all leading dimensions; a single row, which has no spread, by the running averages."""
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
        # W and V are the halves of one matrix: one matmul for two.
        self.gated = nn.ModuleList(nn.Linear(a, 2 * b) for a, b in pairwise(sizes))
        self.last = nn.Linear(sizes[-1], outputs)

    def forward(self, *inputs: Tensor) -> Tensor:
        h = flatten_inputs(inputs, self.shapes)
        for layer in self.gated:
            h = glu(layer(h))
        return self.last(h)
