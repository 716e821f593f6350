"""The VAE with normalising flows: in the guide, in the prior, or in both.

    p(x, z) = p(z) p(x | z)          q(z | x) = the flow f_T ∘ … ∘ f_1 of N(μ(x), diag σ²(x))

    log q(z | x) = log N(z₀; μ, diag σ²) − Σ_t log |det ∂f_t / ∂z_{t−1}|

The guide's flow bends its Gaussian towards the posterior; a prior's flow bends N(0, I) towards the aggregate posterior.
A guide scores its own draws only, so that any flow will do, one without an inverse too (planar, Sylvester); a prior
must score points that it did not draw. With no layers the pair is :class:`~pyro_vae.models.VAE`.

Reference: Rezende and Mohamed (2015), Variational inference with normalizing flows, ICML; Tomczak and Welling (2016),
Improving variational auto-encoders using Householder flow, arXiv:1611.09630; Kingma et al. (2016), Improved variational
inference with inverse autoregressive flow, NeurIPS; van den Berg et al. (2018), Sylvester normalizing flows for
variational inference, UAI.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import pyro
from pyro.distributions import transforms
from torch import Tensor, nn

from pyro_vae.conditionals.conditional import Conditional, Head
from pyro_vae.conditionals.flows import FlowPosterior, FlowPrior
from pyro_vae.conditionals.likelihoods import Bernoulli
from pyro_vae.conditionals.priors import MixtureOfGaussians, StandardNormal
from pyro_vae.distributions.flow import Reversal, Sylvester
from pyro_vae.networks.convolutional import default_decoder, default_encoder
from pyro_vae.pair.pair import Pair

__all__ = ["FlowName", "FlowVAE", "PriorName", "posterior_layers", "prior_layers"]

FlowName = Literal["householder", "planar", "sylvester", "autoregressive", "coupling", "spline"]
PriorName = Literal["normal", "coupling", "autoregressive", "spline"]


class FlowVAE(Pair):
    """Pair p(z) p(x | z) with q(z | x), either or both under a flow.

    Args:
        x_shape: shape of one datum, (C, H, W) or (D,).
        prior: p(z), :class:`~pyro_vae.FlowPrior`, or one without a flow; it knows L.
        posterior: the head of q(z | x), :class:`~pyro_vae.FlowPosterior`.
        likelihood: the head of p(x | z); Bernoulli by default.
        encoder, decoder: networks of the user's own.

    >>> import torch, pyro_vae as pv
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


def posterior_layers(flow: FlowName, length: int, size: int, context: int, hidden: int = 64) -> list[nn.Module]:
    """Return ``length`` layers of a flow for a guide, conditional on the context where Pyro has such a variant.

    Couplings and splines move half of the entries, so that the order is reversed after each.

    Raises:
        ValueError: for a length below 0, and a coupling or autoregressive flow of a single entry.
    """
    conditional: dict[str, Callable[[], nn.Module]] = {
        "householder": lambda: transforms.conditional_householder(size, context, [hidden]),
        "planar": lambda: transforms.conditional_planar(size, context, [hidden]),
        "sylvester": lambda: Sylvester(size, max(1, size // 2)),
        "autoregressive": lambda: transforms.conditional_affine_autoregressive(size, context, [max(hidden, size)]),
        "coupling": lambda: transforms.conditional_affine_coupling(size, context, [hidden]),
    }
    return _layers(conditional.get(flow) or _unconditional(flow, size, hidden), flow, length, size)


def prior_layers(flow: PriorName, length: int, size: int, hidden: int = 64) -> list[nn.Module]:
    """Return ``length`` layers of a flow for a prior; see :func:`posterior_layers`."""
    return [] if flow == "normal" else _layers(_unconditional(flow, size, hidden), flow, length, size)


def _unconditional(flow: str, size: int, hidden: int) -> Callable[[], nn.Module]:
    makers: dict[str, Callable[[], nn.Module]] = {
        "coupling": lambda: transforms.affine_coupling(size, [hidden]),
        "autoregressive": lambda: transforms.affine_autoregressive(size, [max(hidden, size)]),
        "spline": lambda: transforms.spline_coupling(size, hidden_dims=[hidden]),
    }
    return makers[flow]


def _layers(make: Callable[[], nn.Module], flow: str, length: int, size: int) -> list[nn.Module]:
    if length < 0:
        raise ValueError(f"length is {length}; a flow has at least 0 layers")
    if size < 2 and flow in ("coupling", "autoregressive", "spline"):
        raise ValueError(f"latent is {size}; a flow of kind '{flow}' moves some entries by others and needs at least 2")
    layers: list[nn.Module] = []
    for _ in range(length):
        layers.append(make())
        if flow in ("coupling", "spline"):
            layers.append(Reversal(size))
    return layers
