"""A guide must cover its prior's support, no less and no more; the values are closed forms."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import pyro_vae as pv


class Code(pv.Pair):
    """z from a prior; x ~ N(w z, 1), w = 1."""

    x_shape = ()

    def __init__(self, prior: Any, guide: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.prior, self.q = prior, guide
        self.w = nn.Parameter(torch.ones((), dtype=torch.float64))

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.prior)
            pyro.sample("x", dist.Normal(self.w * z, 1.0), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.q(x))


X = torch.tensor([-1.0, 0.0, 0.5, 2.0], dtype=torch.float64)
ONE = torch.ones((), dtype=torch.float64)
NORMAL, EXPONENTIAL = dist.Normal(0 * ONE, ONE), dist.Exponential(ONE)

MISMATCHES = {
    "a normal guide leaves a half-line": (EXPONENTIAL, lambda x: dist.Normal(x.clamp(min=0), 1.0), "draws outside it"),
    "a normal guide leaves an interval": (dist.Uniform(0 * ONE, 3 * ONE), lambda x: dist.Normal(x, 1.0), "outside it"),
    "an interval misses tails": (NORMAL, lambda x: dist.Uniform(-2 + 0 * x, 2 + 0 * x), "never draws"),
    "a half-line misses half of the line": (NORMAL, lambda x: dist.Exponential(1 + 0 * x), "never draws"),
    "an interval of its data": (dist.Uniform(0 * ONE, 3 * ONE), lambda x: dist.Uniform(0 * x, 3 - x.abs()), "never"),
}


@pytest.mark.parametrize("case", MISMATCHES)
@pytest.mark.parametrize(
    "call",
    [
        lambda pair: pv.log_likelihood(pair, X, num_particles=10, seed=0, progress=False),
        lambda pair: pv.fit(pair, X, epochs=1, progress=False),
        lambda pair: pv.testing.check_pair(pair, X),
    ],
    ids=["log_likelihood", "fit", "check_pair"],
)
def test_another_support_is_refused_wherever_a_number_is_asked_for(case: str, call: Callable[[pv.Pair], Any]) -> None:
    prior, guide, fault = MISMATCHES[case]
    with pytest.raises(ValueError, match=f"site 'z'.*{fault}"):
        call(Code(prior, guide))


def test_the_same_support_by_another_family_gives_the_right_number() -> None:
    """∫ e^−z N(x; z, 1) dz over z > 0 is e^(1/2 − x) Φ(x − 1)."""
    pair = Code(EXPONENTIAL, lambda x: dist.LogNormal(0 * x - 0.5, 1.0))
    estimate = pv.log_likelihood(pair, X, num_particles=4000, seed=0, progress=False, proposal="guide")
    exact = 0.5 - X + torch.special.log_ndtr(X - 1)
    # Four standard errors: four data, each missed once in 16 000.
    assert (estimate.per_datum - exact).abs().le(4 * estimate.standard_error).all()


def test_ends_that_differ_by_no_mass_are_the_same_support() -> None:
    """Uniform has a closed interval, Beta an open one in some versions, and both are (0, 1)."""
    pair = Code(dist.Uniform(0 * ONE, ONE), lambda x: dist.Beta(1 + 0 * x, 1.0 + 0 * x))
    estimate = pv.log_likelihood(pair, X, num_particles=4000, seed=0, progress=False, proposal="guide")
    # ∫ N(x; z, 1) dz over (0, 1) is Φ(x) − Φ(x − 1).
    exact = (torch.special.ndtr(X) - torch.special.ndtr(X - 1)).log()
    assert (estimate.per_datum - exact).abs().le(4 * estimate.standard_error).all()
