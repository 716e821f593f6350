"""The effective sample size lies between one particle and all of them."""

from __future__ import annotations

import pytest
import torch

from pyro_vae.pair.weights import weight_sums


@pytest.mark.parametrize("equal", [1, 3, 8])
def test_equal_weights_count_and_vanishing_ones_do_not(equal: int) -> None:
    log_weights = torch.full((8, 2), -torch.inf)
    log_weights[:equal] = 700.0
    assert torch.allclose(weight_sums(log_weights).ess, torch.full((2,), float(equal)))


def test_it_is_the_squared_sum_over_the_sum_of_squares() -> None:
    log_weights = torch.randn(50, 3)
    weights = log_weights.exp()
    assert torch.allclose(weight_sums(log_weights).ess, weights.sum(0) ** 2 / weights.square().sum(0))
