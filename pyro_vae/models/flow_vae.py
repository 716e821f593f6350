"""The VAE with normalising flows, in the guide, in the prior, or in both.

    p(x, z) = p(z) p(x | z)          q(z | x) = the flow f_T ∘ … ∘ f_1 of N(μ(x), diag σ²(x))

    log q(z | x) = log N(z₀; μ, diag σ²) − Σ_t log |det ∂f_t / ∂z_{t−1}|

A flow in the guide moves its Gaussian towards the posterior. A flow in the prior moves N(0, I) towards the aggregate
posterior. The guide scores only points that it drew: use any flow there, even one without an inverse (planar,
Sylvester). The prior scores points of the guide: use a flow with an inverse there. Without layers the pair is
:class:`~pyro_vae.models.VAE`.

Reference: Rezende and Mohamed (2015), Variational inference with normalizing flows, ICML; Tomczak and Welling (2016),
Improving variational auto-encoders using Householder flow, arXiv:1611.09630; Kingma et al. (2016), Improved variational
inference with inverse autoregressive flow, NeurIPS; van den Berg et al. (2018), Sylvester normalizing flows for
variational inference, UAI.
"""

from __future__ import annotations

from collections.abc import Sequence

import pyro
from torch import Tensor, nn

from pyro_vae.conditionals.conditional import Conditional, Head
from pyro_vae.conditionals.flows import FlowPosterior, FlowPrior
from pyro_vae.conditionals.likelihoods import Bernoulli
from pyro_vae.conditionals.priors import MixtureOfGaussians, StandardNormal
from pyro_vae.networks.convolutional import default_decoder, default_encoder
from pyro_vae.pair.pair import Pair

__all__ = ["FlowVAE"]


class FlowVAE(Pair):
    """Pair p(z) p(x | z) with q(z | x), either or both under a flow.

    Args:
        x_shape: shape of one datum, (C, H, W) or (D,).
        prior: p(z) over L entries, :class:`~pyro_vae.FlowPrior` or a prior without a flow.
        posterior: head of q(z | x), :class:`~pyro_vae.FlowPosterior`.
        likelihood: head of p(x | z); Bernoulli by default.
        encoder, decoder: networks to use in place of the default ones.

    >>> import torch, pyro_vae as pv
    >>> from pyro.distributions import transforms
    >>> posterior = pv.FlowPosterior([transforms.planar(4), transforms.planar(4)])
    >>> pair = FlowVAE((1, 8, 8), pv.StandardNormal(4), posterior)
    >>> pv.log_terms(pair, torch.zeros(5, 1, 8, 8), num_particles=3).log_weights.shape
    torch.Size([3, 5])
    """

    def __init__(
        self,
        x_shape: Sequence[int],
        prior: FlowPrior | StandardNormal | MixtureOfGaussians,
        posterior: FlowPosterior,
        likelihood: Head | None = None,
        *,
        encoder: nn.Module | None = None,
        decoder: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.x_shape, self.prior, head, z_shape = tuple(x_shape), prior, likelihood or Bernoulli(), (prior.size,)
        decoder = decoder or default_decoder([z_shape], self.x_shape, head.num_outputs(self.x_shape))
        encoder = encoder or default_encoder(self.x_shape, posterior.num_outputs(z_shape))
        self.p_x = Conditional(decoder, head, self.x_shape)
        self.q_z = Conditional(encoder, posterior, z_shape)

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.prior())
            pyro.sample("x", self.p_x(z), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.q_z(x))
