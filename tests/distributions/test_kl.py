"""Every divergence against quadrature, torch's own, or the inequality it states."""

from __future__ import annotations

import math

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import kl_divergence

import pyro_vae as pv
from pyro_vae.distributions.kl import (
    affine_expected_kl,
    affine_expected_squared_error,
    gaussian_entropy,
    kl_diagonal,
    kl_full,
    kl_standard_normal,
)
from pyro_vae.distributions.mixture_kl import convex_kl_bound, kl_to_prior, monte_carlo_kl, variational_kl_bound
from pyro_vae.distributions.mixtures import GaussianMixture

# Sums of at most a few dozen float64 terms of order one: rounding stays below 1e-13.
ROUNDING = {"rtol": 1e-10, "atol": 1e-12}


def scales(*shape: int) -> Tensor:
    """Return positive numbers around one."""
    return torch.exp(0.5 * torch.randn(*shape))


def lower_factors(*shape: int) -> Tensor:
    """Return lower-triangular matrices (*shape, shape[-1]) with a positive diagonal."""
    factor = torch.randn(*shape, shape[-1]).tril(-1)
    return factor + torch.diag_embed(scales(*shape))


def diagonal(mean: Tensor, scale: Tensor) -> dist.Distribution:
    return dist.Normal(mean, scale).to_event(1)


def random_mixture(components: int, size: int) -> GaussianMixture:
    parts = diagonal(2 * torch.randn(components, size), scales(components, size))
    return GaussianMixture(dist.Categorical(logits=torch.randn(components)), parts)


def hermite_points(size: int, order: int = 6) -> tuple[Tensor, Tensor]:
    """Return the nodes (order^size, size) and weights of N(0, I), exact for polynomials of degree 2·order − 1."""
    nodes, weights = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(order))
    grid = torch.cartesian_prod(*[nodes] * size).reshape(-1, size)
    return grid, torch.cartesian_prod(*[weights / weights.sum()] * size).reshape(-1, size).prod(-1)


def quadrature_kl(q: dist.Distribution, p: dist.Distribution, mean: Tensor, factor: Tensor) -> Tensor:
    """Return E_q[log q − log p] for Gaussians q = N(mean, factor factorᵀ) and p, whose log-ratio is quadratic."""
    nodes, weights = hermite_points(len(mean))
    z = mean + nodes @ factor.mT
    return weights @ (q.log_prob(z) - p.log_prob(z))


def test_standard_normal_and_diagonal_kl_equal_quadrature_and_torch() -> None:
    mean, scale, other_mean, other_scale = torch.randn(3), scales(3), torch.randn(3), scales(3)
    q, p = diagonal(mean, scale), diagonal(other_mean, other_scale)
    factor = torch.diag(scale)
    closed = kl_diagonal(mean, scale, other_mean, other_scale)
    torch.testing.assert_close(closed, quadrature_kl(q, p, mean, factor), **ROUNDING)
    torch.testing.assert_close(closed, kl_divergence(q, p), **ROUNDING)
    standard = diagonal(torch.zeros(3), torch.ones(3))
    torch.testing.assert_close(kl_standard_normal(mean, scale), quadrature_kl(q, standard, mean, factor), **ROUNDING)
    torch.testing.assert_close(kl_standard_normal(mean, scale), kl_divergence(q, standard), **ROUNDING)


def test_divergences_are_zero_at_equality_and_positive_elsewhere() -> None:
    mean, scale, factor = torch.randn(50, 3), scales(50, 3), lower_factors(50, 3)
    torch.testing.assert_close(kl_diagonal(mean, scale, mean, scale), torch.zeros(50), **ROUNDING)
    torch.testing.assert_close(kl_full(mean, factor, mean, factor), torch.zeros(50), **ROUNDING)
    assert (kl_diagonal(mean, scale, mean + 0.1, scale) > 0).all()
    assert (kl_full(mean, factor, mean, 1.1 * factor) > 0).all()
    assert (kl_standard_normal(mean, scale) > 0).all()


def test_full_kl_equals_quadrature_and_torch_with_batches_on_either_side() -> None:
    mean, factor, other_mean, other_factor = torch.randn(3), lower_factors(3), torch.randn(3), lower_factors(3)
    q = dist.MultivariateNormal(mean, scale_tril=factor)
    p = dist.MultivariateNormal(other_mean, scale_tril=other_factor)
    expected = quadrature_kl(q, p, mean, factor)
    torch.testing.assert_close(kl_full(mean, factor, other_mean, other_factor), expected, **ROUNDING)

    means, factors = torch.randn(5, 1, 3), lower_factors(5, 1, 3)
    other_means, other_factors = torch.randn(4, 3), lower_factors(4, 3)
    batch = kl_divergence(
        dist.MultivariateNormal(means, scale_tril=factors).expand((5, 4)),
        dist.MultivariateNormal(other_means, scale_tril=other_factors).expand((5, 4)),
    )
    torch.testing.assert_close(kl_full(means, factors, other_means, other_factors), batch, **ROUNDING)


