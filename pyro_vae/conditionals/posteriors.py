"""Heads of q(z | x): they turn network outputs into Gaussians."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from pyro_vae.conditionals.conditional import Head, blocks

__all__ = ["SMALLEST_GUIDE_SCALE", "DiagonalGaussian", "FreeGaussian", "FullGaussian"]

# A guide's scale never falls below this: float32 log-densities of a narrower Gaussian lose their digits.
SMALLEST_GUIDE_SCALE = 1e-4


class DiagonalGaussian(Head):
    """Return N(μ, diag σ²) over a vector."""

    def num_outputs(self, event_shape: Sequence[int]) -> int:
        return 2 * math.prod(event_shape)

    def forward(self, outputs: Tensor, event_shape: Sequence[int]) -> Any:
        loc, raw = blocks(outputs, event_shape, 2)
        return dist.Normal(loc, softplus(raw) + SMALLEST_GUIDE_SCALE).to_event(len(event_shape))


class FullGaussian(Head):
    """Return N(b, A Aᵀ) over a vector: z = b + A ε, A lower triangular with a positive diagonal."""

    def num_outputs(self, event_shape: Sequence[int]) -> int:
        (size,) = event_shape
        return size + size * (size + 1) // 2

    def forward(self, outputs: Tensor, event_shape: Sequence[int]) -> Any:
        (size,) = event_shape
        if outputs.shape[-1] != self.num_outputs(event_shape):
            raise ValueError(
                f"the network returns shape {tuple(outputs.shape)}; its last dimension must be "
                f"{self.num_outputs(event_shape)}"
            )
        loc, entries = outputs[..., :size], outputs[..., size:]
        rows, columns = torch.tril_indices(size, size, device=outputs.device)
        entries = torch.where(rows == columns, softplus(entries) + SMALLEST_GUIDE_SCALE, entries)
        flat = entries.new_zeros(*entries.shape[:-1], size * size).index_copy(-1, rows * size + columns, entries)
        return dist.MultivariateNormal(loc, scale_tril=flat.unflatten(-1, (size, size)))


class FreeGaussian(nn.Module):
    """Return q(z | i) = N(μ_i, diag σ_i²), with separate parameters for each training datum i: no amortisation.

    Train with ``fit(pair, (x, torch.arange(len(x))))``: the datum's index is a condition of the pair.

    Args:
        num_data: N.
        size: event size.

    >>> FreeGaussian(100, 4)(torch.zeros(2, 7), torch.tensor([3, 99])).event_shape
    torch.Size([4])
    """

    def __init__(self, num_data: int, size: int) -> None:
        super().__init__()
        self.num_data = num_data
        self.loc = nn.Parameter(torch.zeros(num_data, size))
        self.raw_scale = nn.Parameter(torch.zeros(num_data, size))

    def forward(self, x: Tensor, index: Tensor | None = None) -> Any:
        if index is None:
            raise ValueError(
                "a FreeGaussian guide has parameters per training datum: pass the data as (x, torch.arange(len(x)))"
            )
        try:
            loc, raw_scale = self.loc[index], self.raw_scale[index]
        except IndexError as error:
            raise ValueError(f"the guide has parameters for data 0 to {self.num_data - 1}: {error}") from error
        return dist.Normal(loc, softplus(raw_scale) + SMALLEST_GUIDE_SCALE).to_event(1)
