"""Densities that are wrong, or report another volume than their Jacobian's, are refused with the way out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import transforms
from torch import Tensor

import pyro_vae as pv


class Stretch(dist.transforms.AffineTransform):
    """An affine map that forgets a share of its volume."""

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        volume: Tensor = super().log_abs_det_jacobian(x, y)
        return 0.9 * volume


class Prior(pv.Pair):
    """z ~ a prior that is given; x ~ N(z, 1); the guide is the same as the prior."""

    x_shape = (3,)

    def __init__(self, make: Callable[[], Any]) -> None:
        super().__init__()
        self.make, self.shift = make, torch.nn.Parameter(torch.zeros(3))
        made = make()
        layers = [part if isinstance(part, torch.nn.Module) else part.inv for part in getattr(made, "transforms", [])]
        self.layers = torch.nn.ModuleList(layer for layer in layers if isinstance(layer, torch.nn.Module))

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.make())
            pyro.sample("x", dist.Normal(z + self.shift, 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.make())


def base() -> Any:
    return dist.Normal(torch.zeros(3), torch.ones(3)).to_event(1)


def plain() -> Any:
    return dist.Normal(torch.zeros(3), torch.ones(3))


def transformed(layer: Any) -> Callable[[], Any]:
    return lambda: dist.TransformedDistribution(base(), [layer])


def matrix_exponential(norm: float) -> Callable[[], Any]:
    layer = transforms.matrix_exponential(3)
    with torch.no_grad():
        weights = torch.randn(3, 3, generator=torch.Generator().manual_seed(0))
        layer.weights.copy_(norm * weights / torch.linalg.matrix_norm(weights, 2))
    return transformed(layer)


def mixture(make: Callable[[], Any]) -> Callable[[], Any]:
    return lambda: dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), make().expand((2,)))


WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "a share of the volume": (
        lambda: dist.TransformedDistribution(plain(), [Stretch(0.0, 2.0)]).to_event(1),
        r"site 'z': the density of a draw is off by 0\.0693 nats .*\(Stretch\)",
    ),
    "a joint map": (
        lambda: dist.TransformedDistribution(base(), [Stretch(0.0, 2.0, event_dim=1)]),
        r"off by 0\.208 nats",
    ),
    "inside a mixture": (
        mixture(lambda: dist.TransformedDistribution(base(), [Stretch(0.0, 2.0, event_dim=1)])),
        r"off by 0\.208 nats",
    ),
    "Pyro's Sylvester": (transformed(transforms.sylvester(3)), r"use pv\.Sylvester"),
    "matrix exponential of norm 5": (matrix_exponential(5.0), "matrix exponential among its transforms"),
    "matrix exponential that is still small": (matrix_exponential(0.1), "matrix exponential among its transforms"),
}
# Elementwise, joint, autoregressive, scaled between 1e-6 and 1e6, near-singular: the check must not take rounding for
# an error.
torch.manual_seed(0)
SOUND: dict[str, Callable[[], Any]] = {
    "log-normal": lambda: dist.LogNormal(torch.zeros(3), 2.0 * torch.ones(3)).to_event(1),
    "half a normal": lambda: dist.HalfNormal(torch.ones(3)).to_event(1),
    "Gumbel": lambda: dist.Gumbel(torch.zeros(3), 1.0).to_event(1),
    "Weibull": lambda: dist.Weibull(torch.ones(3), 1.5).to_event(1),
    "Kumaraswamy": lambda: dist.Kumaraswamy(torch.ones(3), 2 * torch.ones(3)).to_event(1),
    "from the simplex's interior": lambda: dist.TransformedDistribution(
        dist.Normal(torch.zeros(2), torch.ones(2)).to_event(1), [dist.transforms.StickBreakingTransform()]
    ),
    "tiny and large scales": lambda: dist.TransformedDistribution(
        base(), [dist.transforms.AffineTransform(0.0, torch.tensor([1e-6, 1.0, 1e6]), event_dim=1)]
    ),
    "affine autoregressive": transformed(transforms.affine_autoregressive(3)),
    "its inverse": transformed(transforms.affine_autoregressive(3).inv),
    "spline coupling": transformed(transforms.spline_coupling(3)),
    "batch norm": transformed(transforms.batchnorm(3).eval()),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_volume_is_refused(name: str, dtype: torch.dtype) -> None:
    torch.set_default_dtype(dtype)
    make, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        pv.log_likelihood(Prior(make).to(dtype), torch.zeros(4, 3), num_particles=2, progress=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", SOUND)
def test_rounding_is_no_wrong_volume(name: str, dtype: torch.dtype) -> None:
    torch.set_default_dtype(dtype)
    pair = Prior(SOUND[name]).to(dtype)
    pv.log_likelihood(pair, torch.zeros(4, 3), num_particles=30, seed=0, progress=False)


class Gray(pv.Pair):
    """One z; x from torch's continuous Bernoulli."""

    x_shape = (2,)

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.ContinuousBernoulli(logits=z.expand(*z.shape[:-1], 2)).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.mean(-1, keepdim=True), 1.0).to_event(1))


def test_torchs_continuous_bernoulli_is_refused_with_the_exact_one() -> None:
    with pytest.raises(
        ValueError, match=r"model's site 'x' is torch's ContinuousBernoulli.* use pyro_vae\.distributions"
    ):
        pv.log_likelihood(Gray(), torch.rand(4, 2), num_particles=2)
