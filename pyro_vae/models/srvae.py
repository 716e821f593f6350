"""The two-stage conditional variational auto-encoder, SRVAE.

    p(x, y, u, z) = p(u) p(y | u) p(z | y, u) p(x | y, z)
    q(y, u, z | x) = q(y | x) q(u | y) q(z | x)

    −ELBO = E[−log p(x | y, z)] + E[−log p(y | u)] + KL(q(u | y) ‖ p(u)) + E KL(q(z | x) ‖ p(z | y, u)) − H[q(y | x)]

y is a down-scaled x. Choose one of three readings of q(y | x); the quantity under the bound depends on it
(``docs/mathematics.md``):

* ``delta``: a point mass on d(x), with a continuous y. A bound on the joint log p(x, y = d(x)), as in the reference.
* ``gaussian``: N(d(x), s² I), with a latent y. A bound on log p(x).
* ``discretised``: a point mass on d(x) rounded to gray levels, with a probability mass p(y | u). A bound on log p(x):
  p(x) = Σ_y p(x, y) ≥ p(x, d(x)).

Reference: Gatopoulos, Stol and Tomczak (2020), Super-resolution variational auto-encoders, arXiv:2006.05218.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from pyro_vae.conditionals.conditional import Conditional, Head
from pyro_vae.conditionals.likelihoods import DiscretisedLogistic, Gaussian
from pyro_vae.conditionals.posteriors import DiagonalGaussian
from pyro_vae.conditionals.priors import MixtureOfGaussians, StandardNormal
from pyro_vae.conditionals.scales import LearnedScale, Scale
from pyro_vae.distributions.kl import gaussian_entropy, kl_diagonal
from pyro_vae.distributions.mixture_kl import MixtureKL, kl_to_prior
from pyro_vae.networks.convolutional import default_decoder, default_encoder
from pyro_vae.networks.mlp import MLP
from pyro_vae.objectives.reconstruction import reconstruction
from pyro_vae.pair.pair import Pair

__all__ = ["SRVAE", "SRVAELoss", "Transition"]

Transition = Literal["delta", "gaussian", "discretised"]


class SRVAELoss(NamedTuple):
    """Hold −ELBO by site, (B,), in nats.

    Attributes:
        x: E[−log p(x | y, z)].
        y: E[−log p(y | u)] − H[q(y | x)]; the entropy is that of the reading ``gaussian``, else 0.
        u: KL(q(u | y) ‖ p(u)).
        z: E KL(q(z | x) ‖ p(z | y, u)).
    """

    x: Tensor
    y: Tensor
    u: Tensor
    z: Tensor

    @property
    def total(self) -> Tensor:
        """Return −ELBO, (B,), in nats."""
        return self.x + self.y + self.u + self.z


class AveragePool(nn.Module):
    """Compute d(x), the means of blocks of scale × scale pixels, rounded to ``levels`` gray levels if given."""

    def __init__(self, scale: int, levels: int | None = None) -> None:
        super().__init__()
        self.scale, self.levels = scale, levels

    def forward(self, x: Tensor) -> Tensor:
        y = avg_pool2d(x, self.scale)
        return y if self.levels is None else torch.round(y * (self.levels - 1)) / (self.levels - 1)


class SRVAE(Pair):
    """Pair p(u) p(y | u) p(z | y, u) p(x | y, z) with q(y | x) q(u | y) q(z | x).

    Args:
        x_shape: (C, H, W).
        scale: ratio of the height of x to that of y, a whole number.
        prior: p(u), :class:`~pyro_vae.StandardNormal` or :class:`~pyro_vae.MixtureOfGaussians`.
        transition: reading of q(y | x), see above.
        likelihood: head of p(x | y, z); Gaussian with one learned γ₁ by default.
        y_likelihood: head of p(y | u); Gaussian with one learned γ₂ by default, discretised logistic on ``levels`` in
            the reading ``discretised``.
        levels: number of gray levels of the data; the reading ``discretised`` needs it.
        transition_scale: s of the reading ``gaussian``; learned from 0.05 by default.
        z_size: size of z; by default that of u.
        networks: networks to use in place of the default ones, by conditional: ``q_u``, ``q_z``, ``p_y``, ``p_z``,
            ``p_x``. Call signatures: ``p_z(y, u)``, ``p_x(y, z)``.

    Raises:
        ValueError: for an image size that is no multiple of the scale, for an unknown transition or network name, and
            for missing levels.

    >>> import torch, pyro_vae as pv
    >>> pair = SRVAE((1, 8, 8), scale=2, prior=pv.MixtureOfGaussians(10, 16), transition="delta")
    >>> pv.analytic_loss(pair, torch.rand(5, 1, 8, 8)).total.shape
    torch.Size([5])
    """

    def __init__(
        self,
        x_shape: Sequence[int],
        scale: int,
        prior: StandardNormal | MixtureOfGaussians,
        transition: Transition = "delta",
        likelihood: Head | None = None,
        y_likelihood: Head | None = None,
        *,
        levels: int | None = None,
        transition_scale: Scale | None = None,
        z_size: int | None = None,
        networks: dict[str, nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.x_shape = tuple(x_shape)
        self.y_shape = _low_resolution(self.x_shape, scale)
        if transition not in ("delta", "gaussian", "discretised"):
            raise ValueError(f"transition is '{transition}'; choose 'delta', 'gaussian' or 'discretised'")
        if transition == "discretised" and levels is None:
            raise ValueError("transition 'discretised' needs levels, the data's number of gray levels (data.levels)")
        self.transition, self.prior = transition, prior
        z_size = prior.size if z_size is None else z_size
        p_x = likelihood or Gaussian()
        on_levels = levels if transition == "discretised" else None
        p_y = y_likelihood or (DiscretisedLogistic(on_levels) if on_levels else Gaussian())
        self.down_scale = AveragePool(scale, on_levels)
        if transition == "gaussian":
            # Between half a gray level of 256, which is invisible, and a tenth of the range, which blurs y.
            self.s = transition_scale or LearnedScale(initial=0.05)
        self._build(p_x, p_y, z_size, dict(networks or {}))

    def _build(self, p_x: Head, p_y: Head, z_size: int, networks: dict[str, nn.Module]) -> None:
        gaussian = DiagonalGaussian()
        x, y, u, z = self.x_shape, self.y_shape, (self.prior.size,), (z_size,)

        def conditional(name: str, default: nn.Module, head: Head, event: tuple[int, ...]) -> Conditional:
            return Conditional(networks.pop(name, default), head, event)

        self.q_u = conditional("q_u", default_encoder(y, gaussian.num_outputs(u)), gaussian, u)
        self.q_z = conditional("q_z", default_encoder(x, gaussian.num_outputs(z)), gaussian, z)
        self.p_y = conditional("p_y", default_decoder([u], y, p_y.num_outputs(y)), p_y, y)
        self.p_z = conditional("p_z", MLP([y, u], gaussian.num_outputs(z)), gaussian, z)
        self.p_x = conditional("p_x", default_decoder([y, z], x, p_x.num_outputs(x)), p_x, x)
        if networks:
            raise ValueError(f"networks names {sorted(networks)}; the conditionals are q_u, q_z, p_y, p_z and p_x")

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            u = pyro.sample("u", self.prior())
            y = pyro.sample("y", self.p_y(u))
            z = pyro.sample("z", self.p_z(y, u))
            pyro.sample("x", self.p_x(y, z), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            q_y = self.q_y(x)
            if self.transition == "gaussian":
                y = pyro.sample("y", q_y)
                pyro.sample("u", self.q_u(y))
            else:
                # y is a point mass, known before u: TraceMeanField_ELBO needs the model's order, and the encoder of u
                # runs on B data instead of K × B.
                pyro.sample("u", self.q_u(q_y.v))
                pyro.sample("y", q_y)
            pyro.sample("z", self.q_z(x))

    def q_y(self, x: Tensor) -> dist.Distribution:
        """Return q(y | x) of the chosen reading."""
        y = self.down_scale(x)
        return dist.Normal(y, self.s()).to_event(3) if self.transition == "gaussian" else dist.Delta(y, event_dim=3)

    def low_resolution_guide(self, y: Tensor) -> None:
        """Sample u from q(u | y), for super-resolution of a low-resolution image ``y``."""
        with pyro.plate("data", len(y)):
            pyro.sample("u", self.q_u(y))

    def closed_form(self, x: Tensor, *, num_particles: int, mixture_kl: MixtureKL) -> SRVAELoss:
        """Return −ELBO term by term with closed-form KLs; see :func:`pyro_vae.analytic_loss`."""
        q_y = self.q_y(x)
        entropy = torch.zeros((), dtype=x.dtype, device=x.device)
        if self.transition == "gaussian":
            y = q_y.rsample((num_particles,))
            entropy = gaussian_entropy(self.s(), y[0, 0].numel())
        else:
            y = q_y.v
        q_u = self.q_u(y)
        # A point mass y gives q(u | y) a batch (B,), with K draws of u; K draws of y give (K, B), with one u each.
        u = q_u.rsample() if self.transition == "gaussian" else q_u.rsample((num_particles,))
        q_z = self.q_z(x)
        z = q_z.rsample((num_particles,))
        p_z = self.p_z(y, u).base_dist
        kl_u = kl_to_prior(q_u, self.prior(), mixture_kl)
        return SRVAELoss(
            x=reconstruction(self.p_x(y, z), x).mean(0),
            y=reconstruction(self.p_y(u), y).mean(0) - entropy,
            u=kl_u.mean(0) if kl_u.dim() > 1 else kl_u,
            z=kl_diagonal(q_z.base_dist.loc, q_z.base_dist.scale, p_z.loc, p_z.scale).mean(0),
        )


def _low_resolution(x_shape: tuple[int, ...], scale: int) -> tuple[int, int, int]:
    if len(x_shape) != 3:
        raise ValueError(f"x_shape is {x_shape}; SRVAE models images (channels, height, width)")
    channels, height, width = x_shape
    if scale < 2 or height % scale or width % scale:
        raise ValueError(
            f"scale is {scale}, the image {height} × {width}: choose a scale of at least 2 that divides both"
        )
    return channels, height // scale, width // scale
