"""Linear-Gaussian pairs with the exact posterior as guide: every log-weight is log p(x), for every draw.

    LinearGaussianVAE          z ~ N(0, I),  x ~ N(W z + b, γ² I)                       probabilistic PCA
    LinearGaussianMixtureVAE   c ~ w,  z ~ N(μ_c, diag σ_c²),  x ~ N(W z + b, γ² I)
    LinearTwoStageVAE          c ~ w,  u ~ N(μ_c, diag σ_c²),  y ~ N(W_y u + b_y, γ₂² I),
                               z ~ N(B y + C u + c₀, diag s²),  x ~ N(W_x z + V y + b_x, γ₁² I),  y = d(x)

They are the oracle for everything that estimates a likelihood. The mixtures carry their component as a site, since
their exact posterior is a mixture of full-covariance Gaussians, outside any one Gaussian guide.

Reference: Tipping and Bishop (1999), Probabilistic principal component analysis, JRSS B 61.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_vae.conditionals import MixtureOfGaussians
from pyro_vae.exact import (
    condition_gaussian,
    linear_gaussian_log_likelihood,
    linear_gaussian_posterior,
    mixture_log_likelihood,
)
from pyro_vae.pair import Pair
from pyro_vae.scales import LearnedScale

__all__ = ["LatentMoments", "LinearGaussianMixtureVAE", "LinearGaussianVAE", "LinearTwoStageVAE"]


class LatentMoments(NamedTuple):
    """What a posterior over z comes down to here: ``mean`` (B, L) and ``covariance`` (B, L, L)."""

    mean: Tensor
    covariance: Tensor


class LinearGaussianVAE(Pair):
    """Pair probabilistic PCA with its exact posterior.

    Args:
        x_size: D.
        latent_size: L.
        scale: γ at the start.

    >>> import pyro_vae as pv
    >>> pair, x = LinearGaussianVAE(5, 2), torch.randn(3, 5)
    >>> weights = pv.log_terms(pair, x, num_particles=4).log_weights
    >>> bool(torch.allclose(weights, pair.exact_log_likelihood(x), rtol=1e-4))
    True
    """

    def __init__(self, x_size: int, latent_size: int, scale: float = 0.5) -> None:
        super().__init__()
        self.x_shape = (x_size,)
        self.weight = nn.Parameter(torch.randn(x_size, latent_size) / latent_size**0.5)
        self.bias = nn.Parameter(torch.zeros(x_size))
        self.scale = LearnedScale(scale)

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            zero = torch.zeros_like(self.weight[0])
            z = pyro.sample("z", dist.Normal(zero, torch.ones_like(zero)).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.weight.mT + self.bias, self.scale()).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.exact_posterior(x))

    def exact_log_likelihood(self, x: Tensor) -> Tensor:
        """Return log p(x), (B,), in nats."""
        return linear_gaussian_log_likelihood(x, self.weight, self.bias, self.scale())

    def exact_posterior(self, x: Tensor) -> dist.MultivariateNormal:
        """Return p(z | x), batch (B,), event (L,)."""
        return linear_gaussian_posterior(x, self.weight, self.bias, self.scale())

    def e_step(self, x: Tensor) -> LatentMoments:
        """Return the posterior's moments: a Gaussian is no more than these."""
        posterior = self.exact_posterior(x)
        return LatentMoments(posterior.mean, posterior.covariance_matrix)

    def elbo(self, x: Tensor, q: LatentMoments) -> Tensor:
        """Return the ELBO of the Gaussian with these moments, (B,), in nats."""
        variance, second = self.scale() ** 2, q.covariance + q.mean.unsqueeze(-1) * q.mean.unsqueeze(-2)
        error = ((x - self.bias - q.mean @ self.weight.mT) ** 2).sum(-1)
        error = error + torch.einsum("blm,dl,dm->b", q.covariance, self.weight, self.weight)
        log_lik = -0.5 * (error / variance + x.shape[-1] * torch.log(2 * math.pi * variance))
        # E_q log N(z; 0, I) and the entropy of q: the constants that they share cancel but for L / 2.
        divergence = 0.5 * (second.diagonal(dim1=-2, dim2=-1).sum(-1) - q.mean.shape[-1] - torch.logdet(q.covariance))
        return log_lik - divergence

    @torch.no_grad()
    def m_step(self, x: Tensor, q: LatentMoments) -> None:
        """Set W, b and γ to the regression of x on z under these moments (Rubin and Thayer, 1982, Psychometrika 47)."""
        # b is the coefficient of a constant latent.
        one = torch.ones_like(q.mean[..., :1])
        mean = torch.cat([q.mean, one], -1)
        covariance = torch.nn.functional.pad(q.covariance, (0, 1, 0, 1)).sum(0)
        solution = torch.linalg.solve(mean.mT @ mean + covariance, mean.mT @ x)
        self.weight.copy_(solution[:-1].mT)
        self.bias.copy_(solution[-1])
        error = ((x - mean @ solution) ** 2).sum() + torch.einsum("lm,ld,md->", covariance, solution, solution)
        self.scale.set(torch.sqrt(error / x.numel()))