def test_registered_kl_of_full_to_factorised_equals_the_dense_formula_and_its_gradient() -> None:
    mean, factor = torch.randn(3).requires_grad_(), lower_factors(3).requires_grad_()
    other_mean, other_scale = torch.randn(3).requires_grad_(), scales(3).requires_grad_()
    leaves = (mean, factor, other_mean, other_scale)
    registered = kl_divergence(dist.MultivariateNormal(mean, scale_tril=factor), diagonal(other_mean, other_scale))
    covariance = factor @ factor.mT
    inverse = torch.diag(other_scale**-2)
    shift = other_mean - mean
    dense = 0.5 * (
        torch.trace(inverse @ covariance)
        - 3
        + shift @ inverse @ shift
        + (other_scale**2).log().sum()
        - torch.logdet(covariance)
    )
    torch.testing.assert_close(registered, dense, **ROUNDING)
    found, expected = torch.autograd.grad(registered, leaves), torch.autograd.grad(dense, leaves)
    # The dense formula sees the upper triangle through Σ = L Lᵀ; only the lower one is a parameter.
    for a, b in zip(found, (expected[0], expected[1].tril(), *expected[2:]), strict=True):
        torch.testing.assert_close(a.tril() if a.dim() == 2 else a, b, **ROUNDING)


def test_registry_claims_neither_other_factorised_families_nor_mixtures() -> None:
    full = dist.MultivariateNormal(torch.zeros(2), torch.eye(2))
    factorised = diagonal(torch.zeros(2), torch.ones(2))
    with pytest.raises(NotImplementedError):
        kl_divergence(full, dist.Laplace(torch.zeros(2), torch.ones(2)).to_event(1))
    for q in (full, factorised):
        with pytest.raises(NotImplementedError):
            kl_divergence(q, random_mixture(3, 2))
        with pytest.raises(NotImplementedError):
            kl_divergence(q, pv.MixtureOfGaussians(3, 2)())


def test_entropy_equals_torch() -> None:
    for scale, size in ((0.05, 1), (1.0, 4), (3.0, 7)):
        expected = diagonal(torch.zeros(size), torch.full((size,), scale)).entropy()
        torch.testing.assert_close(gaussian_entropy(torch.tensor(scale), size), expected, **ROUNDING)


def one_dimensional_kl(mean: Tensor, scale: Tensor, mixture: GaussianMixture) -> tuple[Tensor, Tensor]:
    """Return KL(N(mean, scale²) ‖ mixture) by the trapezoid rule over ±12 scales, and a bound on its error.

    The rule errs by at most h²/12 ∫|f''|, here h/12 Σ|second differences|; the tails beyond hold e⁻⁷².
    """
    t = torch.linspace(-12, 12, 20001)
    q = diagonal(mean, scale)
    u = mean + scale * t.unsqueeze(-1)
    log_q = q.log_prob(u)
    integrand = log_q.exp() * scale * (log_q - mixture.log_prob(u))
    step = t[1] - t[0]
    error = step / 12 * integrand.diff(n=2).abs().sum()
    return torch.trapezoid(integrand, t), error + 1e-12


def test_mixture_divergences_are_ordered_in_one_dimension() -> None:
    for case in range(200):
        mixture = random_mixture(1 + case % 5, 1)
        mean, scale = 3 * torch.randn(1), scales(1)
        q = diagonal(mean, scale)
        exact, error = one_dimensional_kl(mean, scale, mixture)
        variational, convex = variational_kl_bound(q, mixture), convex_kl_bound(q, mixture)
        assert error < 1e-4, "the quadrature is too coarse to prove anything"
        assert exact <= variational + error
        assert variational <= convex * (1 + 1e-12) + 1e-12  # rounding: both are equal with one component
        assert exact >= -error


def test_variational_bound_is_strictly_between_for_separated_components() -> None:
    parts = diagonal(torch.tensor([[-3.0], [3.0]]), torch.ones(2, 1))
    mixture = GaussianMixture(dist.Categorical(probs=torch.tensor([0.5, 0.5])), parts)
    mean, scale = torch.tensor([3.0]), torch.ones(1)
    q = diagonal(mean, scale)
    exact, error = one_dimensional_kl(mean, scale, mixture)
    # q sits on one of two distant components: log 2, up to the other's e⁻¹⁸ at q; convexity pays half of 36/2 instead.
    torch.testing.assert_close(variational_kl_bound(q, mixture), torch.tensor(math.log(2)), rtol=0, atol=1e-7)
    torch.testing.assert_close(convex_kl_bound(q, mixture), torch.tensor(9.0), **ROUNDING)
    assert exact + error < variational_kl_bound(q, mixture)


@pytest.mark.parametrize("size", [2, 8, 32])
@pytest.mark.parametrize("covariance", ["diagonal", "full"])
def test_mixture_divergences_are_ordered_in_higher_dimension(size: int, covariance: str) -> None:
    mixture = random_mixture(4, size)
    if covariance == "diagonal":
        q = diagonal(torch.randn(20, size), scales(20, size))
    else:
        q = dist.MultivariateNormal(torch.randn(20, size), scale_tril=lower_factors(20, size) / size**0.5)
    u = q.rsample((4000,))
    ratios = q.log_prob(u) - mixture.log_prob(u)
    standard_error = ratios.std(0) / len(ratios) ** 0.5
    variational, convex = variational_kl_bound(q, mixture), convex_kl_bound(q, mixture)
    assert variational.shape == convex.shape == (20,)
    assert (ratios.mean(0) <= variational + 4 * standard_error).all()
    assert (variational <= convex * (1 + 1e-12)).all()


