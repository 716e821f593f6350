"""The linear-Gaussian pairs keep the contract, and meet closed forms and each other in their limits."""

from __future__ import annotations

import math

import pyro.distributions as dist
import torch
from torch import Tensor

import pyro_vae as pv
from pyro_vae.models import LinearGaussianMixtureVAE, LinearGaussianVAE, LinearTwoStageVAE
from pyro_vae.testing import PairContract

# Cholesky factors of small, well-conditioned matrices: rounding stays below 1e-11 relative.
ROUNDING = {"rtol": 1e-10, "atol": 1e-10}


class TestLinearGaussianVAE(PairContract):
    def make_pair(self) -> pv.Pair:
        return LinearGaussianVAE(4, 2)

    def make_batch(self) -> tuple[Tensor, ...]:
        return (torch.randn(5, 4),)


class TestLinearGaussianMixtureVAE(TestLinearGaussianVAE):
    expected_findings = (("not trainable this way", "c"),)

    def make_pair(self) -> pv.Pair:
        return LinearGaussianMixtureVAE(4, pv.MixtureOfGaussians(3, 2))


class TestLinearTwoStageVAE(TestLinearGaussianVAE):
    expected_findings = (("not trainable this way", "c"), ("not log p(x)", "y"))

    def make_pair(self) -> pv.Pair:
        return LinearTwoStageVAE(4, 2, pv.MixtureOfGaussians(3, 2), z_size=2)


def test_the_published_maximum_of_the_likelihood_is_one() -> None:
    # Tipping and Bishop (1999): W = U (Λ − σ² I)^½, σ² the mean of the discarded eigenvalues.
    pair, x = LinearGaussianVAE(5, 2), torch.randn(60, 5) @ torch.randn(5, 5)
    values, vectors = torch.linalg.eigh(torch.cov(x.mT, correction=0))
    variance = values[:3].mean()
    with torch.no_grad():
        pair.bias.copy_(x.mean(0))
        pair.weight.copy_(vectors[:, 3:] * (values[3:] - variance).sqrt())
        pair.scale.raw.copy_(0.5 * torch.log(variance - pair.scale.floor**2))
    log_likelihood = pair.exact_log_likelihood(x).mean()
    # The mean quadratic form is D there.
    expected = -0.5 * (5 * math.log(2 * math.pi) + values[3:].log().sum() + 3 * variance.log() + 5)
    torch.testing.assert_close(log_likelihood, expected, **ROUNDING)
    # At the maximum every derivative vanishes.
    for gradient in torch.autograd.grad(log_likelihood, [pair.weight, pair.bias, pair.scale.raw]):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), **ROUNDING)


def test_one_standard_component_is_probabilistic_pca() -> None:
    pca, x = LinearGaussianVAE(4, 2), torch.randn(7, 4)
    mixture = LinearGaussianMixtureVAE(4, pv.MixtureOfGaussians(1, 2, means=torch.zeros(1, 2)))
    mixture.load_state_dict({**mixture.state_dict(), **pca.state_dict()})
    torch.testing.assert_close(mixture.exact_log_likelihood(x), pca.exact_log_likelihood(x), **ROUNDING)
    _, posteriors = mixture.exact_components(x)
    torch.testing.assert_close(posteriors.mean[:, 0], pca.exact_posterior(x).mean, **ROUNDING)
    torch.testing.assert_close(
        posteriors.covariance_matrix[:, 0], pca.exact_posterior(x).covariance_matrix.expand(7, 2, 2), **ROUNDING
    )


def test_a_second_stage_that_reads_y_alone_adds_its_own_density() -> None:
    # p(x, y) = p(y) p(x | y): p(y) is the one-stage mixture's, and z, cut off from x, integrates to one.
    prior = pv.MixtureOfGaussians(3, 2, weights=torch.tensor([1.0, 2, 3]))
    two, one, x = LinearTwoStageVAE(6, 2, prior, z_size=2), LinearGaussianMixtureVAE(3, prior), torch.randn(7, 6)
    with torch.no_grad():
        two.x_of_z.weight.zero_()
        one.weight.copy_(two.y_of_u.weight)
        one.bias.copy_(two.y_of_u.bias)
    y = two.down_scale(x)
    second = dist.Normal(two.x_of_y(y) + two.x_of_z.bias, two.x_scale()).to_event(1).log_prob(x)
    torch.testing.assert_close(two.exact_log_likelihood(x), one.exact_log_likelihood(y) + second, **ROUNDING)


def test_without_u_in_z_the_component_is_read_from_y_alone() -> None:
    # Given y, x then says nothing more about u: p(c | x, y) = p(c | y).
    prior = pv.MixtureOfGaussians(3, 2)
    two, one, x = LinearTwoStageVAE(6, 2, prior, z_size=2), LinearGaussianMixtureVAE(3, prior), torch.randn(7, 6)
    with torch.no_grad():
        two.z_of_u.weight.zero_()
        one.weight.copy_(two.y_of_u.weight)
        one.bias.copy_(two.y_of_u.bias)
    with_x, without = two.exact_components(x)[0], one.exact_components(two.down_scale(x))[0]
    torch.testing.assert_close((prior.logits + with_x).softmax(-1), (prior.logits + without).softmax(-1), **ROUNDING)
