"""A linear Gaussian two-stage model with its exact posterior.

    c ~ w,   u ~ N(μ_c, diag σ_c²),   y ~ N(W_y u + b_y, γ₂² I)
    z ~ N(B y + C u + c₀, diag s²),   x ~ N(W_x z + V y + b_x, γ₁² I)
    q(c, u, y, z | x) = δ(y − d(x)) p(c, u, z | x, y)

Every log-weight is log p(x, y = d(x)): use it as the oracle of a likelihood estimator.
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_vae.conditionals.priors import MixtureOfGaussians
from pyro_vae.conditionals.scales import LearnedScale
from pyro_vae.distributions.linear_gaussian import condition_gaussian, mixture_log_likelihood
from pyro_vae.models.linear_gaussian_mixture import given_component
from pyro_vae.pair.pair import Pair

__all__ = ["LinearTwoStageVAE"]


class LinearTwoStageVAE(Pair):
    """Pair the affine two-stage model and a mixture prior with the exact posterior over (c, u, z).

    y = d(x) averages blocks of ``factor`` entries. It is a point mass in the guide: log-weights are log p(x, y = d(x)).

    Args:
        x_size: size of x, a multiple of ``factor``.
        factor: entries of x per entry of y.
        prior: mixture p(u).
        z_size: size of z.
        x_scale, y_scale, z_scale: initial γ₁, γ₂ and s.

    Raises:
        ValueError: for an ``x_size`` that is no multiple of ``factor``.

    >>> import pyro_vae as pv
    >>> pair, x = LinearTwoStageVAE(6, 2, pv.MixtureOfGaussians(3, 2), z_size=2), torch.randn(4, 6)
    >>> weights = pv.log_terms(pair, x, num_particles=2).log_weights
    >>> bool(torch.allclose(weights, pair.exact_log_likelihood(x), rtol=1e-3))
    True
    """

    def __init__(
        self,
        x_size: int,
        factor: int,
        prior: MixtureOfGaussians,
        z_size: int,
        x_scale: float = 0.5,
        y_scale: float = 0.5,
        z_scale: float = 0.5,
    ) -> None:
        super().__init__()
        if x_size % factor:
            raise ValueError(f"factor is {factor}, which does not divide x_size, {x_size}")
        self.x_shape, self.factor, self.prior = (x_size,), factor, prior
        y_size, u_size = x_size // factor, prior.size
        self.y_of_u = nn.Linear(u_size, y_size)
        self.z_of_y = nn.Linear(y_size, z_size)
        self.z_of_u = nn.Linear(u_size, z_size, bias=False)
        self.x_of_z = nn.Linear(z_size, x_size)
        self.x_of_y = nn.Linear(y_size, x_size, bias=False)
        self.x_scale, self.y_scale = LearnedScale(x_scale), LearnedScale(y_scale)
        self.z_scale = LearnedScale(z_scale, (z_size,))

    def down_scale(self, x: Tensor) -> Tensor:
        """Return d(x), block means, (…, D / factor)."""
        return x.unflatten(-1, (-1, self.factor)).mean(-1)

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(logits=self.prior.logits))
            u = pyro.sample("u", given_component(self.prior, c))
            y = pyro.sample("y", dist.Normal(self.y_of_u(u), self.y_scale()).to_event(1))
            z = pyro.sample("z", dist.Normal(self.z_of_y(y) + self.z_of_u(u), self.z_scale()).to_event(1))
            pyro.sample("x", dist.Normal(self.x_of_z(z) + self.x_of_y(y), self.x_scale()).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        log_marginals, posteriors = self.exact_components(x)
        size = self.prior.size
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(logits=self.prior.logits.log_softmax(-1) + log_marginals))
            rows = torch.arange(len(x), device=x.device)
            mean, factor = posteriors.loc[rows, c], posteriors.scale_tril[rows, c]
            # (u, z) = mean + factor ε. The factor is lower triangular: its blocks give u, and z given u.
            u_factor, z_factor, mixed = factor[..., :size, :size], factor[..., size:, size:], factor[..., size:, :size]
            u = pyro.sample("u", dist.MultivariateNormal(mean[..., :size], scale_tril=u_factor))
            pyro.sample("y", dist.Delta(self.down_scale(x), event_dim=1))
            noise = torch.linalg.solve_triangular(u_factor, (u - mean[..., :size]).unsqueeze(-1), upper=False)
            z_mean = mean[..., size:] + (mixed @ noise).squeeze(-1)
            pyro.sample("z", dist.MultivariateNormal(z_mean, scale_tril=z_factor))

    def exact_components(self, x: Tensor) -> tuple[Tensor, dist.MultivariateNormal]:
        """Return log p(x, y | c), (B, C), and p(u, z | x, y, c), batch (B, C), event (L_u + L_z,)."""
        y = self.down_scale(x).unsqueeze(-2)
        means, scales = self.prior.means, self.prior.log_scales.exp()
        mean = torch.cat([means.expand(len(x), -1, -1), self.z_of_y(y) + self.z_of_u(means)], -1)
        # (u, z) given y is mean + factor ε: u = μ + diag(σ) ε_u, z = B y + C u + c₀ + diag(s) ε_z.
        u_factor = torch.diag_embed(scales)
        top = torch.cat([u_factor, scales.new_zeros(*scales.shape, len(self.z_scale()))], -1)
        z_scale = torch.diag_embed(self.z_scale()).expand(len(scales), -1, -1)
        factor = torch.cat([top, torch.cat([self.z_of_u.weight @ u_factor, z_scale], -1)], -2)
        weight = torch.block_diag(self.y_of_u.weight, self.x_of_z.weight)
        observed = torch.cat([y - self.y_of_u.bias, x.unsqueeze(-2) - self.x_of_y(y) - self.x_of_z.bias], -1)
        noise = torch.cat([self.y_scale().expand(y.shape[-1]), self.x_scale().expand(x.shape[-1])])
        return condition_gaussian(mean, factor, weight, noise, observed)

    def exact_log_likelihood(self, x: Tensor) -> Tensor:
        """Return log p(x, y = d(x)), (B,), in nats."""
        return mixture_log_likelihood(self.prior.logits, self.exact_components(x)[0])
