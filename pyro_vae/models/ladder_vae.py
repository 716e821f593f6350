"""The ladder VAE: a hierarchy of latents; guide and model sample it from the top down.

    p(x, z) = p(z_L) p(z_{L−1} | z_L) … p(z_1 | z_2) p(x | z_1)
    q(z | x) = q(z_L | x) q(z_{L−1} | z_L, x) … q(z_1 | z_2, x)

A deterministic bottom-up pass, d_l = f_l(d_{l−1}) with d_0 = x, gives each layer the evidence of the data,
N(m_l, s_l²). The guide samples top-down and merges it with the model's p(z_l | z_{l+1}) = N(μ_l, σ_l²):

    q(z_l | z_{l+1}, x) = N(v_l (m_l / s_l² + μ_l / σ_l²), v_l),   1 / v_l = 1 / s_l² + 1 / σ_l²

and q(z_L | x) = N(m_L, s_L²). Model and guide share the networks of p(z_l | z_{l+1}). To avoid inactive layers, use
batch normalisation with ``fit(warmup=…)``, or the objective :func:`~pyro_vae.objectives.free_bits`, which has a warm-up
too. Each layer is one site; ``collapse_report`` has a row for each.

Reference: Sønderby, Raiko, Maaløe, Sønderby and Winther (2016), Ladder variational autoencoders, NeurIPS.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pyro
import pyro.distributions as dist
from torch import Tensor, nn

from pyro_vae.conditionals.conditional import Conditional, Head
from pyro_vae.conditionals.likelihoods import Bernoulli
from pyro_vae.conditionals.posteriors import DiagonalGaussian
from pyro_vae.conditionals.priors import StandardNormal
from pyro_vae.networks.convolutional import default_decoder, default_encoder
from pyro_vae.networks.mlp import MLP
from pyro_vae.pair.pair import Pair

__all__ = ["LadderVAE", "merged"]


class LadderVAE(Pair):
    """Pair p(z_L) Π p(z_l | z_{l+1}) p(x | z_1) with a guide that merges data and model at each layer.

    The sites are named ``z1`` … ``zL``, ``z1`` next to the data.

    Args:
        x_shape: shape of one datum, (C, H, W) or (D,).
        sizes: sizes of z_1, …, z_L.
        likelihood: head of p(x | z_1); Bernoulli by default.
        hidden: width of d_l and of the networks beside it, for each layer; by default 256, 128, … down to 32.
        bottom_up: networks f_1, …, f_L to use in place of the default ones, with ``hidden[l]`` outputs.
        top_down: networks of p(z_l | z_{l+1}), l < L, to use in place of the default ones, with 2 ``sizes[l]`` outputs.
        decoder: network of p(x | z_1) to use in place of the default one.
        batch_norm: normalise hidden layers of the default networks between layers by batches (see
            :class:`~pyro_vae.networks.MLP`; the reference normalises all networks). With a warm-up, fewer upper layers
            become inactive; ``collapse_report`` names them.

    Raises:
        ValueError: for no layers, for a size or width below 1, and for a number of networks other than of layers.

    >>> import torch, pyro_vae as pv
    >>> pair = LadderVAE((1, 8, 8), (8, 4, 2))
    >>> pv.log_terms(pair, torch.zeros(5, 1, 8, 8), num_particles=3).log_weights.shape
    torch.Size([3, 5])
    """

    def __init__(
        self,
        x_shape: Sequence[int],
        sizes: Sequence[int],
        likelihood: Head | None = None,
        *,
        hidden: Sequence[int] | None = None,
        bottom_up: Sequence[nn.Module] | None = None,
        top_down: Sequence[nn.Module] | None = None,
        decoder: nn.Module | None = None,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        widths = [max(256 >> layer, 32) for layer in range(len(sizes))] if hidden is None else list(hidden)
        _check_layers(sizes, widths, bottom_up, top_down)
        self.x_shape, gaussian, head = tuple(x_shape), DiagonalGaussian(), likelihood or Bernoulli()
        if bottom_up is None:
            first = default_encoder(self.x_shape, widths[0])
            rest = (MLP([(a,)], b, (b,), batch_norm=batch_norm) for a, b in pairwise(widths))
            bottom_up = [nn.Sequential(network, nn.SiLU()) for network in (first, *rest)]
        if top_down is None:
            above = zip(sizes[1:], sizes, widths, strict=False)
            top_down = [MLP([(a,)], 2 * size, (width, width), batch_norm=batch_norm) for a, size, width in above]
        decoder = decoder or default_decoder([(sizes[0],)], self.x_shape, head.num_outputs(self.x_shape))
        layers = list(zip(sizes, widths, strict=True))
        self.bottom_up = nn.ModuleList(bottom_up)
        self.evidence = nn.ModuleList(Conditional(nn.Linear(w, 2 * size), gaussian, (size,)) for size, w in layers)
        self.p_z = nn.ModuleList(
            Conditional(net, gaussian, (size,)) for net, size in zip(top_down, sizes, strict=False)
        )
        self.prior = StandardNormal(sizes[-1])
        self.p_x = Conditional(decoder, head, self.x_shape)

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample(f"z{len(self.evidence)}", self.prior())
            for layer in reversed(range(len(self.p_z))):
                z = pyro.sample(f"z{layer + 1}", self.p_z[layer](z))
            pyro.sample("x", self.p_x(z), obs=x)

    def guide(self, x: Tensor) -> None:
        evidence, d = [], x
        for network, conditional in zip(self.bottom_up, self.evidence, strict=True):
            d = network(d)
            evidence.append(conditional(d))
        with pyro.plate("data", len(x)):
            z = pyro.sample(f"z{len(evidence)}", evidence[-1])
            for layer in reversed(range(len(self.p_z))):
                z = pyro.sample(f"z{layer + 1}", merged(evidence[layer], self.p_z[layer](z)))


def merged(first: Any, second: Any) -> dist.Distribution:
    """Return the normalised product of the densities of two diagonal Gaussians.

    N(m, s²) N(μ, σ²) ∝ N(v (m / s² + μ / σ²), v),   1 / v = 1 / s² + 1 / σ²

    Args:
        first: batch (…), event (L,).
        second: batch (…), event (L,).

    >>> import torch
    >>> one, other = (dist.Normal(mean, 1.0).to_event(1) for mean in torch.tensor([[0.0], [2.0]]))
    >>> merged(one, other).mean, merged(one, other).variance
    (tensor([1.]), tensor([0.5000]))
    """
    first, second = first.base_dist, second.base_dist
    ours, theirs = first.scale**-2, second.scale**-2
    variance = 1 / (ours + theirs)
    return dist.Normal(variance * (first.loc * ours + second.loc * theirs), variance.sqrt()).to_event(1)


def _check_layers(
    sizes: Sequence[int],
    widths: Sequence[int],
    bottom_up: Sequence[nn.Module] | None,
    top_down: Sequence[nn.Module] | None,
) -> None:
    if len(sizes) < 1:
        raise ValueError("sizes is empty: a ladder has at least 1 layer, sizes=(16, 8) has two")
    if min(sizes) < 1 or min(widths, default=1) < 1:
        raise ValueError(f"sizes is {list(sizes)}, hidden {list(widths)}; all must be at least 1")
    for name, given, count in (
        ("hidden", widths, len(sizes)),
        ("bottom_up", bottom_up, len(sizes)),
        ("top_down", top_down, len(sizes) - 1),
    ):
        if given is not None and len(given) != count:
            raise ValueError(f"{name} has {len(given)} entries; {len(sizes)} layers need {count}")
