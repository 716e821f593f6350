"""The tail of importance weights: known shapes, ArviZ's numbers, limiting cases, and what a stream keeps of them."""

from __future__ import annotations

import math
import warnings
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import pyro_vae as pv
from pyro_vae.likelihood.psis import fit_pareto, pareto_tail, tail_size, trust_threshold
from pyro_vae.likelihood.weights import WeightStream, WeightSummary
from pyro_vae.models import LinearGaussianMixtureVAE, LinearGaussianVAE
from pyro_vae.pair.weights import Rounding
from tests.support.off_guides import WrongScale
from tests.support.repetitions import repetitions

# The estimator itself, from the pair's own guide.
log_likelihood = partial(pv.log_likelihood, proposal="guide")

# Of one number in float64.
DOUBLE = Rounding(torch.finfo(torch.float64).eps)
ROUNDING = {"rtol": 1e-10, "atol": 1e-10}


def summary_of(log_weights: Tensor, sizes: list[int] | None = None) -> WeightSummary:
    stream = WeightStream(log_weights.shape[1], len(log_weights), log_weights.device)
    for chunk in log_weights.split(sizes or [len(log_weights)]):
        stream.add(chunk)
    return stream.summary()


def arviz_psis(log_weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return ArviZ's smoothed and normalised log-weights, and its k̂."""
    with warnings.catch_warnings():
        # ArviZ 0.23 announces its next version whenever it is imported.
        warnings.simplefilter("ignore", FutureWarning)
        import arviz
    smoothed, shape = arviz.psislw(log_weights)
    return np.asarray(smoothed), np.asarray(shape)


# The shape


@pytest.mark.parametrize("shape", [-0.5, 0.0, 0.3, 0.7, 1.2])
def test_a_pareto_tail_has_its_own_shape(shape: float) -> None:
    count = 2000
    # Quantiles of the distribution in place of draws: what is left is the estimator's own bias.
    level = -torch.log1p(-(torch.arange(count) + 0.5) / count)
    excesses = level if shape == 0 else torch.expm1(shape * level) / shape
    k, scale = fit_pareto(2.5 * excesses)
    # The spread of the estimate from as many draws would be (1 + k)/√n.
    expected = (count * shape + 5) / (count + 10)
    assert abs(k - expected) <= (1 + shape) / count**0.5
    assert abs(scale / 2.5 - 1) <= 4 * (2 * (1 + max(shape, 0)) / count) ** 0.5


def test_numbers_that_arviz_gave() -> None:
    # From ArviZ 0.23.4, psislw; log-weights log(1 + i) · s for i < 400, which need no random numbers.
    log_weights = torch.log1p(torch.arange(400.0))
    given = {
        0.5: (-0.7563623787055702, 2.5925873606165366),
        3.0: (-0.656858423218786, 16.600497891032152),
        -0.5: (0.42973980672801354, -2.3398292645729515),
        -1.0: (0.8179032841832095, -4.155601688924878),
    }
    for power, (k, log_mean) in given.items():
        summary = summary_of(power * log_weights.unsqueeze(1))
        assert float(summary.pareto_k) == pytest.approx(k, rel=1e-9)
        assert float(summary.smoothed) == pytest.approx(log_mean, rel=1e-9)


def test_arviz_agrees() -> None:
    log_weights = torch.randn(400, 6) * torch.tensor([0.1, 0.5, 1.0, 2.0, 4.0, 20.0])
    ours = summary_of(log_weights)
    try:
        smoothed, shape = arviz_psis(log_weights.mT.numpy())
    except AttributeError:
        # ArviZ from version 1 on keeps it elsewhere; the numbers above hold without it.
        return
    torch.testing.assert_close(ours.pareto_k, torch.from_numpy(shape), **ROUNDING)
    # Its smoothed weights are normalised: those below the tail tell by what.
    smallest = log_weights.argmin(0)
    columns = torch.arange(6)
    total = log_weights[smallest, columns] - torch.from_numpy(smoothed).mT[smallest, columns]
    torch.testing.assert_close(ours.smoothed, total - math.log(400), **ROUNDING)


@pytest.mark.parametrize("factor", [0.5, 0.7, 0.9])
def test_a_narrow_guides_shape_is_one_minus_its_squared_ratio(factor: float) -> None:
    pair, x = WrongScale(factor), torch.randn(40, 3)
    ll = log_likelihood(pair, x, num_particles=5000, seed=0)
    # The mean over data, and all but a few of them one by one: k̂ from 213 weights spreads by 0.1.
    assert abs(float(ll.pareto_k.mean()) - (1 - factor**2)) <= 0.3
    assert ((ll.pareto_k - (1 - factor**2)).abs() <= 0.3).double().mean() >= 0.9


def test_a_wide_guide_has_bounded_weights() -> None:
    ll = log_likelihood(WrongScale(1.5), torch.randn(40, 3), num_particles=5000, seed=0)
    assert (ll.pareto_k < 0).all()
    assert ll.share_above_threshold == 0


@pytest.mark.parametrize("particles", [25, 1000])
@pytest.mark.parametrize("scale", [0.5, 0.01])
def test_equal_weights_have_no_tail(scale: float, particles: int) -> None:
    pairs: list[Any] = [
        LinearGaussianVAE(5, 2, scale=scale),
        LinearGaussianMixtureVAE(5, pv.MixtureOfGaussians(3, 2), scale=scale),
    ]
    for pair in pairs:
        ll = log_likelihood(pair, torch.randn(7, 5), num_particles=particles, seed=0)
        assert (ll.pareto_k == -math.inf).all()
        assert ll.share_above_threshold == 0
        assert torch.equal(ll.smoothed, ll.per_datum)


def test_equal_weights_in_float32_have_none_either() -> None:
    torch.set_default_dtype(torch.float32)
    ll = log_likelihood(LinearGaussianVAE(50, 3), torch.randn(7, 50), num_particles=500, seed=0)
    assert (ll.pareto_k == -math.inf).all()
    assert ll.pareto_k.dtype == torch.float64


def test_few_weights_have_no_shape() -> None:
    ll = log_likelihood(WrongScale(0.5), torch.randn(4, 3), num_particles=24, seed=0)
    assert ll.pareto_k.isnan().all()
    assert math.isnan(ll.threshold)
    assert math.isnan(ll.share_above_threshold)
    assert torch.equal(ll.smoothed, ll.per_datum)
    assert not log_likelihood(WrongScale(0.5), torch.randn(4, 3), num_particles=25, seed=0).pareto_k.isnan().any()


def test_ties_and_zeros() -> None:
    # Three values only: four or fewer lie above the next one, or the tail is flat.
    steps = torch.zeros(100)
    steps[:3] = 1.0
    assert pareto_tail(steps.sort().values[-21:], 100, DOUBLE) == (math.inf, 0.0)
    steps[:40] = 1.0
    assert pareto_tail(steps.sort().values[-21:], 100, DOUBLE) == (-math.inf, 0.0)
    # Weights of zero are none of the tail's business; all of them zero is no tail at all.
    some = torch.randn(400, 1)
    some[200:] = -math.inf
    assert torch.isfinite(summary_of(some).pareto_k).all()
    assert summary_of(torch.full((400, 1), -math.inf)).pareto_k.isnan().all()


def test_tied_weights_keep_their_share_of_the_sum() -> None:
    log_weights = torch.cat([torch.zeros(200), torch.linspace(0.1, 3, 8)])
    k, change = pareto_tail(log_weights[-43:], 208, DOUBLE)
    assert math.isfinite(k)
    # Replacing eight weights by quantiles of a fit to them, with 34 ones beside them, moves the sum by little.
    assert abs(change) < 0.3


def test_shift_changes_nothing() -> None:
    log_weights = 2 * torch.randn(500, 3)
    near, far = summary_of(log_weights), summary_of(log_weights - 1e4)
    torch.testing.assert_close(near.pareto_k, far.pareto_k, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(near.smoothed - 1e4, far.smoothed, rtol=1e-12, atol=0)


def test_thresholds_and_the_worst() -> None:
    assert trust_threshold(100) == pytest.approx(0.5)
    assert trust_threshold(10**6) == 0.7
    assert [tail_size(k) for k in (24, 25, 100, 1000)] == [0, 5, 20, 95]
    x = torch.randn(30, 3)
    ll = log_likelihood(WrongScale(0.4), x, num_particles=200, seed=0)
    assert ll.share_above_threshold == float((ll.pareto_k > ll.threshold).double().mean()) > 0
    assert (ll.pareto_k[ll.worst].diff() <= 0).all()


def test_smoothing_comes_closer_where_the_tail_is_heavy() -> None:
    pair, x = WrongScale(0.45), repetitions(torch.randn(1, 3), 3000)
    ll = log_likelihood(pair, x, num_particles=200, seed=0)
    truth = pair.exact_log_likelihood(x[:1]).detach()
    raw, smooth = ((estimate - truth) ** 2 for estimate in (ll.per_datum, ll.smoothed))
    difference = raw - smooth
    assert float(difference.mean()) > 4 * float(difference.std()) / 3000**0.5


# The interval


@pytest.mark.parametrize("factor", [0.9, 1.1])
def test_the_interval_covers_as_often_as_it_says(factor: float) -> None:
    pair, x = WrongScale(factor), torch.randn(500, 3)
    ll = log_likelihood(pair, x, num_particles=1000, seed=0)
    truth = pair.exact_log_likelihood(x).detach()
    covered = ((ll.per_datum - truth).abs() <= 1.96 * ll.standard_error).double().mean()
    assert 0.92 <= float(covered) <= 0.98
    assert ll.share_above_threshold <= 0.02


# The curve


def test_the_curve_is_the_mean_over_disjoint_blocks() -> None:
    log_weights = torch.randn(11, 4)
    curve = summary_of(log_weights).curve
    for level, size in enumerate((1, 2, 4, 8)):
        blocks = [torch.logsumexp(block, 0) for block in log_weights.split(size) if len(block) == size]
        torch.testing.assert_close(curve[level], torch.stack(blocks).mean(0) - math.log(size), **ROUNDING)


@pytest.mark.parametrize("sizes", [[64], [1] * 64, [3, 40, 1, 20], [63, 1]])
def test_chunks_do_not_matter(sizes: list[int]) -> None:
    log_weights = 3 * torch.randn(64, 5)
    for whole, parts in zip(summary_of(log_weights), summary_of(log_weights, sizes), strict=True):
        torch.testing.assert_close(whole, parts, **ROUNDING)


def test_the_curve_rises_from_the_elbo_to_the_estimate() -> None:
    pair, x = WrongScale(0.6), torch.randn(300, 3)
    ll = log_likelihood(pair, x, num_particles=256, seed=0)
    truth = pair.exact_log_likelihood(x).detach()
    assert ll.curve.shape == (9, 300)
    torch.testing.assert_close(ll.curve[-1], ll.per_datum, **ROUNDING)
    gap = -math.log(pair.factor) + (pair.factor**2 - 1) / 2
    first = ll.curve[0] - truth
    assert abs(float(first.mean()) + gap) <= 4 * float(first.std()) / 300**0.5
    means, rises = ll.curve.mean(1), ll.curve.diff(dim=0)
    assert (means.diff() >= -4 * rises.std(1) / 300**0.5).all()
    assert (rises[:4] > -1e-12).all()  # Jensen holds block by block, draw by draw.


def test_one_particle_has_a_curve_of_one() -> None:
    ll = log_likelihood(WrongScale(0.6), torch.randn(3, 3), num_particles=1, seed=0)
    assert torch.equal(ll.curve[0], ll.per_datum)
    assert ll.curve.shape == (1, 3)
