"""95 % intervals cover the exact log p(x) in 95 % of repetitions, or the result says that they do not."""

from __future__ import annotations

import math

import pytest
import torch

import pyro_vae as pv
from benchmarks.accuracy.coverage import OffGuide
from pyro_vae.likelihood.estimate import LogLikelihood

DATA, REPEATS, PARTICLES = 300, 5, 1000


def estimates(ratio: float) -> tuple[list[LogLikelihood], float, float]:
    """Return estimates by a guide whose scale is off by a factor, the share of intervals that cover, and its error."""
    torch.manual_seed(0)
    pair = OffGuide(ratio)
    x = pv.generate(pair, DATA, seed=0).x
    exact = pair.exact_log_likelihood(x).detach()
    found = [
        pv.log_likelihood(pair, x, num_particles=PARTICLES, seed=seed, progress=False, proposal="guide")
        for seed in range(REPEATS)
    ]
    covered = torch.stack([(ll.per_datum - exact).abs() <= 1.96 * ll.standard_error for ll in found]).double()
    return found, float(covered.mean()), float(covered.std()) / math.sqrt(covered.numel())


@pytest.mark.parametrize("ratio", [1.3, 1.1, 0.9, 0.8])
def test_a_guide_of_finite_variance_has_honest_errors(ratio: float) -> None:
    found, coverage, error = estimates(ratio)
    # The delta method on a thousand skewed weights: a percent and a half at most beside the noise of 1500 intervals.
    assert 0.95 - 0.015 - 3 * error < coverage < 0.95 + 0.015 + 3 * error
    assert not any("error bars" in repr(ll) for ll in found)


@pytest.mark.parametrize("ratio", [0.7, 0.6, 0.4])
def test_errors_that_are_too_small_are_called_so(ratio: float) -> None:
    found, coverage, error = estimates(ratio)
    assert coverage + 3 * error < 0.95
    assert all("error bars" in repr(ll) and "too small" in repr(ll) for ll in found)


def test_the_mean_over_data_is_covered_where_errors_are_honest() -> None:
    torch.manual_seed(0)
    pair = OffGuide(0.9)
    x = pv.generate(pair, 20, seed=0).x
    exact = float(pair.exact_log_likelihood(x).detach().mean())
    repeats, inside = 100, 0
    for seed in range(repeats):
        ll = pv.log_likelihood(pair, x, num_particles=200, seed=seed, progress=False, proposal="guide")
        inside += abs(ll.mean - exact) <= 1.96 * ll.mean_monte_carlo_error
    # Three standard errors of a share of 100.
    assert abs(inside / repeats - 0.95) < 3 * math.sqrt(0.95 * 0.05 / repeats)
