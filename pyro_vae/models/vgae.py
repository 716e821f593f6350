"""The variational graph auto-encoder: links between nodes from the inner products of their latents.

    z_i ~ N(0, I),   A_ij ~ Bernoulli(σ(z_iᵀ z_j)), i < j          q(z | A, X) = Π_i N(z_i; μ_i(A, X), diag σ_i²(A, X))

A whole graph is one datum: links share the latents of their nodes, and no likelihood belongs to one node or one edge.
The only plate is over graphs. The latents of all nodes are one event, (N, L). A batch holds B graphs on the same N
nodes, usually B = 1.

Reference: Kipf and Welling (2016), Variational graph auto-encoders, Bayesian deep learning workshop.
"""

from __future__ import annotations

from typing import ClassVar

import pyro
import torch
from torch import Tensor, nn

from pyro_vae.conditionals.conditional import Conditional
from pyro_vae.conditionals.posteriors import DiagonalGaussian
from pyro_vae.conditionals.priors import MixtureOfGaussians, StandardNormal
from pyro_vae.distributions.graph import InnerProductGraph
from pyro_vae.networks.graph import GraphConvolutions
from pyro_vae.pair.pair import Pair

__all__ = ["VGAE"]


class VGAE(Pair):
    """Pair p(z) p(A | z) with q(z | A, X), two graph convolutions.

    Train on ``graph.adjacency().unsqueeze(0)``, one datum. Use ``loss=BalancedGraphLoss()`` for a sparse graph. Latents
    are (K, B, N, L).

    Args:
        num_nodes: N.
        prior: p(z_i) over L entries.
        features: X, (N, F), or None.
        hidden: width of the encoder's first convolution.
        encoder: network from (B, N, N) to (B, N, 2 L) to use in place of the default one.

    Raises:
        ValueError: for fewer than two nodes, and for infinite features or features of another number of nodes.

    >>> import torch, pyro_vae as pv
    >>> pair = VGAE(4, pv.StandardNormal(2))
    >>> graph = pv.data.make_graph(torch.tensor([[0, 1], [1, 2]]), num_nodes=4)
    >>> pv.log_terms(pair, graph.adjacency().unsqueeze(0), num_particles=3).log_weights.shape
    torch.Size([3, 1])
    """

    x_dtype: ClassVar[torch.dtype | None] = torch.bool

    def __init__(
        self,
        num_nodes: int,
        prior: StandardNormal | MixtureOfGaussians,
        features: Tensor | None = None,
        *,
        hidden: int = 32,
        encoder: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if num_nodes < 2:
            raise ValueError(f"num_nodes is {num_nodes}; links need at least two nodes")
        if features is not None and (features.dim() != 2 or len(features) != num_nodes):
            raise ValueError(f"features has shape {tuple(features.shape)}; it must be (N, F) with N = {num_nodes}")
        if features is not None and not torch.isfinite(features).all():
            raise ValueError("features has NaN or infinite values")
        self.num_nodes, self.x_shape, self.prior = num_nodes, (num_nodes, num_nodes), prior
        # Bits per dimension count the entries of A above its diagonal.
        self.num_dimensions = num_nodes * (num_nodes - 1) // 2
        head = DiagonalGaussian()
        network = encoder or GraphConvolutions(num_nodes, head.num_outputs((prior.size,)), hidden, features)
        self.q_z = Conditional(network, head, (prior.size,))

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.prior().expand((self.num_nodes,)).to_event(1))
            pyro.sample("x", InnerProductGraph(z), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.q_z(x).to_event(1))

    @torch.no_grad()
    def link_probability(self, x: Tensor, pairs: Tensor) -> Tensor:
        """Return σ(μ_iᵀ μ_j) at the guide's means, the score of a link in the reference.

        Args:
            x: one graph, (1, N, N).
            pairs: (2, M).

        Returns:
            (M,).
        """
        means = self.q_z(x).mean[0]
        return torch.sigmoid((means[pairs[0]] * means[pairs[1]]).sum(-1))
