"""Linear-Gaussian identities: closed marginals and posteriors, and log-weights that equal them for every draw."""

from __future__ import annotations

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.distributions.linear_gaussian import (
    condition_gaussian,
    linear_gaussian_log_likelihood,
    linear_gaussian_posterior,
    mixture_log_likelihood,
)
from pyro_vae.models import LinearGaussianMixtureVAE, LinearGaussianVAE, LinearTwoStageVAE

# Cholesky factors of matrices of size ≤ 12 with condition numbers below 1e4: rounding stays below 1e-11 relative.
ROUNDING = {"rtol": 1e-10, "atol": 1e-10}


def randomise(pair: nn.Module) -> None:
    """Give every parameter a random value, so that no bias is left at zero and no scale at another's."""
    with torch.no_grad():
        for parameter in pair.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))


def mixture_prior(components: int, size: int) -> pv.MixtureOfGaussians:
    scales = torch.exp(0.3 * torch.randn(components, size))
    return pv.MixtureOfGaussians(components, size, weights=torch.rand(components) + 0.2, scales=scales)


def test_conditioning_equals_the_dense_formula() -> None:
    mean, factor = torch.randn(4, 3, 2), torch.randn(3, 2, 2)
    weight, noise, observed = torch.randn(5, 2), torch.rand(5) + 0.3, torch.randn(4, 1, 5)
    log_marginal, posterior = condition_gaussian(mean, factor, weight, noise, observed)
    prior = factor @ factor.mT
    covariance = weight @ prior @ weight.mT + torch.diag(noise**2)
    marginal = dist.MultivariateNormal(mean @ weight.mT, covariance)
    torch.testing.assert_close(log_marginal, marginal.log_prob(observed), **ROUNDING)
    gain = prior @ weight.mT @ torch.linalg.inv(covariance)
    residual = observed - mean @ weight.mT
    torch.testing.assert_close(posterior.mean, mean + (gain @ residual.unsqueeze(-1)).squeeze(-1), **ROUNDING)
    dense = (prior - gain @ weight @ prior).expand(4, 3, 2, 2)
    torch.testing.assert_close(posterior.covariance_matrix, dense, **ROUNDING)


def test_conditioning_equals_quadrature_in_one_dimension() -> None:
    mean, factor, weight, noise = torch.tensor([0.7]), torch.tensor([[1.3]]), torch.tensor([[0.8]]), torch.tensor([0.4])
    observed = torch.tensor([-0.2])
    log_marginal, posterior = condition_gaussian(mean, factor, weight, noise, observed)
    # The trapezoid rule on a Gaussian that has died out at both ends errs by far less than rounding.
    v = torch.linspace(-15, 15, 20001)
    joint = dist.Normal(0.7, 1.3).log_prob(v) + dist.Normal(0.8 * v, 0.4).log_prob(observed)
    evidence = torch.trapezoid(joint.exp(), v)
    first = torch.trapezoid(v * joint.exp(), v) / evidence
    second = torch.trapezoid((v - first) ** 2 * joint.exp(), v) / evidence
    torch.testing.assert_close(log_marginal, evidence.log(), **ROUNDING)
    torch.testing.assert_close(posterior.mean.squeeze(), first, **ROUNDING)
    torch.testing.assert_close(posterior.covariance_matrix.squeeze(), second, **ROUNDING)


def test_probabilistic_pca_equals_the_dense_formulas() -> None:
    x, weight, bias, scale = torch.randn(4, 5), torch.randn(5, 2), torch.randn(5), torch.tensor(0.6)
    marginal = dist.MultivariateNormal(bias, weight @ weight.mT + scale**2 * torch.eye(5))
    torch.testing.assert_close(linear_gaussian_log_likelihood(x, weight, bias, scale), marginal.log_prob(x), **ROUNDING)
    posterior = linear_gaussian_posterior(x, weight, bias, scale)
    inverse = torch.linalg.inv(weight.mT @ weight + scale**2 * torch.eye(2))
    torch.testing.assert_close(posterior.mean, (x - bias) @ weight @ inverse, **ROUNDING)
    torch.testing.assert_close(posterior.covariance_matrix, (scale**2 * inverse).expand(4, 2, 2), **ROUNDING)


def test_mixture_likelihood_normalises_its_weights() -> None:
    logits, log_marginals = torch.randn(3), torch.randn(4, 3)
    expected = ((logits.exp() / logits.exp().sum()) * log_marginals.exp()).sum(-1).log()
    torch.testing.assert_close(mixture_log_likelihood(logits, log_marginals), expected, **ROUNDING)
    torch.testing.assert_close(mixture_log_likelihood(logits + 7, log_marginals), expected, **ROUNDING)


def standard_component(size: int) -> pv.MixtureOfGaussians:
    return pv.MixtureOfGaussians(1, size, means=torch.zeros(1, size), learned=False)


PAIRS = {
    "one stage": lambda: LinearGaussianVAE(5, 2),
    "one stage, mixture": lambda: LinearGaussianMixtureVAE(5, mixture_prior(3, 2)),
    "two stages, mixture": lambda: LinearTwoStageVAE(6, 2, mixture_prior(3, 2), z_size=2),
    "two stages, standard": lambda: LinearTwoStageVAE(6, 2, standard_component(2), z_size=2),
}


