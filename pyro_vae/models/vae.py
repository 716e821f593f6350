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
    """Hold −ELBO by site, (B,), in nats: ``x`` is E_q[−log p(x | z)], ``z`` is KL(q(z | x) ‖ p(z))."""

    x: Tensor
    z: Tensor

    @property
    def total(self) -> Tensor:
        """Return −ELBO, (B,), in nats."""
        return self.x + self.z


class VAE(Pair):
    """Pair p(z) p(x | z) with q(z | x).

    Args:
        x_shape: shape of one datum, (C, H, W) or (D,).
        prior: p(z) over L entries, :class:`~pyro_vae.StandardNormal` or :class:`~pyro_vae.MixtureOfGaussians`.
        likelihood: head of p(x | z); Gaussian with one learned γ by default.
        posterior: head of q(z | x), diagonal by default; or a module that maps (x, …) to a distribution, e.g.
            :class:`~pyro_vae.FreeGaussian`.
        encoder, decoder: networks to use in place of the default ones: MLPs, or strided conv nets from 16 × 16 pixels.

    Raises:
        ValueError: for an encoder beside a posterior that needs none.

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
        self.x_shape, self.prior = tuple(x_shape), prior
        x, z = self.x_shape, (prior.size,)
        p_x, q_z = likelihood or Gaussian(), posterior or DiagonalGaussian()
        self.p_x = Conditional(decoder or default_decoder([z], x, p_x.num_outputs(x)), p_x, x)
        if isinstance(q_z, Head):
            q_z = Conditional(encoder or default_encoder(x, q_z.num_outputs(z)), q_z, z)
        elif encoder is not None:
            raise ValueError("encoder is given, but posterior is a whole conditional and has no use for it")
        self.q_z = q_z

    def model(self, x: Tensor, *conditions: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.prior())
            pyro.sample("x", self.p_x(z), obs=x)

    def guide(self, x: Tensor, *conditions: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.q_z(x, *conditions))

    def closed_form(self, x: Tensor, *conditions: Tensor, num_particles: int, mixture_kl: MixtureKL) -> VAELoss:
        """Return −ELBO term by term with a closed-form KL; see :func:`pyro_vae.analytic_loss`."""
        q_z = self.q_z(x, *conditions)
        z = q_z.rsample((num_particles,))
        return VAELoss(reconstruction(self.p_x(z), x).mean(0), kl_to_prior(q_z, self.prior(), mixture_kl))
