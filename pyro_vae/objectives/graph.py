"""The balanced loss of graph auto-encoders."""

from __future__ import annotations

from typing import Any

from pyro.infer import TraceMeanField_ELBO
from torch import Tensor
from torch.nn.functional import logsigmoid

from pyro_vae.distributions.graph import InnerProductGraph
from pyro_vae.pair.handlers import ReplaceLikelihood

__all__ = ["BalancedGraphLoss"]


class BalancedGraphLoss(TraceMeanField_ELBO):
    """Weight the few edges of a graph like its many unlinked pairs: a training loss, and no −ELBO.

    −E_q [Σ_{i<j} (P/E A_ij log p_ij + P/(P − E) (1 − A_ij) log(1 − p_ij)) + ½ P/E Σ_i log p_ii] + KL(q(z | A) ‖ p(z))

    Here p_ij = σ(z_iᵀ z_j), for P pairs of nodes and E edges. Each kind of pair has total weight P. The last sum counts
    every node as linked to itself. It keeps the latents of nodes with few edges away from zero; docs/results.md
    measures its effect.

    Report ``pv.log_likelihood`` or the ELBO, not this loss. Minus the loss lies below the ELBO, because weights of
    pairs are at least one and logarithms are negative. It does not reach log p(A) for any guide. Divided by N² it is
    the published loss, which has N² for 2 P.

    Args:
        self_links: whether every node counts as linked to itself, as published.
        settings: arguments of ``TraceMeanField_ELBO``.

    Reference:
        Kipf and Welling (2016), Variational graph auto-encoders, section 2, and its code.
    """

    def __init__(self, *, self_links: bool = True, **settings: Any) -> None:
        super().__init__(**settings)
        self.self_links = self_links

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        return super()._get_trace(ReplaceLikelihood(self._balanced)(model), guide, args, kwargs)

    def _balanced(self, likelihood: Any) -> InnerProductGraph | None:
        return _Balanced(likelihood.z, self.self_links) if isinstance(likelihood, InnerProductGraph) else None


class _Balanced(InnerProductGraph):
    def __init__(self, nodes: Tensor, self_links: bool) -> None:
        super().__init__(nodes, validate_args=False)
        self.self_links = self_links

    def expand(self, batch_shape: Any, _instance: Any = None) -> _Balanced:
        return _Balanced(self.z.expand(*batch_shape, *self.z.shape[-2:]), self.self_links)

    def log_prob(self, value: Tensor) -> Tensor:
        pairs = value.shape[-1] * (value.shape[-1] - 1) // 2
        edges = value.sum((-2, -1)) // 2
        if bool(((edges == 0) | (edges == pairs)).any()):
            raise ValueError(
                "the balanced loss weighs edges against unlinked pairs, and a graph lacks one of the two: train with "
                "Trace_ELBO"
            )
        linked, unlinked = ((pairs / count).to(self.z.dtype) for count in (edges, pairs - edges))
        total = self.weighted_log_prob(value, linked, unlinked)
        # The published sum over ordered pairs has each edge twice, and each node with itself once.
        loops = logsigmoid(self.z.square().sum(-1)).sum(-1)
        return total + linked / 2 * loops if self.self_links else total
