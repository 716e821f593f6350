"""A distribution over the edges of a graph."""

from __future__ import annotations

from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributions import constraints
from torch.nn.functional import logsigmoid

__all__ = ["InnerProductGraph"]

# Pairs of nodes per block, 1 MiB in float32: it fits in a core's cache. For 20 000 nodes all logits would take 1.5 GB.
PAIRS_AT_ONCE = 2**18


class _Adjacency(constraints.Constraint):
    """The adjacency of an undirected graph: each entry equals its mirror entry, and is False on the diagonal."""

    is_discrete = True
    event_dim = 0

    def check(self, value: Tensor) -> Tensor:
        loops = torch.eye(value.shape[-1], dtype=torch.bool, device=value.device)
        return ((value == 0) | (value == 1)) & (value == value.mT) & ~(loops & (value != 0))

    def __repr__(self) -> str:
        return "a symmetric matrix of False and True without self-loops"


class _LinkLogProb(torch.autograd.Function):
    """Sum log Bernoulli(A_ij; σ(z_iᵀ z_j)) over i < j in blocks of rows, with its gradient in the same pass.

    ∂/∂l log σ(±l) = ± σ(∓l). With G the upper triangular matrix of these, ∂/∂z = (G + Gᵀ) z. Autograd would save
    several N × N matrices, and take a second pass over them.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, value: Tensor, linked: Tensor | None, unlinked: Tensor | None) -> Tensor:
        size, wanted = z.shape[-2], ctx.needs_input_grad[0]
        slope = torch.zeros_like(z) if wanted else None
        total = z.new_zeros(z.shape[:-2])
        rows = max(1, PAIRS_AT_ONCE // (size * total.numel()))
        for first in range(0, size, rows):
            some, rest = z[..., first : first + rows, :], z[..., first:, :]
            edges = value[..., first : first + rows, first:]
            logits = some @ rest.mT
            signed = torch.where(edges, logits, -logits)
            weights = signed.new_ones(())
            if linked is not None and unlinked is not None:
                weights = torch.where(edges, linked[..., None, None], unlinked[..., None, None])
            total += (weights * logsigmoid(signed)).triu(1).sum((-2, -1))
            if slope is not None:
                steep = weights * torch.sigmoid(-signed)
                g = torch.where(edges, steep, -steep).triu(1)
                slope[..., first : first + rows, :] += g @ rest
                slope[..., first:, :] += g.mT @ some
        ctx.save_for_backward(slope)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, None]:
        (slope,) = ctx.saved_tensors
        return gradient[..., None, None] * slope, None, None, None


class InnerProductGraph(dist.TorchDistribution):
    """Link nodes independently, each pair once: p(A | z) = Π_{i<j} Bernoulli(A_ij; σ(z_iᵀ z_j)).

    Args:
        z: latents of the nodes, (…, N, L).

    Reference:
        Kipf and Welling (2016), Variational graph auto-encoders, Bayesian deep learning workshop. Their product over
        all ordered pairs is no probability of an undirected graph.

    >>> InnerProductGraph(torch.zeros(3, 2)).log_prob(torch.zeros(3, 3, dtype=torch.bool))
    tensor(-2.0794)
    """

    arg_constraints: ClassVar = {"z": constraints.independent(constraints.real, 2)}
    support = constraints.independent(_Adjacency(), 2)

    def __init__(self, z: Tensor, validate_args: bool | None = None) -> None:
        self.z = z
        size = z.shape[-2]
        super().__init__(z.shape[:-2], torch.Size((size, size)), validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> InnerProductGraph:
        return type(self)(self.z.expand(*batch_shape, *self.z.shape[-2:]), validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        return self.weighted_log_prob(value, None, None)

    def weighted_log_prob(self, value: Tensor, linked: Tensor | None, unlinked: Tensor | None) -> Tensor:
        """Return Σ_{i<j} w_ij log Bernoulli(A_ij; σ(z_iᵀ z_j)), (…), w = ``linked`` at edges, else ``unlinked``."""
        batch = torch.broadcast_shapes(self.z.shape[:-2], value.shape[:-2])
        nodes = self.z.expand(*batch, *self.z.shape[-2:])
        log_prob: Tensor = _LinkLogProb.apply(nodes, value.bool(), linked, unlinked)
        return log_prob

    def sample(self, sample_shape: Any = ()) -> Tensor:
        with torch.no_grad():
            probabilities = self.mean.expand(self._extended_shape(torch.Size(sample_shape)))
            upper = torch.bernoulli(probabilities).bool().triu(1)
            return upper | upper.mT

    @property
    def mean(self) -> Tensor:
        """The probability of each link, (…, N, N), zero on the diagonal."""
        loops = torch.eye(self.z.shape[-2], dtype=torch.bool, device=self.z.device)
        return torch.sigmoid(self.z @ self.z.mT).masked_fill(loops, 0.0)
