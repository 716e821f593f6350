"""The VAE with a VampPrior: a mixture of the guide's posteriors at learned pseudo-inputs.

    p(x, z) = p(z) p(x | z)          p(z) = (1/C) Σ_c q(z | x = v_c)          q(z | x)

The best prior for a fixed guide is the aggregate posterior, q(z | x) averaged over the data. The VampPrior approximates
it by C learned pseudo-inputs v_1 … v_C. Model and guide share the encoder: its gradient comes from both.

Reference: Tomczak and Welling (2018), VAE with a VampPrior, AISTATS. They limit pseudo-inputs to [0, 1] by a hard tanh;
here pseudo-inputs are free, since a hard limit has no gradient outside [0, 1].
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_vae.conditionals.conditional import Conditional, Head
from pyro_vae.conditionals.likelihoods import Bernoulli
from pyro_vae.conditionals.posteriors import DiagonalGaussian
from pyro_vae.distributions.mixture_kl import MixtureKL, kl_to_prior
from pyro_vae.distributions.mixtures import GaussianMixture
from pyro_vae.models.vae import VAELoss
from pyro_vae.networks.mlp import GatedMLP
from pyro_vae.objectives.reconstruction import reconstruction
from pyro_vae.pair.pair import Pair

__all__ = ["VampPriorVAE", "starting_pseudo_inputs"]

# Two pseudo-inputs that start at one datum would have equal gradients, and never part.
JITTER = 0.01


class VampPriorVAE(Pair):
    """Pair p(z) p(x | z) with q(z | x), where p(z) = (1/C) Σ_c q(z | v_c).

    Args:
        pseudo_inputs: initial v_1 … v_C, (C, *x_shape), e.g. training data. They set the shape of x.
        latent: L.
        likelihood: head of p(x | z); Bernoulli by default.
        encoder, decoder: networks to use in place of the default ones, gated MLPs with two layers of 300.

    The mixture's log-density at K draws for B data needs C · K · B · L numbers; ``log_likelihood`` counts them.

    Raises:
        ValueError: for no pseudo-inputs, for NaN or infinite ones, and for L < 1.

    >>> import torch, pyro_vae as pv
    >>> pair = VampPriorVAE(torch.rand(10, 1, 8, 8), latent=4)
    >>> pv.log_terms(pair, torch.zeros(5, 1, 8, 8), num_particles=3).log_weights.shape
    torch.Size([3, 5])
    """

    def __init__(
        self,
        pseudo_inputs: Tensor,
        latent: int,
        likelihood: Head | None = None,
        *,
        encoder: nn.Module | None = None,
        decoder: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if pseudo_inputs.dim() < 2 or len(pseudo_inputs) == 0:
            raise ValueError(
                f"pseudo_inputs has shape {tuple(pseudo_inputs.shape)}; it must be (C, *x_shape) with C at least 1: "
                "some training data, data.train[:100] say"
            )
        if not torch.isfinite(pseudo_inputs).all():
            raise ValueError("pseudo_inputs holds NaN or infinite values: start them at training data")
        if latent < 1:
            raise ValueError(f"latent is {latent}; it must be at least 1")
        self.x_shape = tuple(pseudo_inputs.shape[1:])
        self.pseudo_inputs = nn.Parameter(pseudo_inputs.clone())
        p_head, q_head = likelihood or Bernoulli(), DiagonalGaussian()
        decoder = decoder or GatedMLP([(latent,)], p_head.num_outputs(self.x_shape))
        encoder = encoder or GatedMLP([self.x_shape], q_head.num_outputs((latent,)))
        self.p_x = Conditional(decoder, p_head, self.x_shape)
        self.q_z = Conditional(encoder, q_head, (latent,))

    def prior(self) -> GaussianMixture:
        """Return p(z), event (L,), the mixture of the guide's posteriors at the pseudo-inputs, with equal weights."""
        weights = self.pseudo_inputs.new_zeros(len(self.pseudo_inputs))
        return GaussianMixture(dist.Categorical(logits=weights), self.q_z(self.pseudo_inputs))

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.prior())
            pyro.sample("x", self.p_x(z), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.q_z(x))

    def closed_form(self, x: Tensor, *, num_particles: int, mixture_kl: MixtureKL) -> VAELoss:
        """Return −ELBO term by term with a closed-form KL; see :func:`pyro_vae.analytic_loss`."""
        q_z = self.q_z(x)
        z = q_z.rsample((num_particles,))
        return VAELoss(reconstruction(self.p_x(z), x).mean(0), kl_to_prior(q_z, self.prior(), mixture_kl))


def starting_pseudo_inputs(train: Tensor, count: int) -> Tensor:
    """Draw training data at random, with replacement, and add a little noise: no two are equal.

    Args:
        train: training data, (N, *x_shape).
        count: C, number of pseudo-inputs.

    Returns:
        (C, *x_shape).

    Raises:
        ValueError: for a count below 1.
    """
    if count < 1:
        raise ValueError(f"pseudo_inputs is {count}; the prior mixes over at least 1")
    chosen = train[torch.randint(len(train), (count,))]
    return chosen + JITTER * torch.randn_like(chosen)
