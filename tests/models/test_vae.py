"""The one-stage VAE keeps the contract, and with a linear decoder it is probabilistic PCA."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.conditionals.posteriors import SMALLEST_GUIDE_SCALE
from pyro_vae.models import VAE, LinearGaussianMixtureVAE, LinearGaussianVAE
from pyro_vae.testing import PairContract

# Cholesky factors of small, well-conditioned matrices: rounding stays below 1e-11 relative.
ROUNDING = {"rtol": 1e-10, "atol": 1e-10}


def digits(size: int = 5) -> Tensor:
    return torch.randint(0, 17, (size, 1, 4, 4)) / 16


class TestVAE(PairContract):
    def make_pair(self) -> pv.Pair:
        return VAE((1, 4, 4), pv.StandardNormal(2), pv.Gaussian())

    def make_batch(self) -> tuple[Tensor, ...]:
        return (digits(),)


class TestFullGaussianVAE(TestVAE):
    def make_pair(self) -> pv.Pair:
        return VAE((1, 4, 4), pv.MixtureOfGaussians(3, 2), pv.DiscretisedLogistic(17), pv.FullGaussian())


class TestNonAmortisedVAE(PairContract):
    def make_pair(self) -> pv.Pair:
        return VAE((1, 4, 4), pv.StandardNormal(2), pv.ContinuousBernoulli(), pv.FreeGaussian(5, 2))

    def make_batch(self) -> tuple[Tensor, ...]:
        return digits(), torch.arange(5)


def raw_scale(scale: Tensor) -> Tensor:
    """Return what a Gaussian head turns into this scale."""
    return torch.log(torch.expm1(scale - SMALLEST_GUIDE_SCALE))


def probabilistic_pca(*, orthogonal: bool) -> LinearGaussianVAE:
    """Return the oracle; with orthogonal columns of W its posterior is diagonal."""
    oracle = LinearGaussianVAE(5, 2)
    with torch.no_grad():
        oracle.bias.copy_(torch.randn(5))
        if orthogonal:
            oracle.weight.copy_(torch.linalg.qr(torch.randn(5, 2)).Q * torch.tensor([0.7, 1.9]))
    return oracle.requires_grad_(False)


def linear_decoder(oracle: LinearGaussianVAE | LinearGaussianMixtureVAE) -> nn.Linear:
    decoder = nn.Linear(oracle.weight.shape[1], oracle.weight.shape[0])
    decoder.load_state_dict({"weight": oracle.weight, "bias": oracle.bias})
    return decoder


def exact_encoder(oracle: LinearGaussianVAE, x: Tensor, raw: Tensor) -> nn.Linear:
    """Return the affine map from x to the posterior's mean and these raw entries, which do not depend on x."""
    origin = oracle.exact_posterior(torch.zeros(1, 5)).mean[0]
    slopes = oracle.exact_posterior(torch.eye(5)).mean - origin
    encoder = nn.Linear(5, 2 + len(raw))
    encoder.load_state_dict(
        {"weight": torch.cat([slopes.mT, torch.zeros(len(raw), 5)]), "bias": torch.cat([origin, raw])}
    )
    return encoder


@pytest.mark.parametrize("guide", ["diagonal", "full", "free", "oracle"])
def test_a_linear_decoder_and_the_exact_posterior_make_every_weight_log_p(guide: str) -> None:
    oracle, x = probabilistic_pca(orthogonal=guide in ("diagonal", "free")), torch.randn(7, 5)
    exact = oracle.exact_posterior(x)
    factor, conditions, encoder = exact.scale_tril[0], (), None
    if guide == "full":
        posterior: nn.Module = pv.FullGaussian()
        encoder = exact_encoder(
            oracle, x, torch.stack([*raw_scale(factor[:1, 0]), factor[1, 0], *raw_scale(factor[1, 1:])])
        )
    elif guide == "diagonal":
        posterior = pv.DiagonalGaussian()
        encoder = exact_encoder(oracle, x, raw_scale(factor.diagonal()))
    elif guide == "free":
        posterior, conditions = pv.FreeGaussian(7, 2), (torch.arange(7),)
        posterior.load_state_dict({"loc": exact.mean, "raw_scale": raw_scale(exact.stddev)})
    else:
        posterior = Exact(oracle)
    likelihood = pv.Gaussian(pv.FixedScale(oracle.scale()))
    pair = VAE((5,), pv.StandardNormal(2), likelihood, posterior, encoder=encoder, decoder=linear_decoder(oracle))
    weights = pv.log_terms(pair, x, *conditions, num_particles=4).log_weights
    torch.testing.assert_close(weights, oracle.exact_log_likelihood(x).expand(4, 7), **ROUNDING)


class Exact(nn.Module):
    """The posterior of probabilistic PCA as a conditional."""

    def __init__(self, oracle: LinearGaussianVAE) -> None:
        super().__init__()
        self.oracle = oracle

    def forward(self, x: Tensor) -> torch.distributions.Distribution:
        return self.oracle.exact_posterior(x)


def test_a_mixture_of_equal_components_is_its_component() -> None:
    standard = VAE((5,), pv.StandardNormal(2), pv.Gaussian())
    prior = pv.MixtureOfGaussians(3, 2, weights=torch.tensor([1.0, 2, 3]), means=torch.zeros(3, 2), learned=False)
    mixture = VAE((5,), prior, pv.Gaussian())
    mixture.load_state_dict({**mixture.state_dict(), **standard.state_dict()})
    x = torch.randn(7, 5)
    # The guides are equal, so that one seed gives both pairs the same draws.
    ours, theirs = (pv.log_likelihood(pair, x, num_particles=5, seed=1).per_datum for pair in (mixture, standard))
    torch.testing.assert_close(ours, theirs, **ROUNDING)


def test_a_mixture_prior_and_a_linear_decoder_have_the_mixtures_likelihood() -> None:
    prior = pv.MixtureOfGaussians(3, 2, weights=torch.tensor([1.0, 2, 3]), learned=False)
    oracle = LinearGaussianMixtureVAE(5, prior).requires_grad_(False)
    encoder = nn.Linear(5, 4)
    # A guide as wide as the prior: its weights are bounded, so that the standard error can be trusted.
    nn.init.zeros_(encoder.weight)
    with torch.no_grad():
        encoder.bias.copy_(torch.cat([torch.zeros(2), raw_scale(torch.full((2,), 2.0))]))
    likelihood = pv.Gaussian(pv.FixedScale(oracle.scale()))
    pair = VAE((5,), prior, likelihood, encoder=encoder, decoder=linear_decoder(oracle))
    x = pv.generate(oracle, 10, seed=1).x
    ll = pv.log_likelihood(pair, x, num_particles=20_000, seed=2, proposal="guide")
    assert ((ll.per_datum - oracle.exact_log_likelihood(x)).abs() <= 4 * ll.standard_error).all()
