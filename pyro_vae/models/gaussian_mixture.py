"""The mixture of Gaussians; its only latent is the component.

    c ~ Categorical(w),   x ~ N(μ_c, diag σ_c²)          q(c | x) = p(c | x) = r_c(x)

The guide is the exact posterior: every log-weight is log p(x). Train it with ``pv.em``, or with ``pv.fit`` like any
other pair.

Reference: Dempster, Laird and Rubin (1977), Maximum likelihood from incomplete data via the EM algorithm, JRSS B 39.
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_vae.conditionals.priors import MixtureOfGaussians
from pyro_vae.pair.pair import Pair

__all__ = ["GaussianMixture"]


class GaussianMixture(Pair):
    """Pair p(c) p(x | c) with its exact posterior.

    Args:
        components: the mixture p(x) over D entries.
        floor: lower bound on the variances of an M-step; a component on a single datum would have infinite density.

    Raises:
        ValueError: for a negative floor.

    >>> import pyro_vae as pv
    >>> pair, x = GaussianMixture(pv.MixtureOfGaussians(3, 2)), torch.randn(5, 2)
    >>> bool(torch.allclose(pv.log_terms(pair, x).log_weights, pair.exact_log_likelihood(x), rtol=1e-4))
    True
    """

    def __init__(self, components: MixtureOfGaussians, floor: float = 1e-6) -> None:
        super().__init__()
        if not floor >= 0:
            raise ValueError(f"floor is {floor}; it is a variance and cannot be negative")
        self.x_shape, self.components, self.floor = (components.size,), components, floor

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(logits=self.components.logits))
            x_given_c = dist.Normal(self.components.means[c], self.components.log_scales[c].exp())
            pyro.sample("x", x_given_c.to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("c", dist.Categorical(probs=self.components.responsibilities(x)))

    def exact_log_likelihood(self, x: Tensor) -> Tensor:
        """Return log p(x), (B,), in nats."""
        return self.components().log_prob(x)

    def e_step(self, x: Tensor) -> Tensor:
        """Return the responsibilities r_c(x), (B, components)."""
        return self.components.responsibilities(x)

    def elbo(self, x: Tensor, q: Tensor) -> Tensor:
        """Return Σ_c q_c [log w_c + log N(x; μ_c, diag σ_c²) − log q_c], (B,), in nats, for any q (B, components)."""
        log_joint = self.components.logits.log_softmax(-1)
        log_joint = log_joint + self.components.component_distribution().log_prob(x.unsqueeze(-2))
        return (q * log_joint - torch.xlogy(q, q)).sum(-1)

    @torch.no_grad()
    def m_step(self, x: Tensor, q: Tensor) -> None:
        """Set w, μ and σ to the moments of the data, weighted by q (B, components).

        The mean and the scale of an empty component do not change.
        """
        counts = q.sum(0)
        used = counts > 0
        shares = q / torch.where(used, counts, 1.0)
        means = shares.mT @ x
        # Squared differences: E x² − (E x)² would lose precision for data far from zero.
        variances = torch.einsum("bc,bcd->cd", shares, (x.unsqueeze(-2) - means) ** 2).clamp(min=self.floor)
        self.components.logits.copy_(counts.clamp(min=torch.finfo(q.dtype).tiny).log())
        self.components.means.copy_(torch.where(used.unsqueeze(-1), means, self.components.means))
        log_scales = torch.where(used.unsqueeze(-1), variances.log() / 2, self.components.log_scales)
        self.components.log_scales.copy_(log_scales)
