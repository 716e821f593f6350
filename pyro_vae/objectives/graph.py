"""The balanced loss of graph auto-encoders."""

from __future__ import annotations

from typing import Any

from pyro.infer import TraceMeanField_ELBO
from torch import Tensor
from torch.nn.functional import logsigmoid

from pyro_vae.distributions.graph import InnerProductGraph
from pyro_vae.pair.handlers import ReplaceLikelihood

__all__ = ["BalancedGraphLoss"]


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
        return super()._get_trace(ReplaceLikelihood(self._balanced)(model), guide, args, kwargs)

    def _balanced(self, likelihood: Any) -> InnerProductGraph | None:
        return _Balanced(likelihood.nodes, self.self_links) if isinstance(likelihood, InnerProductGraph) else None
