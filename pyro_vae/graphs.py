"""What a graph needs of a model: a convolution and a distribution over its edges, a training loss, and scores."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import pyro.distributions as dist
import torch
from pyro.infer import TraceMeanField_ELBO
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributions import constraints
from torch.nn.functional import logsigmoid

__all__ = ["BalancedGraphLoss", "GraphConvolutions", "InnerProductGraph", "LinkScores", "link_scores"]

# Pairs of nodes taken at once, 1 MiB in float32: what is computed from them stays in a core's cache, and a network of
# twenty thousand nodes, whose logits are 1.5 GB, takes no more.
PAIRS_AT_ONCE = 2**18


class GraphConvolutions(nn.Module):
    """Map graphs on N nodes to numbers per node by two graph convolutions.

    Â ReLU(Â X W₀) W₁,   Â = D^−½ (A + I) D^−½,   D the degrees of A + I

    Each is a product with a sparse matrix, whose entries are gathered along the edges. An isolated node sees itself.
    It is the convolution that torch_geometric calls ``GCNConv``, written out here because importing torch_geometric
    (2.8) warns under this torch of ``torch.jit.script``, which it calls while it is imported.

    Args:
        num_nodes: N.
        outputs: numbers per node.
        hidden: width of the layer between.
        features: X, (N, F); without them X is the identity, so that W₀ holds a row of its own for each node.

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
            # What is added to is h itself, the product with I.
            return scale * h.index_put((graph, row), h[graph, column], accumulate=True)

        own = self.first if self.features is None else self.features @ self.first
        return propagate(propagate(own).relu() @ self.second)


class _Adjacency(constraints.Constraint):
    """An undirected graph's matrix, entry by entry: equal to its mirror entry, and False on the diagonal."""

    is_discrete = True
    event_dim = 0

    def check(self, value: Tensor) -> Tensor:
        loops = torch.eye(value.shape[-1], dtype=torch.bool, device=value.device)
        return ((value == 0) | (value == 1)) & (value == value.mT) & ~(loops & (value != 0))

    def __repr__(self) -> str:
        return "a symmetric matrix of False and True without self-loops"


