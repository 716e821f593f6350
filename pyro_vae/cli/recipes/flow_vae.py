"""``pyro-vae train flow-vae``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from pyro.distributions import ConditionalTransformModule, transforms
from torch import nn

from pyro_vae.cli.recipes.common import LikelihoodName, make_likelihood
from pyro_vae.cli.recipes.recipe import ImageRecipe
from pyro_vae.conditionals.flows import FlowPosterior, FlowPrior
from pyro_vae.conditionals.priors import StandardNormal
from pyro_vae.data import DataSet
from pyro_vae.distributions.flow import Reversal, Sylvester
from pyro_vae.models.flow_vae import FlowVAE

__all__ = ["FlowName", "FlowVAERecipe", "PriorName", "posterior_layers", "prior_layers"]

FlowName = Literal["householder", "planar", "sylvester", "autoregressive", "coupling", "spline"]
PriorName = Literal["normal", "coupling", "autoregressive", "spline"]


@dataclass(frozen=True)
class FlowVAERecipe(ImageRecipe[FlowVAE], command="flow-vae"):
    """VAE with normalising flows in its guide, its prior, or both."""

    latent: int = 20
    """Size of z."""
    flow: FlowName = "planar"
    """Kind of the guide's flow."""
    length: int = 2
    """Number of layers of the guide's flow; 0 for a Gaussian."""
    prior: PriorName = "normal"
    """Kind of the prior's flow."""
    prior_length: int = 2
    """Number of layers of the prior's flow."""
    context: int = 32
    """Number of encoder outputs that condition the guide's flow, for conditional flows."""
    likelihood: LikelihoodName = "discretised-logistic"
    """Distribution of x given z."""

    def build(self, data: DataSet) -> FlowVAE:
        """Build the pair for a data set."""
        layers = posterior_layers(self.flow, self.length, self.latent, self.context)
        seen = any(isinstance(layer, ConditionalTransformModule) for layer in layers)
        posterior = FlowPosterior(layers, self.context if seen else 0)
        bent = prior_layers(self.prior, self.prior_length, self.latent)
        prior = FlowPrior(self.latent, bent) if bent else StandardNormal(self.latent)
        return FlowVAE(data.x_shape, prior, posterior, make_likelihood(self.likelihood, "scalar", data))


def posterior_layers(flow: FlowName, length: int, size: int, context: int, hidden: int = 64) -> list[nn.Module]:
    """Return the layers of a guide's flow, conditional on the context if Pyro has a conditional variant.

    Couplings and splines move half of the entries: the order is reversed after each.

    Args:
        flow: kind of the layers.
        length: number of layers.
        size: L, number of entries.
        context: number of context entries.
        hidden: width of the layers' networks.

    Raises:
        ValueError: for a length below 0, and for a coupling, spline or autoregressive flow of one entry.
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
    """Return the layers of a prior's flow; see :func:`posterior_layers`."""
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
