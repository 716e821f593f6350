"""Estimates in low precision against closed forms, quadrature and float64, at thousands of nats."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyro_vae as pv
from pyro_vae.models import LinearGaussianVAE
from pyro_vae.pair.site import exact
from pyro_vae.pair.trace import trace_pair

SINGLE, DOUBLE = torch.float32, torch.float64


class Wide(pv.Pair):
    """z ~ N(0, 1), x ~ N(z w, 25 I) in 3072 dimensions; the guide's scale is a factor of the posterior's."""

    x_shape = (3072,)

    def __init__(self, dtype: torch.dtype, factor: float, likelihood: str) -> None:
        super().__init__()
        self.register_buffer("w", torch.linspace(-1, 1, 3072, dtype=dtype))
        self.factor, self.likelihood = factor, likelihood

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(self.w.new_zeros(()), self.w.new_ones(())))
            loc = z.unsqueeze(-1) * self.w
            p_x: Any = dist.Normal(loc, 5.0).to_event(1)
            if self.likelihood == "masked":
                p_x = dist.Normal(loc, 5.0).mask(torch.ones_like(loc, dtype=torch.bool)).to_event(1)
            if self.likelihood == "joint":
                factor = self.w.new_zeros(3072, 1)
                p_x = dist.LowRankMultivariateNormal(loc, factor, 25 * torch.ones_like(self.w))
            pyro.sample("x", p_x, obs=x)

    def guide(self, x: Tensor) -> None:
        variance = 1 / (1 + (self.w**2).sum() / 25)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(variance * (x @ self.w) / 25, self.factor * variance.sqrt()))


def data(count: int, offset: float = 0.0) -> Tensor:
    torch.manual_seed(0)
    x = 5 * torch.randn(count, 3072) + torch.randn(count, 1) * torch.linspace(-1, 1, 3072)
    return (x + offset).float()


def estimate(pair: pv.Pair, x: Tensor, num_particles: int = 300) -> pv.LogLikelihood:
    return pv.log_likelihood(pair, x, num_particles=num_particles, seed=2, progress=False, proposal="guide")


@pytest.mark.parametrize("likelihood", ["entries", "masked", "joint"])
@pytest.mark.parametrize(("factor", "offset"), [(0.5, 0.0), (0.4, 0.0), (0.5, 11.5), (0.4, 11.5)])
def test_heavy_tails_are_no_rounding_at_thousands_of_nats(factor: float, offset: float, likelihood: str) -> None:
    """True k is 1 − factor², 0.75 and 0.84; log-densities are −9300 nats, and −17 400 with the offset."""
    x = data(6, offset)
    for dtype in (SINGLE, DOUBLE):
        ll = estimate(Wide(dtype, factor, likelihood), x.to(dtype))
        assert abs(ll.mean + (17_400 if offset else 9300)) < 250
        assert ll.pareto_k.isfinite().all()
        # A spread of (1 + k)/√52 for one datum, and the shrinkage of k̂ towards ½, 10/62 of the way.
        assert abs(float(ll.pareto_k.mean()) - (1 - factor**2)) < 0.3


@pytest.mark.parametrize("factor", [0.4, 0.8, 1.5])
def test_float32_gives_the_numbers_of_float64(factor: float) -> None:
    """On equal draws, weights differ by the rounding of 3072 entries, means and draws: below 1e-3 nats here."""
    x = data(6)
    with pytest.MonkeyPatch.context() as patch:
        randn = torch.randn

        def normal(loc: Tensor, scale: Tensor) -> Tensor:
            return randn(loc.shape, dtype=SINGLE).to(loc.dtype) * scale + loc

        # Seeds hash the data's bytes, which differ by dtype: one seed for all here.
        patch.setattr(torch, "normal", normal)
        patch.setattr(
            pyro.distributions.Normal, "rsample", lambda d, shape=(): normal(*torch.broadcast_tensors(d.loc, d.scale))
        )
        patch.setattr(
            "pyro_vae.likelihood.importance.data_hashes", lambda batch: [str(i) for i in range(len(batch[0]))]
        )
        patch.setattr("pyro_vae.likelihood.importance.block_size", lambda run, count, device: (100, 2**20))
        single, double = (estimate(Wide(dtype, factor, "entries"), x.to(dtype)) for dtype in (SINGLE, DOUBLE))
    for name in ("per_datum", "standard_error", "smoothed", "curve", "curve_standard_error"):
        torch.testing.assert_close(getattr(single, name), getattr(double, name), rtol=0, atol=1e-3)
    torch.testing.assert_close(single.ess, double.ess, rtol=1e-3, atol=0)
    # k̂ divides by the quartile of the excesses.
    torch.testing.assert_close(single.pareto_k, double.pareto_k, rtol=0, atol=1e-2)


@pytest.mark.parametrize("dtype", [SINGLE, DOUBLE])
@pytest.mark.parametrize(("size", "scale"), [(5, 0.5), (5, 0.01), (50, 1.0), (3072, 1.0), (3072, 5.0)])
def test_an_exact_guide_has_equal_weights(dtype: torch.dtype, size: int, scale: float) -> None:
    torch.manual_seed(0)
    pair = LinearGaussianVAE(size, 2, scale=scale).to(dtype)
    noise = torch.randn(4, size, dtype=dtype)
    x = (torch.randn(4, 2, dtype=dtype) @ pair.weight.mT + scale * noise).detach()
    ll = estimate(pair, x)
    assert ll.pareto_k.isneginf().all()
    exact_value = copy.deepcopy(pair).double().exact_log_likelihood(x.double()).detach()
    # A thousand roundings of an entry of 1/scale deviations, and the closed form's rounding in float64.
    bound = 1e3 * torch.finfo(dtype).eps * size**0.5 / scale + 32 * torch.finfo(DOUBLE).eps * exact_value.abs()
    assert ((ll.per_datum - exact_value).abs() <= bound).all()


def test_entries_are_summed_in_float64_and_joint_densities_are_one_entry() -> None:
    trace = trace_pair(Wide(SINGLE, 0.5, "masked"), data(3), num_particles=2)
    x, joint = exact(trace.model)["x"], exact(trace_pair(Wide(SINGLE, 0.5, "joint"), data(3)).model)["x"]
    loc = trace.guide["z"].value.unsqueeze(-1) * torch.linspace(-1, 1, 3072, dtype=SINGLE)
    torch.testing.assert_close(
        x.log_prob, dist.Normal(loc, 5.0).log_prob(trace.data).double().sum(-1), rtol=1e-14, atol=0
    )
    assert (x.num_entries, x.entry_size, x.entry_dtype) == (3072, 1, SINGLE)
    assert (joint.num_entries, joint.entry_size, joint.log_prob.dtype) == (1, 3072, DOUBLE)
    # Training sums in the parameters' dtype.
    assert trace.x.log_prob.dtype is SINGLE


class Pixels(pv.Pair):
    """One latent, 784 Bernoulli pixels with logits that are affine in it."""

    x_shape = (784,)

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.w, self.b = (torch.nn.Parameter(0.3 * torch.randn(784)) for _ in range(2))
        self.loc, self.scale = torch.nn.Parameter(torch.zeros(())), torch.nn.Parameter(torch.tensor(0.125))

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(self.loc), torch.ones_like(self.loc)))
            pyro.sample("x", dist.Bernoulli(logits=self.b + z.unsqueeze(-1) * self.w).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.loc + (x - 0.5) @ self.w / 64, 2 * self.scale))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_refused_and_its_rounded_parameters_are_evaluated_in_float(dtype: torch.dtype) -> None:
    pair = Pixels().to(dtype)
    with pytest.raises(ValueError, match=r"too coarse for a log-density: call pair.float\(\)"):
        estimate(pair, torch.zeros(4, 784, dtype=dtype), 2000)
    pair = pair.float()
    x = (torch.rand(4, 784) < torch.sigmoid(pair.b.detach().double() + 0.5 * pair.w.detach().double())).float()
    ll = estimate(pair, x, 2000)
    z = torch.linspace(-6, 6, 12_001)
    logits = pair.b.detach().double() + z[:, None] * pair.w.detach().double()
    log_joint = -(torch.nn.functional.softplus(logits).sum(-1)[:, None] - logits @ x.double().mT)
    log_joint = log_joint + dist.Normal(0.0, 1.0).log_prob(z)[:, None]
    truth = torch.logsumexp(log_joint, 0) + math.log(12 / 12_000)
    assert (ll.per_datum - truth).abs().le(4 * ll.standard_error + 1e-3).all()
    assert ll.per_datum.dtype is DOUBLE


def test_integers_of_other_libraries_are_integers() -> None:
    pair, x = LinearGaussianVAE(5, 2), torch.randn(3, 5)
    plain = pv.log_likelihood(pair, x, num_particles=30, seed=3, memory=2**26)
    for kind in (np.int64, np.uint8, torch.tensor):
        other = pv.log_likelihood(pair, x, num_particles=kind(30), seed=kind(3), memory=2**26)
        assert torch.equal(other.per_datum, plain.per_datum)
        assert type(other.num_particles) is int
    for value in (True, np.True_, 3.0, "3", torch.tensor(True), torch.tensor(3.0)):
        with pytest.raises(ValueError, match="it must be a whole number"):
            pv.log_likelihood(pair, x, num_particles=value)  # type: ignore[arg-type]