class _LinkLogProb(torch.autograd.Function):
    """Sum log Bernoulli(A_ij; σ(z_iᵀ z_j)) over i < j in blocks of rows, with its gradient in the same pass.

    ∂/∂l log σ(±l) = ± σ(∓l), and with G the matrix of these, its lower half zero, ∂/∂z = (G + Gᵀ) z. Autograd would
    keep several matrices of N² numbers, and a second pass over them would cost what the first did.
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
        nodes: z, (…, N, L).

    Reference:
        Kipf and Welling (2016), Variational graph auto-encoders, Bayesian deep learning workshop. Their product runs
        over all ordered pairs, which is no probability of an undirected graph.

    >>> InnerProductGraph(torch.zeros(3, 2)).log_prob(torch.zeros(3, 3, dtype=torch.bool))
    tensor(-2.0794)
    """

    arg_constraints: ClassVar = {"nodes": constraints.independent(constraints.real, 2)}
    support = constraints.independent(_Adjacency(), 2)

    def __init__(self, nodes: Tensor, validate_args: bool | None = None) -> None:
        self.nodes = nodes
        size = nodes.shape[-2]
        super().__init__(nodes.shape[:-2], torch.Size((size, size)), validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> InnerProductGraph:
        return type(self)(self.nodes.expand(*batch_shape, *self.nodes.shape[-2:]), validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        return self.weighted_log_prob(value, None, None)

    def weighted_log_prob(self, value: Tensor, linked: Tensor | None, unlinked: Tensor | None) -> Tensor:
        """Return Σ_{i<j} w_ij log Bernoulli(A_ij; σ(z_iᵀ z_j)), (…), with one weight for edges and one for the rest."""
        batch = torch.broadcast_shapes(self.nodes.shape[:-2], value.shape[:-2])
        nodes = self.nodes.expand(*batch, *self.nodes.shape[-2:])
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
        loops = torch.eye(self.nodes.shape[-2], dtype=torch.bool, device=self.nodes.device)
        return torch.sigmoid(self.nodes @ self.nodes.mT).masked_fill(loops, 0.0)


class _BalanceEdges(Messenger):
    """Score an observed graph with edges and unlinked pairs weighed alike."""

    def __init__(self, self_links: bool) -> None:
        super().__init__()
        self.self_links = self_links

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] and isinstance(msg["fn"], InnerProductGraph):
            msg["fn"] = _Balanced(msg["fn"].nodes, self.self_links)


class _Balanced(InnerProductGraph):
    def __init__(self, nodes: Tensor, self_links: bool) -> None:
        super().__init__(nodes, validate_args=False)
        self.self_links = self_links

    def expand(self, batch_shape: Any, _instance: Any = None) -> _Balanced:
        return _Balanced(self.nodes.expand(*batch_shape, *self.nodes.shape[-2:]), self.self_links)

    def log_prob(self, value: Tensor) -> Tensor:
        pairs = value.shape[-1] * (value.shape[-1] - 1) // 2
        edges = value.sum((-2, -1)) // 2
        if bool(((edges == 0) | (edges == pairs)).any()):
            raise ValueError(
                "the balanced loss weighs edges against unlinked pairs, and a graph lacks one of the two: train with "
                "Trace_ELBO"
            )
        linked, unlinked = ((pairs / count).to(self.nodes.dtype) for count in (edges, pairs - edges))
        total = self.weighted_log_prob(value, linked, unlinked)
        # The sum over ordered pairs has each edge twice and each node with itself once.
        own = logsigmoid(self.nodes.square().sum(-1)).sum(-1)
        return total + linked / 2 * own if self.self_links else total


class BalancedGraphLoss(TraceMeanField_ELBO):
    """Weigh the few edges of a graph like its many unlinked pairs: a training loss, and no −ELBO.

    −E_q [Σ_{i<j} (P/E A_ij log p_ij + P/(P − E) (1 − A_ij) log(1 − p_ij)) + ½ P/E Σ_i log p_ii] + KL(q(z | A) ‖ p(z)),

    p_ij = σ(z_iᵀ z_j), of P pairs E edges. Both kinds of pairs weigh P in all. The last sum counts every node as linked
    to itself, which keeps the latents of nodes with few edges, or none, away from zero; docs/results.md measures what
    it is worth. Weights of pairs are one at least and every logarithm is negative, so that minus the loss lies below
    the ELBO, but it tends to log p(A) for no guide: report ``pv.log_likelihood``, or the ELBO, instead. Divided by N²
    it is the published loss, which has N² in the place of 2 P.

    Args:
        self_links: whether every node counts as linked to itself, as published.
        settings: those of ``TraceMeanField_ELBO``.

    Reference:
        Kipf and Welling (2016), Variational graph auto-encoders, section 2, and its code.
    """

    def __init__(self, *, self_links: bool = True, **settings: Any) -> None:
        super().__init__(**settings)
        self.self_links = self_links

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        return super()._get_trace(_BalanceEdges(self.self_links)(model), guide, args, kwargs)


class LinkScores(NamedTuple):
    """How well pairs of nodes that are linked are told from pairs that are not.

    ``auc`` is the area under the ROC curve, the chance that a linked pair scores above an unlinked one;
    ``average_precision`` the precision averaged over the recall that each linked pair adds.
    """

    auc: float
    average_precision: float


def link_scores(linked: Tensor, unlinked: Tensor) -> LinkScores:
    """Hold the scores of linked pairs against those of unlinked ones, as link prediction is reported.

    Args:
        linked: scores of held-out links, (M,), higher for likelier.
        unlinked: scores of unlinked pairs, (M',).

    Returns:
        :class:`LinkScores`, each between 0 and 1.

    Raises:
        ValueError: when either is empty.

    >>> link_scores(torch.tensor([0.9, 0.4]), torch.tensor([0.3, 0.6])).auc
    0.75
    """
    if len(linked) == 0 or len(unlinked) == 0:
        raise ValueError(f"{len(linked)} links and {len(unlinked)} unlinked pairs: scoring needs some of each")
    # Imported here, for it takes a second to import and everything else does without it.
    from sklearn.metrics import average_precision_score, roc_auc_score

    truth = [1] * len(linked) + [0] * len(unlinked)
    scores = torch.cat([linked, unlinked]).cpu().numpy()
    return LinkScores(float(roc_auc_score(truth, scores)), float(average_precision_score(truth, scores)))
