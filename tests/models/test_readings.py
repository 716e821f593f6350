"""What each reading of q(y | x) bounds, on models whose log p(x) is known."""

from __future__ import annotations

import math

import pyro.distributions as dist
import torch
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.conditionals.posteriors import SMALLEST_GUIDE_SCALE
from pyro_vae.models import SRVAE
from pyro_vae.networks.mlp import flatten_inputs
from pyro_vae.objectives.bounds import elbo, iwae

NOISE = 0.1
# Orthonormal columns, orthogonal to (1, 1, 1, 1): what a 2 × 2 image is besides its mean.
CONTRASTS = torch.tensor([[1.0, 1, -1, -1], [1, -1, 1, -1], [1, -1, -1, 1]], dtype=torch.float64).mT / 2
ROUNDING = {"rtol": 1e-10, "atol": 1e-10}


class Affine(nn.Module):
    """Return weight · (inputs), and raw scales that do not depend on them where a scale is given."""

    def __init__(self, shapes: list[tuple[int, ...]], weight: Tensor, scale: Tensor | None = None) -> None:
        super().__init__()
        self.shapes, self.weight, self.scale = shapes, weight, scale

    def forward(self, *inputs: Tensor) -> Tensor:
        mean = flatten_inputs(inputs, self.shapes) @ self.weight.mT
        if self.scale is None:
            return mean
        # The inverse of what the head does: softplus(raw) + its smallest scale.
        raw = torch.log(torch.expm1(self.scale - SMALLEST_GUIDE_SCALE))
        return torch.cat([mean, raw.expand_as(mean)], -1)


class Multiple(nn.Module):
    """Express the down-scaled image in another unit: y is ``factor`` times the mean."""

    def __init__(self, down_scale: nn.Module, factor: float) -> None:
        super().__init__()
        self.down_scale, self.factor = down_scale, factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * self.down_scale(x)


def white_noise_srvae(transition: str, factor: float = 1.0) -> SRVAE:
    """Return a two-stage pair on 2 × 2 images whose p(x) is N(0, I₄) exactly, y/factor being their mean.

    u ~ N(0, 1),  y/factor = h u + h ε ~ N(0, 2h²),  z ~ N(0, t² I₃),  x = 1 y/factor + Q z + γ₁ ε

    with Q the contrasts, 2h² = (1 − γ₁²)/4 and t² = 1 − γ₁². Given x, z is independent of
    (y, u), and u of x given y, so that the guide's factors are the exact conditionals.
    """
    half, t = math.sqrt((1 - NOISE**2) / 8), math.sqrt(1 - NOISE**2)
    x, y, u, z = (1, 2, 2), (1, 1, 1), (1,), (3,)
    networks = {
        "q_u": Affine([y], torch.tensor([[1 / (2 * half * factor)]]), torch.tensor([math.sqrt(0.5)])),
        "q_z": Affine([x], t**2 * CONTRASTS.mT, torch.full(z, t * NOISE)),
        "p_y": Affine([u], torch.tensor([[factor * half]])),
        "p_z": Affine([y, u], torch.zeros(3, 2), torch.full(z, t)),
        "p_x": Affine([y, z], torch.cat([torch.full((4, 1), 1 / factor), CONTRASTS], 1)),
    }
    heads = pv.Gaussian(pv.FixedScale(NOISE)), pv.Gaussian(pv.FixedScale(factor * half))
    pair = SRVAE(x, 2, pv.StandardNormal(1), transition, *heads, z_size=3, networks=networks)
    pair.down_scale = Multiple(pair.down_scale, factor)
    return pair.requires_grad_(False)


def test_point_mass_on_a_continuous_y_gives_the_joint_density_above_that_of_x() -> None:
    x = torch.randn(200, 1, 2, 2)
    log_p = dist.Normal(0.0, 1.0).log_prob(x).sum((1, 2, 3))
    bounds = {}
    for factor in (1.0, 0.1, 0.01):
        weights = pv.log_terms(white_noise_srvae("delta", factor), x, num_particles=20).log_weights
        # The guide is exact: every draw gives the same number, log p(x, d(x)).
        torch.testing.assert_close(weights, weights[:1].expand(20, 200), **ROUNDING)
        bounds[factor] = weights[0]
    y_given_x = NOISE * math.sqrt((1 - NOISE**2) / 4)
    joint = log_p + dist.Normal(x.mean((1, 2, 3)) * (1 - NOISE**2), y_given_x).log_prob(x.mean((1, 2, 3)))
    torch.testing.assert_close(bounds[1.0], joint, **ROUNDING)
    assert (bounds[1.0] > log_p + 1.5).all(), "as a bound on log p(x) it is false at every datum"
    # The same model with y in other units: p(x) is what it was, the "bound" grows without limit.
    torch.testing.assert_close(bounds[0.1], bounds[1.0] + math.log(10), **ROUNDING)
    torch.testing.assert_close(bounds[0.01], bounds[1.0] + 2 * math.log(10), **ROUNDING)


