"""The one-stage variational auto-encoder.

    p(x, z) = p(z) p(x | z)          q(z | x)

    −ELBO = E_q[−log p(x | z)] + KL(q(z | x) ‖ p(z))

Reference: Kingma and Welling (2014), Auto-encoding variational Bayes, ICLR.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import pyro
from torch import Tensor, nn

from pyro_vae.conditionals.conditional import Conditional, Head
from pyro_vae.conditionals.likelihoods import Gaussian
from pyro_vae.conditionals.posteriors import DiagonalGaussian
from pyro_vae.conditionals.priors import MixtureOfGaussians, StandardNormal
from pyro_vae.distributions.mixture_kl import MixtureKL, kl_to_prior
from pyro_vae.networks.convolutional import default_decoder, default_encoder
from pyro_vae.objectives.reconstruction import reconstruction
from pyro_vae.pair.pair import Pair

__all__ = ["VAE", "VAELoss"]


class VAELoss(NamedTuple):
    """Each site's share of −ELBO, (B,), in nats: E_q[−log p(x | z)] and KL(q(z | x) ‖ p(z))."""

    x: Tensor
    z: Tensor

    @property
    def total(self) -> Tensor:
        """−ELBO per datum, (B,)."""
        return self.x + self.z


class VAE(Pair):
    """Pair p(z) p(x | z) with q(z | x).

    Args:
        x_shape: shape of one datum, (C, H, W) or (D,).
        prior: p(z), :class:`~pyro_vae.StandardNormal` or :class:`~pyro_vae.MixtureOfGaussians`; it knows L.
        likelihood: the head of p(x | z); Gaussian with one learned γ by default.
        posterior: the head of q(z | x), diagonal by default, or a whole conditional module that maps (x, …) to a
            distribution, such as :class:`~pyro_vae.FreeGaussian`.
        encoder, decoder: networks of the user's own; by default MLPs, from 16 × 16 pixels up strided conv nets.

    >>> import torch, pyro_vae as pv
    >>> pair = VAE((1, 8, 8), pv.StandardNormal(4), pv.Bernoulli())
    >>> pv.log_terms(pair, torch.zeros(5, 1, 8, 8), num_particles=3).log_weights.shape
    torch.Size([3, 5])
    """

    def __init__(
        self,
        x_shape: Sequence[int],
        prior: StandardNormal | MixtureOfGaussians,
        likelihood: Head | None = None,
        posterior: nn.Module | None = None,
        *,
        encoder: nn.Module | None = None,
        decoder: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.x_shape = tuple(x_shape)
        self.prior = prior
        self.p_x = _likelihood(self.x_shape, [(prior.size,)], likelihood or Gaussian(), decoder)
        self.q_z = _posterior(self.x_shape, prior.size, posterior or DiagonalGaussian(), encoder)

    def model(self, x: Tensor, *conditions: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.prior())
            pyro.sample("x", self.p_x(z), obs=x)

    def guide(self, x: Tensor, *conditions: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.q_z(x, *conditions))

    def closed_form(self, x: Tensor, *conditions: Tensor, num_particles: int, mixture_kl: MixtureKL) -> VAELoss:
        """Return the documents' loss: see :func:`pyro_vae.analytic_loss`."""
        q_z = self.q_z(x, *conditions)
        z = q_z.rsample((num_particles,))
        return VAELoss(reconstruction(self.p_x(z), x).mean(0), kl_to_prior(q_z, self.prior(), mixture_kl))


def _likelihood(
    shape: tuple[int, ...], inputs: list[tuple[int, ...]], head: Head, network: nn.Module | None
) -> Conditional:
    return Conditional(network or default_decoder(inputs, shape, head.num_outputs(shape)), head, shape)


def _posterior(shape: tuple[int, ...], size: int, posterior: nn.Module, network: nn.Module | None) -> nn.Module:
    if not isinstance(posterior, Head):
        if network is not None:
            raise ValueError("encoder is given, but posterior is a whole conditional and has no use for it")
        return posterior
    return Conditional(network or default_encoder(shape, posterior.num_outputs((size,))), posterior, (size,))
