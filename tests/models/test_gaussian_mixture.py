"""The mixture of Gaussians keeps the contract, and its exact guide makes every weight log p(x)."""

from __future__ import annotations

import torch
from torch import Tensor

import pyro_vae as pv
from pyro_vae.models import GaussianMixture
from pyro_vae.testing import PairContract


class TestGaussianMixture(PairContract):
    expected_findings = (("not trainable this way", "c"),)

    def make_pair(self) -> pv.Pair:
        return GaussianMixture(pv.MixtureOfGaussians(3, 2, weights=torch.tensor([1.0, 2, 3])))

    def make_batch(self) -> tuple[Tensor, ...]:
        return (torch.randn(5, 2),)


def test_every_log_weight_is_the_mixtures_density() -> None:
    pair, x = TestGaussianMixture().make_pair(), torch.randn(7, 2)
    weights = pv.log_terms(pair, x, num_particles=10).log_weights
    torch.testing.assert_close(weights, pair.exact_log_likelihood(x).expand(10, 7), rtol=1e-10, atol=1e-10)