def test_monte_carlo_kl_is_unbiased() -> None:
    mixture = random_mixture(3, 1)
    mean, scale = torch.randn(1), scales(1)
    exact, error = one_dimensional_kl(mean, scale, mixture)
    groups = torch.stack([monte_carlo_kl(diagonal(mean, scale), mixture, num_particles=100) for _ in range(200)])
    standard_error = groups.std() / len(groups) ** 0.5
    assert (groups.mean() - exact).abs() <= 4 * standard_error + error


def test_one_component_makes_both_bounds_the_divergence() -> None:
    mean, scale, factor = torch.randn(6, 3), scales(6, 3), lower_factors(6, 3)
    other_mean, other_scale = torch.randn(1, 3), scales(1, 3)
    mixture = GaussianMixture(dist.Categorical(logits=torch.zeros(1)), diagonal(other_mean, other_scale))
    closed = kl_diagonal(mean, scale, other_mean, other_scale)
    closed_full = kl_full(mean, factor, other_mean, torch.diag_embed(other_scale))
    full = dist.MultivariateNormal(mean, scale_tril=factor)
    for bound in (variational_kl_bound, convex_kl_bound):
        torch.testing.assert_close(bound(diagonal(mean, scale), mixture), closed, **ROUNDING)
        torch.testing.assert_close(bound(full, mixture), closed_full, **ROUNDING)


def test_equal_components_make_both_bounds_the_divergence() -> None:
    mean, scale, other_mean, other_scale = torch.randn(6, 3), scales(6, 3), torch.randn(3), scales(3)
    parts = diagonal(other_mean.expand(4, 3), other_scale.expand(4, 3))
    mixture = GaussianMixture(dist.Categorical(logits=torch.randn(4)), parts)
    closed = kl_diagonal(mean, scale, other_mean, other_scale)
    for bound in (variational_kl_bound, convex_kl_bound):
        torch.testing.assert_close(bound(diagonal(mean, scale), mixture), closed, **ROUNDING)


def test_divergence_from_a_prior_is_closed_for_gaussians_and_as_chosen_for_mixtures() -> None:
    mean, scale, factor = torch.randn(6, 3), scales(6, 3), lower_factors(6, 3)
    q, full = diagonal(mean, scale), dist.MultivariateNormal(mean, scale_tril=factor)
    prior, mixture = pv.StandardNormal(3)(), random_mixture(4, 3)
    torch.testing.assert_close(kl_to_prior(q, prior, convex_kl_bound), kl_standard_normal(mean, scale), **ROUNDING)
    torch.testing.assert_close(kl_to_prior(full, prior, convex_kl_bound), kl_divergence(full, prior), **ROUNDING)
    for bound in (variational_kl_bound, convex_kl_bound):
        torch.testing.assert_close(kl_to_prior(q, mixture, bound), bound(q, mixture), rtol=0, atol=0)


def test_affine_expected_squared_error_equals_quadrature_and_sampling() -> None:
    x, weight, bias, mean, scale = torch.randn(4, 5), torch.randn(5, 2), torch.randn(5), torch.randn(4, 2), scales(4, 2)
    closed = affine_expected_squared_error(x, weight, bias, mean, scale)

    def squared_error(z: Tensor) -> Tensor:
        return ((x - z @ weight.mT - bias) ** 2).sum(-1)

    nodes, weights = hermite_points(2)
    torch.testing.assert_close(weights @ squared_error(mean + scale * nodes.unsqueeze(1)), closed, **ROUNDING)
    draws = squared_error(mean + scale * torch.randn(10_000, 4, 2))
    assert ((draws.mean(0) - closed).abs() <= 4 * draws.std(0) / 100).all()  # 100 = √10 000


def test_affine_expected_kl_equals_quadrature_and_sampling() -> None:
    weight, shift, other_scale = torch.randn(3, 2), torch.randn(4, 3), scales(3)
    u_mean, u_scale, z_mean, z_scale = torch.randn(4, 2), scales(4, 2), torch.randn(4, 3), scales(4, 3)

    def divergence(u: Tensor) -> Tensor:
        return kl_diagonal(z_mean, z_scale, shift + u @ weight.mT, other_scale)

    closed = affine_expected_kl(divergence(u_mean), weight, u_scale, other_scale)
    nodes, weights = hermite_points(2)
    torch.testing.assert_close(weights @ divergence(u_mean + u_scale * nodes.unsqueeze(1)), closed, **ROUNDING)
    draws = divergence(u_mean + u_scale * torch.randn(10_000, 4, 2))
    assert ((draws.mean(0) - closed).abs() <= 4 * draws.std(0) / 100).all()  # 100 = √10 000
