"""A linear Gaussian model with a mixture prior and its exact posterior.

    c ~ w,   z ~ N(μ_c, diag σ_c²),   x ~ N(W z + b, γ² I)          q(c, z | x) = p(c | x) p(z | x, c)

Every log-weight is log p(x): use it as the oracle of a likelihood estimator.
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_vae.conditionals.priors import MixtureOfGaussians
from pyro_vae.conditionals.scales import LearnedScale
from pyro_vae.distributions.linear_gaussian import condition_gaussian, mixture_log_likelihood
from pyro_vae.pair.pair import Pair

__all__ = ["LinearGaussianMixtureVAE", "given_component"]


class LinearGaussianMixtureVAE(Pair):
    """Pair a linear decoder and a mixture-of-Gaussians prior with the exact posterior over (c, z).

    Args:
        x_size: D.
        prior: mixture over L entries.
        scale: initial γ.

    >>> import pyro_vae as pv
    >>> pair, x = LinearGaussianMixtureVAE(5, pv.MixtureOfGaussians(3, 2)), torch.randn(4, 5)
    >>> weights = pv.log_terms(pair, x, num_particles=2).log_weights
    >>> bool(torch.allclose(weights, pair.exact_log_likelihood(x), rtol=1e-4))
    True
    """

    def __init__(self, x_size: int, prior: MixtureOfGaussians, scale: float = 0.5) -> None:
        super().__init__()
        self.x_shape = (x_size,)
        self.prior = prior
        self.weight = nn.Parameter(torch.randn(x_size, prior.size) / prior.size**0.5)
        self.bias = nn.Parameter(torch.zeros(x_size))
        self.scale = LearnedScale(scale)

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(logits=self.prior.logits))
            z = pyro.sample("z", given_component(self.prior, c))
            pyro.sample("x", dist.Normal(z @ self.weight.mT + self.bias, self.scale()).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        log_marginals, posteriors = self.exact_components(x)
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(logits=self.prior.logits.log_softmax(-1) + log_marginals))
            rows = torch.arange(len(x), device=x.device)
            factor = posteriors.scale_tril[rows, c]
            pyro.sample("z", dist.MultivariateNormal(posteriors.loc[rows, c], scale_tril=factor))

    def exact_components(self, x: Tensor) -> tuple[Tensor, dist.MultivariateNormal]:
        """Return log p(x | c), (B, C), and p(z | x, c), batch (B, C), event (L,)."""
        noise = self.scale().expand(x.shape[-1])
        factor = torch.diag_embed(self.prior.log_scales.exp())
        return condition_gaussian(self.prior.means, factor, self.weight, noise, (x - self.bias).unsqueeze(-2))

    def exact_log_likelihood(self, x: Tensor) -> Tensor:
        """Return log p(x), (B,), in nats."""
        return mixture_log_likelihood(self.prior.logits, self.exact_components(x)[0])


def given_component(prior: MixtureOfGaussians, c: Tensor) -> dist.Distribution:
    """Return N(μ_c, diag σ_c²), batch of ``c``, event (L,)."""
    return dist.Normal(prior.means[c], prior.log_scales.exp()[c]).to_event(1)
