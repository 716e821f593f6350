"""Comparison of tensors from two runs of a pair, of which one sees a part of the other's data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_vae.pair.site import Site

__all__ = ["PARTICLES", "View", "agree", "all_agree"]

# Particles of the reference run; another number than that of the data, which tells the two axes apart.
PARTICLES = 2
# Roundings by which one log-density may differ: matmuls over another batch sum in another order.
ROUNDINGS = 1000


@dataclass(frozen=True)
class View:
    """A part of the reference run that is run again: some of its data, with or without the axis of particles."""

    rows: tuple[int, ...]
    particles: bool

    def of_value(self, site: Site, value: Tensor) -> Tensor:
        """Return the part of a value in the program's order, whose first dimension is that of the particles."""
        part = value.index_select(site.data_dim, torch.tensor(self.rows, device=value.device))
        return part if self.particles else part[0]

    def of_terms(self, term: Tensor) -> Tensor:
        """Return the part of log-densities (K, B)."""
        part = term[..., list(self.rows)]
        return part if self.particles else part[0]


def agree(a: Tensor, b: Tensor) -> bool:
    """Whether two log-densities agree up to rounding."""
    if a.shape != b.shape:
        return False
    eps = ROUNDINGS * torch.finfo(a.dtype).eps
    return torch.allclose(a, b.to(a.dtype), rtol=eps, atol=eps, equal_nan=True)


def all_agree(ours: list[Tensor], theirs: list[Tensor], view: View) -> bool:
    return all(_part_agrees(a, b, view) for a, b in zip(ours, theirs, strict=False))


def _part_agrees(whole: Tensor, part: Tensor, view: View) -> bool:
    """Whether a module's tensor in a view is the corresponding part of the reference's."""
    rows = list(view.rows)
    if whole.shape == part.shape and whole.dim() and torch.equal(whole, part):
        return True
    # The encoder sees (B, …), the decoder (K, B, …); a layer that flattens its batch is not followed.
    dims = {part.dim(): whole[rows] if whole.dim() and len(whole) > max(rows) else None}
    if whole.dim() >= 2 and len(whole) == PARTICLES and whole.shape[1] > max(rows):
        inner = whole[:, rows]
        dims[inner.dim()] = inner
        if not view.particles:
            dims[inner.dim() - 1] = inner[0]
    expected = dims.get(part.dim())
    return expected is None or (expected.shape == part.shape and _close(expected, part))


def _close(a: Tensor, b: Tensor) -> bool:
    if not a.is_floating_point():
        return torch.equal(a, b)
    return agree(a, b)
