"""Reconstruction terms against the densities of their distributions."""

from __future__ import annotations

from collections.abc import Callable

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_vae.distributions.batch_optimal import BatchOptimalNormal
from pyro_vae.distributions.discretised_logistic import DiscretisedLogistic
from pyro_vae.objectives.reconstruction import (
    gaussian_reconstruction,
    mse_reconstruction,
    optimal_scale_reconstruction,
    reconstruction,
)
from tests.support.images import gray

LOG_2PI = 1.8378770664093453
ROUNDING = {"rtol": 1e-10, "atol": 1e-12}


LIKELIHOODS: dict[str, Callable[[], tuple[dist.TorchDistribution, Tensor]]] = {
    "Gaussian": lambda: (dist.Normal(torch.randn(6, 5), torch.rand(5) + 0.1), torch.randn(6, 5)),
    "Bernoulli": lambda: (dist.Bernoulli(logits=8 * torch.randn(6, 5)), gray(2, 6, 5)),
    "continuous Bernoulli": lambda: (dist.ContinuousBernoulli(logits=3 * torch.randn(6, 5)), torch.rand(6, 5)),
    "discretised logistic, 17": lambda: (
        DiscretisedLogistic(torch.rand(6, 5), 0.3 * torch.rand(6, 5) + 0.01, 17),
        gray(17, 6, 5),
    ),
    "discretised logistic, 256": lambda: (
        DiscretisedLogistic(torch.rand(6, 5), 0.1 * torch.rand(6, 5) + 0.001, 256),
        gray(256, 6, 5),
    ),
    "batch-optimal Gaussian": lambda: (
        BatchOptimalNormal(torch.randn(6, 5), 1e-3, lambda _: None),
        torch.randn(6, 5),
    ),
}


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_reconstruction_is_minus_the_log_density(name: str) -> None:
    distribution, x = LIKELIHOODS[name]()
    event = distribution.to_event(1)
    torch.testing.assert_close(reconstruction(event, x), -event.log_prob(x), **ROUNDING)
    torch.testing.assert_close(reconstruction(event.mask(True), x), -event.log_prob(x), **ROUNDING)


def test_bernoulli_reconstruction_at_large_logits() -> None:
    logits = torch.linspace(-40, 40, 81)
    for x in (torch.zeros(81), torch.ones(81)):
        pmf = dist.Bernoulli(logits=logits)
        # A difference of two numbers up to 40 is rounded by 1e-14 or so; torch's softplus drops e^{−l} from l = 20 on,
        # an error of 2e-9.
        torch.testing.assert_close(reconstruction(pmf, x), -pmf.log_prob(x), rtol=0, atol=1e-13)


def test_continuous_bernoulli_reconstruction_through_its_removable_singularity() -> None:
    magnitudes = torch.tensor([0.0, 1e-12, 1e-8, 1e-5, 0.999e-3, 1.001e-3, 3.9e-3, 4.1e-3, 0.1])
    logits = torch.cat([-magnitudes, magnitudes])
    x = torch.rand(18)
    pmf = dist.ContinuousBernoulli(logits=logits)
    # Near 0 the loss is a difference of numbers near log 2 that comes out near 0, so that rounding is absolute; torch
    # loses up to five digits more in log(1 − 2λ) beside λ = ½.
    torch.testing.assert_close(reconstruction(pmf, x), -pmf.log_prob(x), rtol=0, atol=1e-11)
    # The density is normalised: its trapezoid integral errs by h²/12 times a slope difference below 0.1.
    grid = torch.linspace(0, 1, 2001).unsqueeze(-1)
    total = torch.trapezoid(torch.exp(-reconstruction(pmf, grid)), dx=1 / 2000, dim=0)
    torch.testing.assert_close(total, torch.ones(18), rtol=0, atol=0.1 / (12 * 2000**2))


def test_reconstruction_refuses_a_distribution_without_a_formula() -> None:
    with pytest.raises(ValueError, match="Laplace"):
        reconstruction(dist.Laplace(torch.zeros(3), torch.ones(3)).to_event(1), torch.zeros(3))


def test_gaussian_reconstruction_with_and_without_its_constant() -> None:
    x, mean = torch.randn(6, 3, 2), torch.randn(6, 3, 2)
    for scale in (0.3, torch.tensor(2.0), torch.rand(3, 2) + 0.1):
        normal = dist.Normal(mean, torch.as_tensor(scale)).to_event(2)
        full = gaussian_reconstruction(x, mean, scale, event_dim=2)
        torch.testing.assert_close(full, -normal.log_prob(x), **ROUNDING)
        short = gaussian_reconstruction(x, mean, scale, event_dim=2, include_constant=False)
        torch.testing.assert_close(full - short, torch.full((6,), 6 / 2 * LOG_2PI), **ROUNDING)


def test_mse_form_is_the_gaussian_form_without_its_constant() -> None:
    x, mean = torch.randn(6, 3, 2), torch.randn(6, 3, 2)
    for scale in (0.3, 1.0, 2.0):
        expected = gaussian_reconstruction(x, mean, scale, event_dim=2, include_constant=False)
        torch.testing.assert_close(mse_reconstruction(x, mean, scale, event_dim=2), expected, **ROUNDING)


def test_optimal_scale_minimises_the_gaussian_form() -> None:
    x, mean = torch.randn(6, 5), torch.randn(6, 5)
    mse = ((x - mean) ** 2).mean()
    scale = mse.sqrt().requires_grad_()
    best = gaussian_reconstruction(x, mean, scale).mean()
    torch.testing.assert_close(optimal_scale_reconstruction(mse, 5), best.detach(), **ROUNDING)
    (slope,) = torch.autograd.grad(best, scale)
    # Two terms k/γ of size 5 or so cancel: what is left is their rounding.
    torch.testing.assert_close(slope, torch.zeros(()), rtol=0, atol=1e-12)
    for ratio in (0.5, 0.9, 0.999, 1.001, 1.1, 2.0):
        assert gaussian_reconstruction(x, mean, ratio * scale).mean() > best
