"""The β-VAE: a one-stage VAE trained to disentangle the factors of variation.

    p(x, z) = p(z) p(x | z)          q(z | x) diagonal

    β-ELBO = E_q[log p(x | z)] − β KL(q(z | x) ‖ p(z))                       a bound on log p(x) for β ≥ 1
    capacity: E_q[log p(x | z)] − β |KL(q(z | x) ‖ p(z)) − C|                C rises while training; no bound
    β-TCVAE: KL = mutual information + total correlation + the rest, the total correlation weighted by β

Model and guide are the VAE's. Only the training objective differs. Evaluation ignores β: validation losses are −ELBO
at β = 1, and ``log_likelihood`` estimates log p(x).

Reference: Higgins et al. (2017), β-VAE, ICLR; Burgess et al. (2018), arXiv:1804.03599; Chen, Li, Grosse and Duvenaud
(2018), Isolating sources of disentanglement in VAEs, NeurIPS.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from pyro_vae.conditionals.conditional import Head
from pyro_vae.conditionals.likelihoods import Bernoulli
from pyro_vae.conditionals.priors import MixtureOfGaussians, StandardNormal
from pyro_vae.models.vae import VAE
from pyro_vae.networks.annealed import Annealed
from pyro_vae.objectives.bounds import Objective, beta_elbo, capacity_elbo
from pyro_vae.objectives.total_correlation import TotalCorrelationELBO

__all__ = ["BetaVAE"]


class BetaVAE(VAE):
    """Pair p(z) p(x | z) with q(z | x), and provide its training objectives.

    Args:
        x_shape: shape of one datum, (C, H, W) or (D,).
        prior: p(z) over L entries.
        likelihood: head of p(x | z); Bernoulli by default.
        beta: β ≥ 0, the weight of the KL, or of its distance from the capacity.
        capacity: C in nats, annealed during training; None for the β-ELBO.
        encoder, decoder: networks to use in place of the default ones.

    Raises:
        ValueError: for a negative or infinite β, and for a negative capacity.

    >>> import torch, pyro_vae as pv
    >>> pair = BetaVAE((1, 8, 8), pv.StandardNormal(4), beta=4.0, capacity=pv.Annealed(0.0, 10.0, epochs=5))
    >>> pair.objective()(pv.log_terms(pair, torch.zeros(5, 1, 8, 8), num_particles=3)).shape
    torch.Size([5])
    """

    def __init__(
        self,
        x_shape: Sequence[int],
        prior: StandardNormal | MixtureOfGaussians,
        likelihood: Head | None = None,
        *,
        beta: float = 4.0,
        capacity: Annealed | None = None,
        encoder: nn.Module | None = None,
        decoder: nn.Module | None = None,
    ) -> None:
        super().__init__(x_shape, prior, likelihood or Bernoulli(), encoder=encoder, decoder=decoder)
        self.beta, self.capacity = beta, capacity
        self.objective()

    def objective(self) -> Objective:
        """Return the β-ELBO or the capacity objective, for ``fit(pair, data, loss=pair.objective())``."""
        return beta_elbo(self.beta) if self.capacity is None else capacity_elbo(self.beta, self.capacity)

    def total_correlation_elbo(self, num_data: int) -> TotalCorrelationELBO:
        """Return the loss of β-TCVAE for ``num_data`` training data."""
        return TotalCorrelationELBO(self.beta, num_data)
