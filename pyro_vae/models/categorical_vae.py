"""The VAE with categorical latents.

    p(x, z) = Π_g Categorical(z_g; π_g) · p(x | z)          q(z | x) = Π_g Categorical(z_g; π_g(x)),   z_g one-hot rows

Choose one of four gradient estimators for the guide. The first two need a :class:`~pyro_vae.GumbelSoftmax`:

* relaxed: draws lie inside the simplex, at an annealed temperature;
* straight-through: draws are rounded to one-hot rows, with the gradients of the relaxed draws;
* score function: discrete draws, with Pyro's ``Trace_ELBO`` or ``TraceGraph_ELBO``;
* enumeration: ``TraceEnum_ELBO`` sums over all C^G rows; use it for few rows.

Only training mode relaxes. In evaluation mode model and guide are discrete, for validation losses as for
:func:`~pyro_vae.log_likelihood`. The relaxed training loss bounds no likelihood, and no result reports it as one.

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
        prior: p(z) over G groups of C categories, :class:`~pyro_vae.OneHotPrior`.
        likelihood: head of p(x | z); Bernoulli by default.
        relaxation: relaxation of training draws; None leaves them discrete.
        enumerated: mark z for ``TraceEnum_ELBO`` to sum over; Pyro's other losses then warn.
        encoder: network from x to G·C logits.
        decoder: network from z, (…, G, C), to the head's outputs.

    Raises:
        ValueError: for a relaxation of an enumerated z, and for more than 2^14 configurations to enumerate.

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
            ValueError: for more than 2^14 configurations.
        """
        prior = self.prior()
        z = prior.enumerate_support()
        return torch.logsumexp(prior.log_prob(z).unsqueeze(-1) + self.p_x(z.unsqueeze(1)).log_prob(x), 0)
