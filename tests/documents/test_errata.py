"""Each misprint of the source documents: the printed form fails, the corrected form holds.

``docs/mathematics.md`` lists them all; every test is named by document and equation. Expectations under a Gaussian are
taken by the trapezoid rule on a grid, which for smooth integrands that have died out at both ends errs by less than
rounding, or by Gauss–Hermite nodes, exact for polynomials.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus

import pyro_vae as pv
from pyro_vae.conditionals.posteriors import SMALLEST_GUIDE_SCALE
from pyro_vae.distributions.kl import (
    affine_expected_kl,
    affine_expected_squared_error,
    kl_diagonal,
    kl_full,
    kl_standard_normal,
)
from pyro_vae.likelihood.importance import naive_log_likelihood
from pyro_vae.models import VAE, LinearGaussianVAE, LinearTwoStageVAE
from pyro_vae.networks.mlp import MLP
from pyro_vae.objectives.bounds import elbo
from pyro_vae.objectives.reconstruction import (
    documents_mse_reconstruction,
    gaussian_reconstruction,
    mse_reconstruction,
    optimal_scale_reconstruction,
    reconstruction,
)

LOG_2PI = math.log(2 * math.pi)
# A few thousand float64 terms of order one.
ROUNDING = {"rtol": 1e-10, "atol": 1e-10}


def line(half_width: float = 12.0, points: int = 4001) -> tuple[Tensor, Tensor]:
    """Return a grid on the line and its step."""
    grid = torch.linspace(-half_width, half_width, points)
    return grid, grid[1] - grid[0]


def hermite(order: int = 8) -> tuple[Tensor, Tensor]:
    """Return nodes and weights of N(0, 1), exact for polynomials of degree 2·order − 1."""
    nodes, weights = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(order))
    return nodes, weights / weights.sum()


def small_linear_pair() -> tuple[LinearGaussianVAE, Tensor]:
    """Return a linear-Gaussian pair with one latent, D = 3, and four data."""
    pair = LinearGaussianVAE(3, 1, scale=0.7).requires_grad_(False)
    pair.weight.copy_(torch.tensor([[1.0], [-0.7], [0.4]]))
    pair.bias.copy_(torch.tensor([0.3, -0.2, 0.1]))
    return pair, torch.tensor([[1.5, -1.0, 0.6], [-1.0, 1.0, -0.5], [0.5, -2.0, 1.0], [-2.0, 0.3, 0.2]])


def exact_elbo(pair: LinearGaussianVAE, x: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """Return the ELBO of a diagonal guide N(mean, diag scale²), without sampling."""
    gamma, size = pair.scale(), x.shape[-1]
    squares = affine_expected_squared_error(x, pair.weight, pair.bias, mean, scale)
    return -squares / (2 * gamma**2) - size * (gamma.log() + LOG_2PI / 2) - kl_standard_normal(mean, scale)


def test_000_before_eq3_normaliser_is_the_root_of_the_determinant() -> None:
    scale, size = 0.7, 2
    grid, step = line(8.0, 401)
    x = torch.cartesian_prod(grid, grid)
    exponent = (x**2).sum(-1) / (2 * scale**2)
    printed = exponent + math.log((2 * math.pi) ** (size / 2) * scale ** (2 * size))
    mass = torch.exp(-printed).sum() * step**2
    torch.testing.assert_close(mass, torch.tensor(scale**-size), **ROUNDING)  # γ^{-k}, not 1
    corrected = torch.exp(-gaussian_reconstruction(x, torch.zeros(2), scale)).sum() * step**2
    torch.testing.assert_close(corrected, torch.tensor(1.0), **ROUNDING)


def test_000_eq4_needs_the_expectation_under_the_guide() -> None:
    pair, x = small_linear_pair()
    posterior = pair.exact_posterior(x)
    mean, scale = posterior.mean, posterior.covariance_matrix.diagonal(dim1=-2, dim2=-1).sqrt()
    log_p = pair.exact_log_likelihood(x)
    # The guide is the posterior, so that −ELBO is −log p(x) exactly.
    torch.testing.assert_close(exact_elbo(pair, x, mean, scale), log_p, **ROUNDING)
    x_hat = mean @ pair.weight.mT + pair.bias
    printed = gaussian_reconstruction(x, x_hat, pair.scale()) + kl_standard_normal(mean, scale)
    missing = ((pair.weight * scale.unsqueeze(-2)) ** 2).sum((-2, -1)) / (2 * pair.scale() ** 2)
    torch.testing.assert_close(-printed, log_p + missing, **ROUNDING)
    assert (-printed > log_p).all(), "as printed, at the guide's mean, the lower bound exceeds what it bounds"


def test_000_eq15_last_divergence_needs_the_expectation_over_u() -> None:
    weight, shift, other_scale = torch.randn(3, 1), torch.randn(3), torch.rand(3) + 0.5
    u_mean, u_scale = torch.tensor([0.4]), torch.tensor([0.8])
    z_mean, z_scale = torch.randn(3), torch.rand(3) + 0.5
    nodes, weights = hermite()
    u = u_mean + u_scale * nodes.unsqueeze(-1)
    exact = weights @ kl_diagonal(z_mean, z_scale, shift + u @ weight.mT, other_scale)
    printed = kl_diagonal(z_mean, z_scale, shift + u_mean @ weight.mT, other_scale)
    torch.testing.assert_close(affine_expected_kl(printed, weight, u_scale, other_scale), exact, **ROUNDING)
    assert printed < exact - 1e-3, "at one u the divergence misses the spread of u"


def test_000_eq17_to_eq19_have_one_dimension_and_scale_per_likelihood() -> None:
    x, x_hat, y, y_hat = torch.randn(8), torch.randn(8), torch.randn(2), torch.randn(2)
    x_scale, y_scale = torch.tensor(0.6), torch.tensor(0.3)

    def printed(size: int, y_scale: Tensor) -> Tensor:
        squares = ((x - x_hat) ** 2).sum() / (2 * x_scale**2) + ((y - y_hat) ** 2).sum() / (2 * y_scale**2)
        return squares + size * (x_scale.log() + y_scale.log())

    exact = -dist.Normal(x_hat, x_scale).log_prob(x).sum() - dist.Normal(y_hat, y_scale).log_prob(y).sum()
    exact = exact - (8 + 2) / 2 * LOG_2PI
    options = {"include_constant": False}
    corrected = gaussian_reconstruction(x, x_hat, x_scale, **options)
    corrected = corrected + gaussian_reconstruction(y, y_hat, y_scale, **options)
    torch.testing.assert_close(corrected, exact, **ROUNDING)
    for size in (2, 8, 10):
        assert (printed(size, y_scale) - exact).abs() > 1, "no single k serves both likelihoods"
    # With k = k_x the best γ₂² comes out as a quarter of the mean squared error of y.
    best = ((y - y_hat) ** 2).mean().sqrt()
    for scale, loss in ((best / 2, lambda s: printed(8, s)), (best, lambda s: gaussian_reconstruction(y, y_hat, s))):
        leaf = scale.clone().requires_grad_()
        (slope,) = torch.autograd.grad(loss(leaf), leaf)
        torch.testing.assert_close(slope, torch.tensor(0.0), rtol=0, atol=1e-10)  # terms k/γ cancel: rounding


def test_000_eq20_squares_the_residual() -> None:
    x, x_hat = torch.tensor([1.0, -1.0]), torch.zeros(2)
    reference = -dist.Normal(x_hat, 1.0).log_prob(x).sum() - LOG_2PI
    # At γ = 1 the other misprint, γ for γ², is silent.
    torch.testing.assert_close(mse_reconstruction(x, x_hat, 1.0), reference, **ROUNDING)
    assert documents_mse_reconstruction(x, x_hat, 1.0) == 0, "residuals of opposite sign cancel"
    assert documents_mse_reconstruction(x, x_hat + 1e6, 1.0) < -1e5, "and the loss is unbounded below"
    assert mse_reconstruction(x, x_hat + 1e6, 1.0) > 1e5


def test_000_eq21_divides_by_the_variance() -> None:
    x, x_hat = torch.randn(5), torch.randn(5)
    mse, scale = ((x - x_hat) ** 2).mean(), torch.tensor(0.3)
    reference = -dist.Normal(x_hat, scale).log_prob(x).sum() - 5 / 2 * LOG_2PI
    printed = 5 * scale.log() + 5 / (2 * scale) * mse
    torch.testing.assert_close(mse_reconstruction(x, x_hat, scale), reference, **ROUNDING)
    assert (printed - reference).abs() > 1
    assert (documents_mse_reconstruction(x, x_hat, scale) - reference).abs() > 1
    # The optimum shows the units: γ² = MSE is a variance; as printed γ = MSE / 2, a length equal to an area.
    grid = torch.linspace(0.05, 5, 4951)
    corrected_at = grid[torch.stack([mse_reconstruction(x, x_hat, g) for g in grid]).argmin()]
    printed_at = grid[(5 * grid.log() + 5 / (2 * grid) * mse).argmin()]
    half_step = 0.5001e-3  # the grid's step is 1e-3
    assert (corrected_at - mse.sqrt()).abs() <= half_step
    assert (printed_at - mse / 2).abs() <= half_step
    best = mse_reconstruction(x, x_hat, mse.sqrt()) + 5 / 2 * LOG_2PI
    torch.testing.assert_close(best, optimal_scale_reconstruction(mse, 5), **ROUNDING)


def test_000_eq21_keeps_the_expectations() -> None:
    x, weight, bias, mean, scale = torch.randn(5), torch.randn(5, 1), torch.randn(5), torch.randn(1), torch.rand(1)
    nodes, weights = hermite()
    x_hat = (mean + scale * nodes.unsqueeze(-1)) @ weight.mT + bias
    exact = weights @ mse_reconstruction(x, x_hat, 0.3)
    squares = affine_expected_squared_error(x, weight, bias, mean, scale)
    torch.testing.assert_close(5 * math.log(0.3) + squares / (2 * 0.3**2), exact, **ROUNDING)
    assert mse_reconstruction(x, mean @ weight.mT + bias, 0.3) < exact - 1e-3


def test_000_eq10_to_eq21_bound_the_joint_density_not_that_of_x() -> None:
    x = torch.randn(4, 6)

    def two_stages(factor: float) -> LinearTwoStageVAE:
        """Return one and the same p(x) with y measured in units 1/factor: every entry of y is factor times larger."""
        torch.manual_seed(5)
        pair = LinearTwoStageVAE(6, 2, pv.MixtureOfGaussians(2, 2), z_size=2, x_scale=0.5).requires_grad_(False)
        for parameter in (pair.y_of_u.weight, pair.y_of_u.bias):
            parameter.mul_(factor)
        for parameter in (pair.z_of_y.weight, pair.x_of_y.weight):
            parameter.div_(factor)
        pair.y_scale = pv.FixedScale(0.5 * factor)
        pair.down_scale = lambda x: factor * LinearTwoStageVAE.down_scale(pair, x)
        return pair

    bounds = {c: elbo(pv.log_terms(two_stages(c), x, num_particles=3)) for c in (1.0, 0.1, 1e-12)}
    torch.testing.assert_close(bounds[1.0], two_stages(1.0).exact_log_likelihood(x), **ROUNDING)
    # The unit of y enters, three entries each time, and p(x) does not depend on it.
    torch.testing.assert_close(bounds[0.1], bounds[1.0] + 3 * math.log(10), **ROUNDING)
    # p(x) averages Gaussian densities of scale 0.5, none of which exceeds (2π 0.5²)^{-6/2}.
    assert (bounds[1e-12] > -6 / 2 * math.log(2 * math.pi * 0.5**2)).all(), "no bound on log p(x) is so large"


def test_001_elbo_chain_divides_by_the_posterior_and_takes_logs() -> None:
    pair, x = small_linear_pair()
    posterior, log_p = pair.exact_posterior(x), pair.exact_log_likelihood(x)
    mean, scale = torch.tensor([0.3]), torch.tensor([0.8])
    nodes, weights = hermite()
    z = mean + scale * nodes.unsqueeze(-1)
    log_q, log_prior = dist.Normal(mean, scale).log_prob(z), dist.Normal(0.0, 1.0).log_prob(z)
    likelihood = dist.Normal((z @ pair.weight.mT + pair.bias).unsqueeze(1), pair.scale()).to_event(1)
    log_joint = likelihood.log_prob(x) + log_prior
    log_posterior = posterior.log_prob(z.unsqueeze(1))
    # log p(x) = E_q log p(x, z)/p(z|x), whatever q; with p(x|z) below the line it is E_q log p(z), no function of x.
    torch.testing.assert_close(weights @ (log_joint - log_posterior), log_p, **ROUNDING)
    printed = weights @ (log_joint - likelihood.log_prob(x))
    torch.testing.assert_close(printed, (weights @ log_prior).expand(4), **ROUNDING)
    assert ((printed - log_p).abs() > 0.1).all()
    gap = kl_full(mean, torch.diag(scale), posterior.loc, posterior.scale_tril)
    torch.testing.assert_close(weights @ (log_joint - log_q), exact_elbo(pair, x, mean, scale), **ROUNDING)
    torch.testing.assert_close(exact_elbo(pair, x, mean, scale) + gap, log_p, **ROUNDING)
    without_logs = weights @ (log_joint.exp() - log_q.exp())
    assert ((without_logs + gap - log_p).abs() > 0.1).all()


def test_001_bound_is_attained_so_the_inequality_is_not_strict() -> None:
    pair, x = small_linear_pair()
    log_p, posterior = pair.exact_log_likelihood(x), pair.exact_posterior(x)
    # With the posterior as guide the ELBO is log p(x): "log p > L" is false.
    torch.testing.assert_close(elbo(pv.log_terms(pair, x, num_particles=5)), log_p, **ROUNDING)
    scale = posterior.covariance_matrix.diagonal(dim1=-2, dim2=-1).sqrt()
    torch.testing.assert_close(exact_elbo(pair, x, posterior.mean, scale), log_p, **ROUNDING)
    for factor in (0.5, 0.9, 1.1, 2.0):
        assert (exact_elbo(pair, x, posterior.mean, factor * scale) < log_p).all()
        assert (exact_elbo(pair, x, posterior.mean + factor, scale) < log_p).all()


def test_001_vgae_multiplies_over_unordered_pairs() -> None:
    z = torch.full((3, 1), 0.9)
    logits = z @ z.mT
    edges = [(0, 1), (0, 2), (1, 2)]
    printed, corrected = torch.tensor(0.0), torch.tensor(0.0)
    for loops in itertools.product((0.0, 1.0), repeat=3):
        for present in itertools.product((0.0, 1.0), repeat=3):
            a = torch.diag(torch.tensor(loops))
            for (i, j), edge in zip(edges, present, strict=True):
                a[i, j] = a[j, i] = edge
            printed = printed + torch.exp(-reconstruction(dist.Bernoulli(logits=logits).to_event(2), a))
    rows, columns = torch.tensor(edges).unbind(1)
    above_diagonal = dist.Bernoulli(logits=logits[rows, columns]).to_event(1)
    for present in itertools.product((0.0, 1.0), repeat=3):
        corrected = corrected + torch.exp(-reconstruction(above_diagonal, torch.tensor(present)))
    # Each edge counted twice, p² + (1 − p)² for each of three, even with every choice of self-loops allowed.
    p = torch.sigmoid(torch.tensor(0.81))
    torch.testing.assert_close(printed, (p**2 + (1 - p) ** 2) ** 3, **ROUNDING)
    assert round(float(printed), 2) == 0.19
    torch.testing.assert_close(corrected, torch.tensor(1.0), **ROUNDING)


def test_002_section1_and_eq10_covariance_is_the_square_of_the_scale() -> None:
    scale, mean = 0.6, 0.4
    grid, step = line()
    x = grid.unsqueeze(-1)
    density = torch.exp(-gaussian_reconstruction(x, torch.tensor([mean]), scale))
    # The density that (10) writes out, with σ_j² below the residual and σ_j in front.
    written_out = torch.exp(-((grid - mean) ** 2) / (2 * scale**2)) / (math.sqrt(2 * math.pi) * scale)
    torch.testing.assert_close(density, written_out, **ROUNDING)
    variance = ((grid - mean) ** 2 * density).sum() * step
    torch.testing.assert_close(variance, torch.tensor(scale**2), **ROUNDING)  # σ² I, diag(σ²); not σ I, diag(σ)
    # The divergence (16) is that of variance σ², and not that of variance σ.
    nodes, weights = hermite()
    closed = kl_standard_normal(torch.tensor([mean]), torch.tensor([scale]))
    for deviation, same in ((scale, True), (math.sqrt(scale), False)):
        z = mean + deviation * nodes
        exact = weights @ (dist.Normal(mean, deviation).log_prob(z) - dist.Normal(0.0, 1.0).log_prob(z))
        assert torch.isclose(closed, exact, rtol=1e-10, atol=1e-10) == same


def test_002_eq2_average_of_products_is_biased_if_shared_and_hopeless_if_not() -> None:
    pair, x = small_linear_pair()
    x = x[:3]
    grid, step = line(10.0, 2001)
    prior = torch.exp(dist.Normal(0.0, 1.0).log_prob(grid)) * step
    mean = (grid.unsqueeze(-1) @ pair.weight.mT + pair.bias).unsqueeze(1)
    likelihood = torch.exp(dist.Normal(mean, pair.scale()).log_prob(x).sum(-1))  # p(x_j | z), (grid, 3)
    exact = pair.exact_log_likelihood(x)
    torch.testing.assert_close((prior @ likelihood).log(), exact, **ROUNDING)
    # One z shared by all data: its expectation is the likelihood of another model.
    shared = (prior @ likelihood.prod(-1)).log()
    assert (shared - exact.sum()).abs() > 0.1
    # Separate draws: unbiased, E Π = Π E, with relative second moment Π (1 + v_j), which grows geometrically in n.
    first, second = prior @ likelihood, prior @ likelihood**2
    draws = torch.randn(200_000, 3)
    at_draws = draws.unsqueeze(-1) * pair.weight[:, 0] + pair.bias
    products = torch.exp(dist.Normal(at_draws, pair.scale()).log_prob(x).sum((-2, -1))) / first.prod()
    relative = (second / first**2).prod()
    assert (products.mean() - 1).abs() <= 4 * ((relative - 1) / len(products)).sqrt()
    assert (second / first**2 > 1.2).all()
    # What is estimated instead: one average per datum, and the sum of their logarithms.
    estimate = naive_log_likelihood(pair, x, num_particles=20_000, seed=0)
    assert ((estimate.per_datum - exact).abs() <= 4 * estimate.standard_error).all()


def test_002_eq5_the_evidence_is_above_the_bound() -> None:
    pair, x = small_linear_pair()
    posterior, log_p = pair.exact_posterior(x), pair.exact_log_likelihood(x)
    for mean, scale in ((0.0, 1.0), (1.0, 0.3), (-2.0, 2.0)):
        bound = exact_elbo(pair, x, torch.tensor([mean]), torch.tensor([scale]))
        gap = kl_full(torch.tensor([mean]), torch.tensor([[scale]]), posterior.loc, posterior.scale_tril)
        torch.testing.assert_close(log_p, bound + gap, **ROUNDING)
        assert (log_p > bound).all(), '"log P ≤ L" is false at every one of these guides'


def test_002_eq20_subtracts_the_residual_over_twice_the_variance() -> None:
    noise = 0.4
    encoder, decoder = MLP([(3,)], 4, (8,)), MLP([(2,)], 3, (8,))
    pair = VAE((3,), pv.StandardNormal(2), pv.Gaussian(pv.FixedScale(noise)), encoder=encoder, decoder=decoder)
    x = torch.randn(5, 3)
    mean, raw = encoder(x).chunk(2, -1)
    scale = softplus(raw) + SMALLEST_GUIDE_SCALE
    torch.manual_seed(3)
    f = decoder(mean + scale * torch.randn(7, 5, 2))
    squares = ((f - x) ** 2).sum(-1).mean(0)
    regulariser = 0.5 * (1 + 2 * scale.log() - scale**2 - mean**2).sum(-1)
    torch.manual_seed(3)
    found = -pv.analytic_loss(pair, x, num_particles=7).total
    constant = -3 * (math.log(noise) + LOG_2PI / 2)
    corrected, printed = -squares / (2 * noise**2) + regulariser, squares + regulariser
    torch.testing.assert_close(found, corrected + constant, **ROUNDING)
    (towards,) = torch.autograd.grad(corrected.sum(), f, retain_graph=True)
    (away,) = torch.autograd.grad(printed.sum(), f, retain_graph=True)
    assert (towards * (x - f) >= 0).all()
    assert (away * (x - f) <= 0).all(), "maximised as printed, it drives every reconstruction away from its datum"
    (unscaled,) = torch.autograd.grad((-squares + regulariser).sum(), f)
    torch.testing.assert_close(towards, unscaled / (2 * noise**2), **ROUNDING)


@pytest.mark.parametrize("size", [1, 3])
def test_003_last_divergence_multiplies_by_the_dimension(size: int) -> None:
    def printed(mean: Tensor, scale: float) -> Tensor:
        return 0.5 * (scale ** (2 * size) + mean @ mean - size * math.log(scale**2))

    mean, scale = torch.randn(size), 1.2
    nodes, weights = hermite()
    z = mean + scale * nodes.unsqueeze(-1)
    exact = weights @ (dist.Normal(mean, scale).log_prob(z) - dist.Normal(0.0, 1.0).log_prob(z)).sum(-1)
    corrected = 0.5 * (size * scale**2 - size + mean @ mean - size * math.log(scale**2))
    torch.testing.assert_close(corrected, exact, **ROUNDING)
    torch.testing.assert_close(kl_standard_normal(mean, torch.full((size,), scale)), exact, **ROUNDING)
    assert (printed(mean, scale) - exact).abs() > 0.1
    assert printed(torch.zeros(size), 1.0) == 0.5, "a divergence of a distribution from itself"
    assert kl_standard_normal(torch.zeros(size), torch.ones(size)) == 0


def test_003_normaliser_may_be_ignored_for_a_fixed_scale_only() -> None:
    x, x_hat = torch.randn(6), torch.randn(6).requires_grad_()
    scale = torch.tensor(0.5, requires_grad=True)
    ignored = ((x - x_hat) ** 2).sum() / (2 * scale**2)
    full = gaussian_reconstruction(x, x_hat, scale)
    # For the decoder the term is a constant …
    of_mean = [torch.autograd.grad(loss, x_hat, retain_graph=True)[0] for loss in (ignored, full)]
    torch.testing.assert_close(of_mean[0], of_mean[1], **ROUNDING)
    # … for σ it is what stops it from growing for ever.
    mse = ((x - x_hat) ** 2).mean().detach()
    for value in (0.1, 1.0, 10.0, 1000.0):
        leaf = torch.tensor(value, requires_grad=True)
        (slope,) = torch.autograd.grad(((x - x_hat.detach()) ** 2).sum() / (2 * leaf**2), leaf)
        assert slope < 0
    best = mse.sqrt().requires_grad_()
    (slope,) = torch.autograd.grad(gaussian_reconstruction(x, x_hat.detach(), best), best)
    torch.testing.assert_close(slope, torch.tensor(0.0), **ROUNDING)


def test_004_closed_divergence_is_from_the_prior_not_the_posterior() -> None:
    pair, x = small_linear_pair()
    posterior, log_p = pair.exact_posterior(x), pair.exact_log_likelihood(x)
    mean, scale = torch.tensor([0.3]), torch.tensor([0.8])
    formula = 0.5 * (1 + torch.log(scale**2) - mean**2 - scale**2).sum()
    torch.testing.assert_close(formula, -kl_standard_normal(mean, scale), **ROUNDING)
    to_posterior = kl_full(mean, torch.diag(scale), posterior.loc, posterior.scale_tril)
    assert ((formula + to_posterior).abs() > 0.1).all()
    # In the bound it matters: at q = p(z|x) the divergence from the posterior is 0, and "L̃" is above log p(x).
    mean, scale = posterior.mean, posterior.covariance_matrix.diagonal(dim1=-2, dim2=-1).sqrt()
    from_prior = kl_standard_normal(mean, scale)
    torch.testing.assert_close(exact_elbo(pair, x, mean, scale), log_p, **ROUNDING)
    printed = exact_elbo(pair, x, mean, scale) + from_prior
    assert (printed > log_p + 0.1).all()


def test_004_score_function_differentiates_in_the_parameter_at_each_draw() -> None:
    mean, scale = torch.tensor(0.7, requires_grad=True), torch.tensor(0.8)
    grid, step = line()
    f = torch.exp(-(grid**2) / 2)
    log_q = dist.Normal(mean, scale).log_prob(grid)
    q = log_q.exp().detach() * step
    # E_q f(z) in closed form, and its derivative in φ = μ.
    closed = torch.exp(-(mean**2) / (2 * (1 + scale**2))) / (1 + scale**2).sqrt()
    (exact,) = torch.autograd.grad(closed, mean)
    (corrected,) = torch.autograd.grad((q * f * log_q).sum(), mean, retain_graph=True)
    torch.testing.assert_close(corrected, exact, **ROUNDING)
    # d log q / dq is 1/q: what is printed averages to ∫ f(z) dz, whatever φ.
    printed = (q * f / (q / step)).sum()
    torch.testing.assert_close(printed, torch.tensor(math.sqrt(2 * math.pi)), **ROUNDING)
    assert (printed - exact).abs() > 1
    # And with one f(z) for all draws only the mean score is left, which is zero.
    (mean_score,) = torch.autograd.grad((q * log_q).sum(), mean)
    torch.testing.assert_close(mean_score, torch.tensor(0.0), **ROUNDING)
