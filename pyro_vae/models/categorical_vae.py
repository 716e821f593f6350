"""The VAE with categorical latents.

    p(x, z) = Π_g Categorical(z_g; π_g) · p(x | z)          q(z | x) = Π_g Categorical(z_g; π_g(x)),   z_g one-hot rows

Four ways to the guide's gradient, of which the first two take a :class:`~pyro_vae.GumbelSoftmax`:

* relaxed: training draws lie inside the simplex, at a temperature that may fall;
* straight-through: training draws are rounded to one-hot rows and keep the relaxed draws' gradients;
* score function: discrete draws, Pyro's ``Trace_ELBO`` or ``TraceGraph_ELBO``;
* enumeration: no draws, ``TraceEnum_ELBO`` sums over all C^G rows, which must be few.

A relaxation lives in training mode only. In evaluation mode model and guide are the discrete ones above, whatever they
were trained by: validation losses and :func:`~pyro_vae.log_likelihood` are of the discrete model, and the relaxed
training loss, which bounds nothing, is never reported as a likelihood.

Reference: Jang, Gu and Poole (2017), Categorical reparameterization with Gumbel-softmax, ICLR.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from pyro_vae.conditionals.categorical import GumbelSoftmax, OneHotPrior
from pyro_vae.conditionals.conditional import Conditional, Head
from pyro_vae.conditionals.likelihoods import Bernoulli
from pyro_vae.distributions.one_hot import OneHots
from pyro_vae.networks.convolutional import default_decoder, default_encoder
from pyro_vae.pair.pair import Pair

__all__ = ["CategoricalVAE"]


class CategoricalVAE(Pair):
    """Pair Π_g Categorical(z_g) p(x | z) with Π_g Categorical(z_g | x).

    Args:
        x_shape: shape of one datum, (C, H, W) or (D,).
        prior: p(z), :class:`~pyro_vae.OneHotPrior`; it knows how many groups and categories there are.
        likelihood: the head of p(x | z); Bernoulli by default.
        relaxation: what the draws are relaxed by while training; None leaves them discrete.
        enumerated: whether z is marked for ``TraceEnum_ELBO`` to sum over; other losses of Pyro's then warn.
        encoder: maps x to G·C logits; decoder: maps z, (…, G, C), to the head's outputs.

    Raises:
        ValueError: for a relaxation of what is summed over, and more than 2^14 configurations to sum over.

    >>> import torch, pyro_vae as pv
    >>> pair = CategoricalVAE((1, 8, 8), pv.OneHotPrior(2, 3), relaxation=pv.GumbelSoftmax(0.5))
    >>> x = torch.zeros(5, 1, 8, 8)
    >>> pv.log_likelihood(pair, x, num_particles=100).quantity, pair.exact_log_likelihood(x).shape
    ('log p(x)', torch.Size([5]))
    """

    def __init__(
        self,
        x_shape: Sequence[int],
        prior: OneHotPrior,
        likelihood: Head | None = None,
        relaxation: GumbelSoftmax | None = None,
        *,
        enumerated: bool = False,
        encoder: nn.Module | None = None,
        decoder: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if enumerated and relaxation is not None:
            raise ValueError("enumerated sums over one-hot rows, which a relaxation never draws: leave one of them out")
        if enumerated:
            prior().enumerate_support()
        self.x_shape, self.prior, self.relaxation, self.enumerated = tuple(x_shape), prior, relaxation, enumerated
        z_shape, head = (prior.groups, prior.categories), likelihood or Bernoulli()
        network = decoder or default_decoder([z_shape], self.x_shape, head.num_outputs(self.x_shape))
        self.p_x = Conditional(network, head, self.x_shape)
        self.encoder = encoder or default_encoder(self.x_shape, prior.groups * prior.categories)

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self._rows(self.prior.logits))
            pyro.sample("x", self.p_x(z), obs=x)

    def guide(self, x: Tensor) -> None:
        logits = self.encoder(x).unflatten(-1, (self.prior.groups, self.prior.categories))
        with pyro.plate("data", len(x)):
            pyro.sample("z", self._rows(logits), infer={"enumerate": "parallel"} if self.enumerated else {})

    def _rows(self, logits: Tensor) -> Any:
        return self.relaxation(logits) if self.training and self.relaxation is not None else OneHots(logits)

    def exact_log_likelihood(self, x: Tensor) -> Tensor:
        """Return log p(x) = log Σ_z p(z) p(x | z) over all configurations, (B,), in nats.

        Raises:
            ValueError: where they are too many to sum over.
        """
        prior = self.prior()
        z = prior.enumerate_support()
        return torch.logsumexp(prior.log_prob(z).unsqueeze(-1) + self.p_x(z.unsqueeze(1)).log_prob(x), 0)
