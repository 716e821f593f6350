"""A conditional distribution: a network and a head over its outputs."""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

__all__ = ["Conditional", "Head", "blocks"]


class Head(nn.Module, abc.ABC):
    """Turn a network's outputs into a distribution over an event."""

    @abc.abstractmethod
    def num_outputs(self, event_shape: Sequence[int]) -> int:
        """Return the number of network outputs for one event."""

    @abc.abstractmethod
    def forward(self, outputs: Tensor, event_shape: Sequence[int]) -> Any:
        """Return the distribution, batch (…), for outputs (…, num_outputs) or (…, k C, H, W)."""


def blocks(outputs: Tensor, event_shape: Sequence[int], count: int) -> tuple[Tensor, ...]:
    """Split outputs, flat or with ``count`` blocks of channels, into tensors of the event's shape.

    Raises:
        ValueError: for outputs of another size.
    """
    event_shape = tuple(event_shape)
    image = (count * event_shape[0], *event_shape[1:])
    if tuple(outputs.shape[-len(image) :]) == image:
        batch = outputs.shape[: -len(image)]
    elif outputs.shape[-1] == count * math.prod(event_shape):
        batch = outputs.shape[:-1]
    else:
        raise ValueError(
            f"the network returns shape {tuple(outputs.shape)}; its last dimensions must be "
            f"{count * math.prod(event_shape)} numbers or {image}"
        )
    return outputs.reshape(*batch, count, *event_shape).unbind(len(batch))


class Conditional(nn.Module):
    """Return p(event | context) = head(network(context)).

    Args:
        network: maps the context to ``head.num_outputs(event_shape)`` numbers.
        head: turns these numbers into a distribution.
        event_shape: shape of one event.

    >>> import torch, pyro_vae as pv
    >>> conditional = Conditional(nn.Linear(3, 8), pv.DiagonalGaussian(), (4,))
    >>> conditional(torch.zeros(5, 3)).batch_shape, conditional(torch.zeros(5, 3)).event_shape
    (torch.Size([5]), torch.Size([4]))
    """

    def __init__(self, network: nn.Module, head: Head, event_shape: Sequence[int]) -> None:
        super().__init__()
        self.network, self.head, self.event_shape = network, head, tuple(event_shape)

    def forward(self, *context: Tensor) -> Any:
        return self.head(self.network(*context), self.event_shape)