class LinearGaussianMixtureVAE(Pair):
    """Pair a linear decoder and a mixture-of-Gaussians prior with the exact posterior over (c, z).

    Args:
        x_size: D.
        prior: the mixture; it knows L.
        scale: γ at the start.
    """

    def __init__(self, x_size: int, prior: MixtureOfGaussians, scale: float = 0.5) -> None:
        super().__init__()
        self.x_shape = (x_size,)
        self.prior = prior
        self.weight = nn.Parameter(torch.randn(x_size, prior.size) / prior.size**0.5)
        self.bias = nn.Parameter(torch.zeros(x_size))
        self.scale = LearnedScale(scale)

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(logits=self.prior.logits))
            z = pyro.sample("z", _component(self.prior, c))
            pyro.sample("x", dist.Normal(z @ self.weight.mT + self.bias, self.scale()).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        log_marginals, posteriors = self.exact_components(x)
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(logits=self.prior.logits.log_softmax(-1) + log_marginals))
            rows = torch.arange(len(x), device=x.device)
            factor = posteriors.scale_tril[rows, c]
            pyro.sample("z", dist.MultivariateNormal(posteriors.loc[rows, c], scale_tril=factor))

    def exact_components(self, x: Tensor) -> tuple[Tensor, dist.MultivariateNormal]:
        """Return log p(x | c), (B, C), and p(z | x, c), batch (B, C), event (L,)."""
        noise = self.scale().expand(x.shape[-1])
        factor = torch.diag_embed(self.prior.log_scales.exp())
        return condition_gaussian(self.prior.means, factor, self.weight, noise, (x - self.bias).unsqueeze(-2))

    def exact_log_likelihood(self, x: Tensor) -> Tensor:
        """Return log p(x), (B,), in nats."""
        return mixture_log_likelihood(self.prior.logits, self.exact_components(x)[0])


class LinearTwoStageVAE(Pair):
    """Pair the affine two-stage model and a mixture prior with the exact posterior over (c, u, z).

    y = d(x) averages blocks of ``factor`` entries, with a point mass in the guide: log-weights are log p(x, y = d(x)).

    Args:
        x_size: size of x, a multiple of ``factor``.
        factor: entries of x per entry of y.
        prior: the mixture on u.
        z_size: size of z.
        x_scale, y_scale, z_scale: γ₁, γ₂ and s at the start.

    Raises:
        ValueError: when ``factor`` does not divide ``x_size``.
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
            u = pyro.sample("u", _component(self.prior, c))
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
            # (u, z) = mean + factor ε with a lower-triangular factor: its blocks are u's marginal and z given u.
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
        # (u, z) given y is the factor below times N(0, I): u = diag(σ) ε_u, z = C diag(σ) ε_u + diag(s) ε_z.
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


def _component(prior: MixtureOfGaussians, c: Tensor) -> dist.Distribution:
    return dist.Normal(prior.means[c], prior.log_scales.exp()[c]).to_event(1)
