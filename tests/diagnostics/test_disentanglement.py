"""The metrics on codes whose value is known: copies of the factors, rotations of them, constants."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import pyro_vae as pv

FACTORS = torch.cartesian_prod(*(torch.arange(n) for n in (3, 4, 6, 8, 8)))
GRID = torch.cartesian_prod(torch.arange(4), torch.arange(4))
ROUNDING = {"rtol": 1e-12, "atol": 1e-12}


def rotated(factors: Tensor) -> Tensor:
    """Return the code turned by 45°, in which both latents know both factors equally well."""
    code = factors.double() - factors.double().mean(0)
    return code @ torch.tensor([[1.0, -1.0], [1.0, 1.0]], dtype=torch.float64)


def test_a_copy_of_the_factors_has_gap_one() -> None:
    factors = FACTORS
    code = torch.cat([-3.0 * factors.flip(-1), torch.zeros(len(factors), 2)], -1)
    result = pv.mutual_information_gap(code, factors)
    torch.testing.assert_close(result.per_factor, torch.ones(5), **ROUNDING)
    torch.testing.assert_close(result.entropy, torch.tensor([3.0, 4, 6, 8, 8]).log(), **ROUNDING)
    assert result.information.shape == (7, 5)


def test_a_code_that_two_latents_share_has_gap_zero() -> None:
    twice = torch.cat([GRID, -GRID], -1).double()
    assert pv.mutual_information_gap(twice, GRID).gap == pytest.approx(0, abs=1e-12)
    assert pv.mutual_information_gap(rotated(GRID), GRID).gap == pytest.approx(0, abs=1e-12)
    assert pv.mutual_information_gap(torch.zeros(16, 3), GRID).gap == pytest.approx(0, abs=1e-12)


def test_half_a_factor_is_half_a_gap() -> None:
    # One latent tells which half of four values it is: log 2 of log 4.
    code = torch.stack([(GRID[:, 0] >= 2).double(), GRID[:, 1].double()], -1)
    torch.testing.assert_close(pv.mutual_information_gap(code, GRID).per_factor, torch.tensor([0.5, 1.0]), **ROUNDING)


def test_information_falls_with_coarser_bins() -> None:
    factors = torch.arange(8).reshape(-1, 1)
    gaps = [pv.mutual_information_gap(factors.double(), factors, bins=bins).gap for bins in (2, 4, 8)]
    assert gaps == pytest.approx([1 / 3, 2 / 3, 1.0], rel=1e-12)


def test_the_classifier_finds_the_factor_in_a_copy_and_not_in_a_constant() -> None:
    factors = FACTORS[torch.randperm(len(FACTORS))[:1000]]
    assert pv.beta_vae_metric(factors.double(), factors, num_votes=100) == 1.0
    assert pv.beta_vae_metric(torch.zeros(1000, 3), factors, num_votes=100) == pytest.approx(1 / 5, rel=1e-12)


def test_a_rotated_code_leaves_the_classifier_little_more_than_chance() -> None:
    # With either factor fixed both latents differ alike, |Δ| and |Δ|: the votes of both kinds have one distribution.
    score = pv.beta_vae_metric(rotated(GRID), GRID, num_votes=1000)
    assert abs(score - 0.5) <= 4 * math.sqrt(0.25 / 2000)


def test_votes_agree_in_their_factor() -> None:
    from pyro_vae.diagnostics.disentanglement import votes_of

    factors = FACTORS[torch.randperm(len(FACTORS))[:500]]
    for k in range(5):
        votes = votes_of(factors.double(), factors[:, k], 20, 10, torch.Generator().manual_seed(0))
        assert (votes[:, k] == 0).all()
        assert (votes.sum(0) > 0).sum() == 4


def test_codes_are_the_guides_means() -> None:
    pair, x = pv.models.VAE((4,), pv.StandardNormal(3)), torch.randn(300, 4)
    torch.testing.assert_close(pv.latent_means(pair, x), pair.q_z(x).mean.detach(), **ROUNDING)
    with pytest.raises(ValueError, match=r"no site 'u'; it has \['z'\]"):
        pv.latent_means(pair, x, site="u")


CODE = torch.randn(16, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pv.mutual_information_gap(CODE, GRID[:8]), r"codes have shape \(16, 2\), factors \(8, 2\)"),
        (lambda: pv.mutual_information_gap(CODE, GRID.double()), r"factors are torch.float64"),
        (lambda: pv.mutual_information_gap(CODE, GRID - 1), r"not negative"),
        (lambda: pv.mutual_information_gap(CODE * math.nan, GRID), r"codes has NaN"),
        (lambda: pv.mutual_information_gap(CODE, 0 * GRID), r"factor 0 takes one value only"),
        (lambda: pv.mutual_information_gap(CODE, GRID, bins=1), r"bins is 1"),
        (lambda: pv.beta_vae_metric(CODE, GRID, num_votes=0), r"num_votes is 0"),
        (lambda: pv.beta_vae_metric(CODE, GRID[:, :1]), r"at least 2"),
    ],
)
def test_bad_input_is_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_codes_are_vectors_with_a_mean() -> None:
    categorical = pv.models.CategoricalVAE((1, 4, 4), pv.OneHotPrior(3, 4))
    with pytest.raises(ValueError, match="is no vector"):
        pv.latent_means(categorical, torch.zeros(6, 1, 4, 4))
