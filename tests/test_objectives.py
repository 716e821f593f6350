"""Objectives against the limits that recover one another, term by term, and as losses of ``fit``."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import pyro_vae as pv
from pyro_vae.models import VAE, LinearGaussianVAE
from pyro_vae.objectives import beta_elbo, elbo, iwae, renyi
from pyro_vae.pair import LogTerms

# Sums of a few dozen numbers of order ten.
ROUNDING = {"rtol": 1e-12, "atol": 1e-12}


def some_terms(particles: int = 7, data: int = 20) -> LogTerms:
    return LogTerms(*(3 * torch.randn(3, particles, data)))


def loss_of(pair: pv.Pair, objective: Any, x: torch.Tensor) -> float:
    with torch.no_grad():
        return -float(objective(pv.log_terms(pair, x, num_particles=50)).mean())


def test_order_one_is_the_elbo_and_order_zero_the_importance_weighted_bound() -> None:
    terms = some_terms()
    assert torch.equal(renyi(1.0)(terms), elbo(terms))
    torch.testing.assert_close(renyi(0.0)(terms), iwae(terms), **ROUNDING)


@pytest.mark.parametrize("step", [1e-3, -1e-3])
def test_orders_near_one_differ_from_the_elbo_by_half_the_variance(step: float) -> None:
    # log-mean-exp of δ·l over δ, at δ = 1 − α: mean + δ/2 variance + δ²/6 third cumulant + …
    terms = some_terms()
    variance = terms.log_weights.var(0, correction=0)
    third = ((terms.log_weights - elbo(terms)) ** 3).mean(0)
    difference = renyi(1 - step)(terms) - elbo(terms) - step / 2 * variance - step**2 / 6 * third
    # The next term is δ³/24 times the fourth cumulant; the rounding of a difference is divided by δ.
    fourth = ((terms.log_weights - elbo(terms)) ** 4).mean(0) + 3 * variance**2
    assert (difference.abs() <= abs(step) ** 3 * fourth + 1e-12).all()


def test_the_bound_falls_with_its_order() -> None:
    terms = some_terms(data=200)
    bounds = torch.stack([renyi(alpha)(terms) for alpha in (-5.0, -0.5, 0.0, 0.3, 1.0, 2.0, 50.0)])
    assert (bounds.diff(dim=0) <= 1e-12).all()
    # The limits are the largest and the smallest log-weight, each within log K / |1 − α|, and rounding.
    weights = terms.log_weights
    assert (renyi(-1e4)(terms) - weights.amax(0)).abs().max() <= math.log(7) / 1e4 + 1e-10
    assert (renyi(1e4)(terms) - weights.amin(0)).abs().max() <= math.log(7) / (1e4 - 1) + 1e-10


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0, 4.0])
def test_beta_weighs_the_divergence_and_nothing_else(beta: float) -> None:
    terms = some_terms()
    divergence = (terms.log_guide - terms.log_prior).mean(0)
    torch.testing.assert_close(beta_elbo(beta)(terms), elbo(terms) - (beta - 1) * divergence, **ROUNDING)


def test_beta_keeps_a_point_mass_as_data() -> None:
    pair = pv.models.SRVAE((1, 4, 4), 2, pv.StandardNormal(2), "delta")
    x = torch.rand(3, 1, 4, 4)
    torch.manual_seed(0)
    sites = pv.site_terms(pair, x, num_particles=5)
    torch.manual_seed(0)
    value = beta_elbo(0.0)(pv.log_terms(pair, x, num_particles=5))
    torch.testing.assert_close(value, (sites["x"].log_model + sites["y"].log_model).mean(0), **ROUNDING)


@pytest.mark.parametrize("objective", [elbo, iwae, renyi(0.5), renyi(2.0)])
def test_an_exact_guide_makes_every_order_exact(objective: Any) -> None:
    pair, x = LinearGaussianVAE(5, 2), torch.randn(6, 5)
    value = objective(pv.log_terms(pair, x, num_particles=8))
    torch.testing.assert_close(value, pair.exact_log_likelihood(x), rtol=1e-10, atol=1e-10)


def test_objectives_train_under_their_own_names(tmp_path: Any) -> None:
    for objective, name in ((renyi(0.5), "renyi(0.5)"), (beta_elbo(2), "beta_elbo(2)")):
        assert objective.__name__ == name  # type: ignore[attr-defined]
        torch.manual_seed(1)
        pair, x = VAE((4,), pv.StandardNormal(2)), torch.randn(64, 4)
        before = loss_of(pair, objective, x)
        run_dir = tmp_path / name
        pv.fit(pair, x, epochs=30, batch_size=32, lr=1e-2, loss=objective, run_dir=run_dir, progress=False)
        assert loss_of(pair, objective, x) < before
        assert name in (run_dir / "config.json").read_text()


@pytest.mark.parametrize("alpha", [math.nan, math.inf, -math.inf])
def test_orders_must_be_finite(alpha: float) -> None:
    with pytest.raises(ValueError, match=r"alpha is .*finite"):
        renyi(alpha)


@pytest.mark.parametrize("beta", [-0.1, math.nan, math.inf])
def test_weights_must_be_finite_and_not_negative(beta: float) -> None:
    with pytest.raises(ValueError, match=r"beta is .*at least 0"):
        beta_elbo(beta)
