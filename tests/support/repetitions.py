"""Repetitions of one datum whose estimates are independent."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["repetitions"]


def repetitions(x: Tensor, count: int) -> Tensor:
    """Return ``count`` copies of one datum (1, …) that differ by at most 1e-8.

    Equal data have equal draws; such copies have independent ones, and the same log p(x) up to 1e-7.
    """
    return x + 1e-8 * torch.linspace(0, 1, count).view(-1, *(1 for _ in x.shape[1:]))
