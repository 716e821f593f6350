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
from dataclasses import dataclass
from typing import Literal

import pyro
from pyro.distributions import ConditionalTransformModule, transforms
from torch import Tensor, nn

from pyro_vae.conditionals import Bernoulli, Conditional, Head, MixtureOfGaussians, StandardNormal
from pyro_vae.data import DataSet
from pyro_vae.flows import FlowPosterior, FlowPrior, Reversal, Sylvester
from pyro_vae.models.options import LikelihoodName, make_likelihood
from pyro_vae.networks import default_decoder, default_encoder
from pyro_vae.pair import Pair

__all__ = ["FlowName", "FlowVAE", "FlowVAEOptions", "posterior_layers", "prior_layers"]

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


@dataclass(frozen=True)
class FlowVAEOptions:
    """VAE with normalising flows in its guide, its prior, or both."""

    latent: int = 20
    """Size of z."""
    flow: FlowName = "planar"
    """Kind of the guide's flow."""
    length: int = 2
    """Number of layers of the guide's flow; 0 leaves a Gaussian."""
    prior: PriorName = "normal"
    """Kind of the prior's flow."""
    prior_length: int = 2
    """Number of layers of the prior's flow."""
    context: int = 32
    """Outputs of the encoder that the guide's flow sees, where its layers can."""
    likelihood: LikelihoodName = "discretised-logistic"
    """Distribution of x given z."""

    def build(self, data: DataSet) -> FlowVAE:
        """Return the pair for a data set."""
        layers = posterior_layers(self.flow, self.length, self.latent, self.context)
        seen = any(isinstance(layer, ConditionalTransformModule) for layer in layers)
        posterior = FlowPosterior(layers, self.context if seen else 0)
        bent = prior_layers(self.prior, self.prior_length, self.latent)
        prior = FlowPrior(self.latent, bent) if bent else StandardNormal(self.latent)
        return FlowVAE(data.x_shape, prior, posterior, make_likelihood(self.likelihood, "scalar", data))