def test_gaussian_reading_bounds_and_estimates_log_p_of_x() -> None:
    x = torch.randn(20, 1, 2, 2)
    log_p = dist.Normal(0.0, 1.0).log_prob(x).sum((1, 2, 3))
    terms = pv.log_terms(white_noise_srvae("gaussian"), x, num_particles=4000)
    error = terms.log_weights.std(0) / math.sqrt(4000)
    assert (elbo(terms) <= log_p + 4 * error).all()
    # The weights themselves average to p(x): delta-method standard error of the log of their mean.
    ratio = torch.softmax(terms.log_weights, 0) * 4000
    assert ((iwae(terms) - log_p).abs() <= 4 * ratio.std(0) / math.sqrt(4000)).all()


def discretised_srvae(levels: int) -> SRVAE:
    """Return a pair with y on gray levels and x given y Gaussian: N(1 y, t² Q Qᵀ + γ₁² I), t = 0.3."""
    x, y, u, z = (1, 2, 2), (1, 1, 1), (1,), (3,)
    shrink = 0.3**2 / (0.3**2 + NOISE**2)
    networks = {
        "q_u": Affine([y], torch.tensor([[0.2]]), torch.ones(1)),
        "q_z": Affine([x], shrink * CONTRASTS.mT, torch.full(z, math.sqrt(shrink) * NOISE)),
        "p_y": Affine([u], torch.tensor([[0.2], [0.5]])),
        "p_z": Affine([y, u], torch.zeros(3, 2), torch.full(z, 0.3)),
        "p_x": Affine([y, z], torch.cat([torch.ones(4, 1), CONTRASTS], 1)),
    }
    likelihood = pv.Gaussian(pv.FixedScale(NOISE))
    pair = SRVAE(x, 2, pv.StandardNormal(1), "discretised", likelihood, levels=levels, z_size=3, networks=networks)
    return pair.requires_grad_(False)


def test_discretised_reading_is_one_term_of_the_sum_that_is_p_of_x() -> None:
    pair, x = discretised_srvae(17), torch.rand(20, 1, 2, 2)
    u, step = torch.linspace(-10, 10, 2001), 0.01
    levels = torch.arange(17) / 16
    # p(y) by the trapezoid rule over u, p(x | y) in closed form, p(x) by adding the levels up.
    mass = pair.p_y(u.reshape(-1, 1, 1)).log_prob(levels.reshape(17, 1, 1, 1)).exp().squeeze(-1)
    p_y = dist.Normal(0.0, 1.0).log_prob(u).exp() @ mass * step
    torch.testing.assert_close(p_y.sum(), torch.tensor(1.0), **ROUNDING)
    covariance = 0.3**2 * CONTRASTS @ CONTRASTS.mT + NOISE**2 * torch.eye(4)
    x_given_y = dist.MultivariateNormal(levels.unsqueeze(-1).expand(17, 4), covariance)
    joint = p_y.log() + x_given_y.log_prob(x.reshape(20, 1, 4))
    own = (pair.down_scale(x).flatten() * 16).round().long()
    at_own_level = joint[torch.arange(20), own]
    terms = pv.log_terms(pair, x, num_particles=4000)
    ratio = torch.softmax(terms.log_weights, 0) * 4000
    assert ((iwae(terms) - at_own_level).abs() <= 4 * ratio.std(0) / math.sqrt(4000)).all()
    assert (at_own_level < torch.logsumexp(joint, -1)).all()
    error = terms.log_weights.std(0) / math.sqrt(4000)
    assert (elbo(terms) <= at_own_level + 4 * error).all()


def test_each_reading_is_reported_under_its_own_name() -> None:
    x = torch.rand(3, 1, 2, 2)
    pairs = {
        "log p(x, y)": white_noise_srvae("delta"),
        "log p(x)": white_noise_srvae("gaussian"),
        "lower bound on log p(x)": discretised_srvae(17),
    }
    for quantity, pair in pairs.items():
        assert pv.log_likelihood(pair, x, num_particles=2, seed=0).quantity == quantity
