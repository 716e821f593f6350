"""The divergence from the prior in three parts, and the objective of β-TCVAE that weights each."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_vae.inspection import Inspection
from pyro_vae.inspection.arrays import takes_arrays
from pyro_vae.objectives.loss import PairLoss
from pyro_vae.pair.pair import Pair, Program
from pyro_vae.pair.site import Site
from pyro_vae.pair.trace import PairTrace, trace_pair, trace_programs
from pyro_vae.runtime.threads import one_at_a_time

__all__ = ["DivergenceSplit", "TotalCorrelationELBO", "divergence_split", "stratified_log_weights"]


class DivergenceSplit(NamedTuple):
    """The three parts of log q(z | x) − log p(z), each averaged over particles, (B,), in nats.

    Args:
        mutual_information: log q(z | x) − log q(z), of data and latents.
        total_correlation: log q(z) − Σ_l log q(z_l), between the latents.
        dimension_wise: Σ_l log q(z_l) − log p(z).
    """

    mutual_information: Tensor
    total_correlation: Tensor
    dimension_wise: Tensor


@one_at_a_time
@takes_arrays
def divergence_split(
    pair: Pair, *batch: Tensor, data_size: int | None = None, num_particles: int = 1
) -> DivergenceSplit:
    """Split the divergence from the prior into mutual information, total correlation and dimension-wise divergence.

    The aggregate posterior is q(z) = (1/N) Σ_n q(z | x_n). At a draw z of datum i it is estimated from a batch of M:

    q̂(z) = (1/N) q(z | x_i) + (N − 1) / (N (M − 1)) Σ_{j ≠ i} q(z | x_j),      and likewise each q̂(z_l)

    The estimate is exact if the batch is the whole data set. It is unbiased (before the logarithm) for a batch drawn
    without replacement. The three parts add up to log q(z | x) − log p(z) at every draw, for any batch.

    Args:
        pair: a pair whose guide has one latent site, factorised over the entries of a vector.
        batch: ``x`` (M, …) and the pair's conditions.
        data_size: N; M without it.
        num_particles: K, draws per datum.

    Returns:
        :class:`DivergenceSplit`.

    Raises:
        ValueError: for other guides, and a batch larger than the data.

    Reference:
        Chen, Li, Grosse and Duvenaud (2018), Isolating sources of disentanglement in VAEs, NeurIPS (there, the estimate
        by stratified weights).

    >>> import pyro_vae as pv
    >>> divergence_split(pv.models.VAE((4,), pv.StandardNormal(3)), torch.randn(8, 4)).total_correlation.shape
    torch.Size([8])
    """
    size = len(batch[0]) if data_size is None else data_size
    trace = trace_pair(pair, *batch, num_particles=num_particles)
    return DivergenceSplit(*(part.mean(0) for part in _split(pair, trace, size)))


class TotalCorrelationELBO(PairLoss):
    """Maximise the ELBO with a weight for each of the three parts of its divergence: β-TCVAE.

    E log p(x | z) − α · mutual information − β · total correlation − γ · dimension-wise divergence

    With all weights 1 it is the ELBO at every draw. See :func:`divergence_split` for the estimate.

    Args:
        beta: β ≥ 0.
        data_size: N, the number of training data.
        alpha, gamma: α and γ ≥ 0.
        num_particles: K.

    Raises:
        ValueError: for weights that are negative or not finite, and N < 1. Before training, for another N than the
            number of training data, and for guides without exactly one factorised latent site.

    Reference:
        Chen, Li, Grosse and Duvenaud (2018), Isolating sources of disentanglement in VAEs, NeurIPS.

    >>> import pyro_vae as pv
    >>> pair, x = pv.models.VAE((4,), pv.StandardNormal(2)), torch.randn(32, 4)
    >>> loss = TotalCorrelationELBO(6.0, data_size=32)
    >>> run = pv.fit(pair, x, epochs=1, batch_size=16, loss=loss, progress=False)
    """

    def __init__(
        self, beta: float, data_size: int, *, alpha: float = 1.0, gamma: float = 1.0, num_particles: int = 1
    ) -> None:
        super().__init__(num_particles)
        for name, weight in (("alpha", alpha), ("beta", beta), ("gamma", gamma)):
            if not 0 <= weight < math.inf:
                raise ValueError(f"{name} is {weight}; a weight must be finite and at least 0")
        if data_size < 1:
            raise ValueError(f"data_size is {data_size}; it is the number of training data")
        self.alpha, self.beta, self.gamma, self.data_size = alpha, beta, gamma, data_size

    def negative(self, pair: Pair, model: Program, guide: Program, *batch: Tensor) -> Tensor:
        """Return minus the weighted bound, summed over the data."""
        # Programs, not the class's plain functions: Pyro's SVI then sees their parameters.
        trace = trace_programs(pair, model, guide, *batch, num_particles=self.num_particles)
        information, correlation, dimension_wise = _split(pair, trace, self.data_size)
        penalty = self.alpha * information + self.beta * correlation + self.gamma * dimension_wise
        return -(trace.terms.log_lik - penalty).mean(0).sum()

    def check(self, inspection: Inspection, batch: tuple[Tensor, ...]) -> None:
        """Refuse a guide that cannot be split, and another N than the number of training data."""
        if self.data_size != len(batch[0]):
            raise ValueError(f"data_size is {self.data_size}; there are {len(batch[0])} training data")
        with torch.no_grad():
            _split(inspection.pair, inspection.training, self.data_size)


def stratified_log_weights(count: int, size: int, like: Tensor) -> Tensor:
    """Return the log-weight of each posterior j in q̂ at a draw of datum i, for :func:`divergence_split`.

    Args:
        count: M, size of the batch.
        size: N, number of data.
        like: a tensor of the dtype and device wanted.

    Returns:
        (i, j), (M, M).
    """
    if count == 1:
        # A batch of one: q̂ is its posterior.
        return like.new_zeros(1, 1)
    same = torch.eye(count, dtype=torch.bool, device=like.device)
    others = math.log((size - 1) / (size * (count - 1)))
    return like.new_full((count, count), others).masked_fill(same, -math.log(size))


def _split(pair: Pair, trace: PairTrace, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the three parts at every draw, each (K, B)."""
    site = _factorised_site(pair, trace)
    value, entries = site.drawn, site.bare
    count = value.shape[1]
    if count > size:
        raise ValueError(f"data_size is {size}, smaller than a batch of {count}: it is the number of all training data")
    # Draw i under posterior j: (i, K, 1, L) against parameters (K, j, L).
    under = entries.log_prob(value.transpose(0, 1).unsqueeze(2))
    weights = stratified_log_weights(count, size, like=value)
    log_joint = torch.logsumexp(under.sum(-1) + weights.unsqueeze(1), -1).mT
    log_marginals = torch.logsumexp(under + weights[:, None, :, None], 2).sum(-1).mT
    log_q, log_p = site.log_prob, trace.model[site.name].log_prob
    return log_q - log_joint, log_joint - log_marginals, log_marginals - log_p


def _factorised_site(pair: Pair, trace: PairTrace) -> Site:
    names = list(trace.latents)
    if len(names) != 1 or pair.max_plate_nesting != 1:
        raise ValueError(f"the divergence is split for a guide with one latent site in the data plate; it has {names}")
    (site,) = trace.latents.values()
    if site.scored is not None:
        raise ValueError(
            f"site '{site.name}' is masked, and the posteriors of two data are then densities of other entries: the "
            "divergence is split for guides without masks; train with elbo or beta_elbo"
        )
    if site.fn.event_dim != 1 or site.bare.event_shape != ():
        raise ValueError(
            f"the divergence is split entry by entry: the guide's site '{site.name}' "
            f"({site.family}) must be factorised over a vector, as DiagonalGaussian is"
        )
    return site