@pytest.mark.parametrize("name", PAIRS)
def test_every_log_weight_is_the_log_likelihood(name: str) -> None:
    pair = PAIRS[name]()
    randomise(pair)
    x = torch.randn(7, *pair.x_shape)
    weights = pv.log_terms(pair, x, num_particles=50).log_weights
    assert weights.shape == (50, 7)
    torch.testing.assert_close(weights, pair.exact_log_likelihood(x).expand(50, 7), **ROUNDING)


def test_log_weights_vary_as_soon_as_the_guide_is_not_the_posterior() -> None:
    pair, other = LinearGaussianVAE(5, 2), LinearGaussianVAE(5, 2)
    randomise(pair)
    randomise(other)
    pair.exact_posterior = other.exact_posterior  # a wrong guide beside the right model
    weights = pv.log_terms(pair, torch.randn(3, 5), num_particles=50).log_weights
    assert (weights.std(0) > 1e-2).all()


def test_one_stage_mixture_likelihood_equals_the_dense_mixture() -> None:
    pair = LinearGaussianMixtureVAE(5, mixture_prior(3, 2))
    randomise(pair)
    x = torch.randn(7, 5)
    log_p = torch.stack(
        [
            dist.MultivariateNormal(
                pair.weight @ mean + pair.bias,
                pair.weight @ torch.diag(torch.exp(2 * log_scale)) @ pair.weight.mT + pair.scale() ** 2 * torch.eye(5),
            ).log_prob(x)
            for mean, log_scale in zip(pair.prior.means, pair.prior.log_scales, strict=True)
        ],
        -1,
    )
    expected = torch.logsumexp(pair.prior.logits.log_softmax(-1) + log_p, -1)
    torch.testing.assert_close(pair.exact_log_likelihood(x), expected, **ROUNDING)


def two_stage_joint(pair: LinearTwoStageVAE, component: int) -> tuple[Tensor, Tensor]:
    """Return mean and covariance of v = (u, z, y, x) in one component, from v = A v + b + noise."""
    u_size, z_size, y_size, x_size = pair.prior.size, len(pair.z_scale()), pair.x_shape[0] // pair.factor, *pair.x_shape
    ends = torch.tensor([u_size, z_size, y_size, x_size]).cumsum(0).tolist()
    u, z, y, x = (slice(a, b) for a, b in zip([0, *ends[:-1]], ends, strict=True))
    links, shift, noise = torch.zeros(ends[-1], ends[-1]), torch.zeros(ends[-1]), torch.zeros(ends[-1])
    links[y, u] = pair.y_of_u.weight
    links[z, y], links[z, u] = pair.z_of_y.weight, pair.z_of_u.weight
    links[x, z], links[x, y] = pair.x_of_z.weight, pair.x_of_y.weight
    shift[u], shift[y] = pair.prior.means[component], pair.y_of_u.bias
    shift[z], shift[x] = pair.z_of_y.bias, pair.x_of_z.bias
    noise[u], noise[y] = pair.prior.log_scales[component].exp(), pair.y_scale()
    noise[z], noise[x] = pair.z_scale(), pair.x_scale()
    transfer = torch.linalg.inv(torch.eye(ends[-1]) - links)
    return transfer @ shift, transfer @ torch.diag(noise**2) @ transfer.mT


def test_two_stage_likelihood_and_posterior_equal_the_dense_joint() -> None:
    pair = LinearTwoStageVAE(6, 2, mixture_prior(3, 2), z_size=2)
    randomise(pair)
    x = torch.randn(7, 6)
    observed = torch.cat([pair.down_scale(x), x], -1)
    latent = 2 + 2
    log_p = []
    _, posteriors = pair.exact_components(x)
    with torch.no_grad():
        for component in range(3):
            mean, covariance = two_stage_joint(pair, component)
            seen = covariance[latent:, latent:]
            log_p.append(dist.MultivariateNormal(mean[latent:], seen).log_prob(observed))
            gain = covariance[:latent, latent:] @ torch.linalg.inv(seen)
            posterior_mean = mean[:latent] + (observed - mean[latent:]) @ gain.mT
            posterior_covariance = covariance[:latent, :latent] - gain @ covariance[latent:, :latent]
            torch.testing.assert_close(posteriors.mean[:, component], posterior_mean, **ROUNDING)
            found = posteriors.covariance_matrix[:, component]
            torch.testing.assert_close(found, posterior_covariance.expand(7, latent, latent), **ROUNDING)
        expected = torch.logsumexp(pair.prior.logits.log_softmax(-1) + torch.stack(log_p, -1), -1)
        torch.testing.assert_close(pair.exact_log_likelihood(x), expected, **ROUNDING)


def test_down_scaling_averages_blocks() -> None:
    pair = LinearTwoStageVAE(6, 3, standard_component(2), z_size=2)
    x = torch.tensor([[1.0, 2, 3, 10, 20, 30]])
    torch.testing.assert_close(pair.down_scale(x), torch.tensor([[2.0, 20.0]]), rtol=0, atol=0)
    with pytest.raises(ValueError, match="factor is 4"):
        LinearTwoStageVAE(6, 4, standard_component(2), z_size=2)
