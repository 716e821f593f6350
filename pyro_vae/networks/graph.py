"""Graph convolutions over sparse adjacencies."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["GraphConvolutions"]


class GraphConvolutions(nn.Module):
    """Map graphs on N nodes to numbers per node by two graph convolutions.

    Â ReLU(Â X W₀) W₁,   Â = D^−½ (A + I) D^−½,   D the degrees of A + I

    Each convolution is a sparse matmul along the edges. An isolated node receives its input alone. The layer is also
    torch_geometric's ``GCNConv``. It is not used here: importing torch_geometric 2.8 warns of ``torch.jit.script``.

    Args:
        num_nodes: N.
        outputs: numbers per node.
        hidden: width of the layer between.
        features: X, (N, F); without them X is the identity, and W₀ has one row per node.

    Raises:
        ValueError: for fewer than one number per node.

    Reference:
        Kipf and Welling (2017), Semi-supervised classification with graph convolutional networks, ICLR.

    >>> GraphConvolutions(4, 3)(torch.zeros(2, 4, 4, dtype=torch.bool)).shape
    torch.Size([2, 4, 3])
    """

    features: Tensor | None

    def __init__(self, num_nodes: int, outputs: int, hidden: int = 32, features: Tensor | None = None) -> None:
        super().__init__()
        if hidden < 1 or outputs < 1:
            raise ValueError(f"hidden is {hidden}, outputs {outputs}; each counts numbers per node: at least 1")
        self.register_buffer("features", features, persistent=False)
        self.first = nn.Parameter(torch.empty(num_nodes if features is None else features.shape[1], hidden))
        self.second = nn.Parameter(torch.empty(hidden, outputs))
        for weight in (self.first, self.second):
            nn.init.xavier_uniform_(weight)

    def forward(self, adjacency: Tensor) -> Tensor:
        """Return (B, N, outputs) for adjacency (B, N, N)."""
        graph, row, column = adjacency.nonzero(as_tuple=True)
        scale = (adjacency.sum(-1) + 1).to(self.first.dtype).rsqrt().unsqueeze(-1)

        def propagate(h: Tensor) -> Tensor:
            h = scale * h
            # Added to h, the term of I.
            return scale * h.index_put((graph, row), h[graph, column], accumulate=True)

        projected = self.first if self.features is None else self.features @ self.first
        return propagate(propagate(projected).relu() @ self.second)
