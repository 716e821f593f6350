"""Random images."""

from __future__ import annotations

import torch
from torch import Tensor


def gray(levels: int, *shape: int) -> Tensor:
    """Return random gray levels, both ends among them."""
    index = torch.randint(levels, shape)
    index.view(-1)[0], index.view(-1)[1] = 0, levels - 1
    return index / (levels - 1)
