"""Objectives against the limits that recover one another, term by term, and as losses of ``fit``."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pyro.infer import Trace_ELBO

import pyro_vae as pv
from pyro_vae.models import VAE, LadderVAE, LinearGaussianVAE
from pyro_vae.objectives.bounds import beta_elbo, elbo, free_bits, iwae, renyi
from pyro_vae.pair.terms import LogTerms

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
        # Several draws: of one, a Rényi bound is the ELBO, which fit refuses.
        how: dict[str, Any] = {"loss": objective, "num_particles": 2, "run_dir": run_dir, "progress": False}
        pv.fit(pair, x, epochs=30, batch_size=32, lr=1e-2, **how)
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


# β that rises while an objective trains


def ladder(epochs: float) -> LadderVAE:
    torch.manual_seed(0)
    pair = LadderVAE((6,), (3, 2), pv.Bernoulli(), hidden=(8, 8))
    pair.beta = pv.Annealed(0.0, 1.0, epochs)
    return pair


def trained(pair: LadderVAE, **how: Any) -> torch.Tensor:
    """Return the parameters after five epochs of six steps, plain gradient descent."""
    x = torch.rand(48, 6, generator=torch.Generator().manual_seed(1)).round()
    make = partial(torch.optim.SGD, lr=0.05)
    pv.fit(pair, x, epochs=5, batch_size=8, optimizer=make, progress=False, **how)
    return torch.cat([p.detach().flatten() for p in pair.parameters()])


def test_a_rising_beta_is_the_warm_up_of_fit() -> None:
    pair = ladder(3.0)
    ours = trained(pair, loss=beta_elbo(pair.beta), capture=False)
    theirs = trained(ladder(3.0), loss=Trace_ELBO(), warmup=3, capture=False)
    # Thirty steps of the same sums in another order.
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    assert float(pair.beta()) == 1.0


def test_free_bits_under_a_rising_beta_weigh_the_floor_too() -> None:
    pair = ladder(4.0)
    objective, terms = free_bits(0.3, pair.beta), pv.log_terms(pair, torch.ones(5, 6), num_particles=3)
    for epochs, beta in ((0.0, 0.0), (1.0, 0.25), (9.0, 1.0)):
        pv.advance(pair, epochs)
        penalty = terms.log_lik.mean(0) - free_bits(0.3)(terms)
        torch.testing.assert_close(objective(terms), terms.log_lik.mean(0) - beta * penalty, **ROUNDING)


def test_free_bits_and_a_warm_up_train_together_and_the_recorded_step_sees_both() -> None:
    pairs = [ladder(3.0) for _ in range(3)]
    recorded, eager = (
        trained(pair, loss=free_bits(0.5, pair.beta), capture=capture)
        for pair, capture in zip(pairs, (True, False), strict=False)
    )
    torch.testing.assert_close(recorded, eager, rtol=1e-10, atol=1e-12)
    # Neither alone takes that way.
    without = trained(pairs[2], loss=free_bits(0.5))
    assert (recorded - without).abs().max() > 1e-3


def test_a_resumed_run_is_held_to_the_way_of_beta(tmp_path: Path) -> None:
    pair = ladder(3.0)
    trained(pair, loss=free_bits(0.5, pair.beta), run_dir=tmp_path / "run")
    assert '"free_bits(0.5, 0 to 1 in 3 epochs)"' in (tmp_path / "run" / "config.json").read_text()
    other = ladder(4.0)
    with pytest.raises(ValueError, match="begun with other settings: loss"):
        trained(other, loss=free_bits(0.5, other.beta), run_dir=tmp_path / "run", resume=True)


@pytest.mark.parametrize("make", [beta_elbo, partial(free_bits, 1.0)])
def test_a_beta_that_is_no_part_of_the_pair_or_negative_is_refused(make: Any) -> None:
    with pytest.raises(ValueError, match="follows a number that is no module of the pair"):
        trained(ladder(3.0), loss=make(pv.Annealed(0.0, 1.0, 3)))
    with pytest.raises(ValueError, match="beta is -1 to 1 in 3 epochs; the weight"):
        make(pv.Annealed(-1.0, 1.0, 3))
