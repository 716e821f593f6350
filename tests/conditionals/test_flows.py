"""Flows: every density against the Jacobian, those that invert against quadrature; priors must score any point."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from pyro.distributions import transforms
from torch import Tensor, nn
from torch.distributions import Normal

import pyro_vae as pv
from pyro_vae.conditionals.posteriors import DiagonalGaussian
from pyro_vae.distributions.flow import SCORING, FlowDistribution, NoInverseError

SIZE, CONTEXT = 4, 3
LAYERS: dict[str, Callable[[int], nn.Module]] = {
    "householder": lambda size: transforms.householder(size, 2),
    "planar": transforms.planar,
    "radial": transforms.radial,
    "sylvester": lambda size: pv.Sylvester(size, 1),
    "sylvester, two reflections": lambda size: pv.Sylvester(size, 2),
    "affine_autoregressive": transforms.affine_autoregressive,
    "stable affine_autoregressive": lambda size: transforms.affine_autoregressive(size, stable=True),
    "affine_coupling": transforms.affine_coupling,
    "spline": transforms.spline,
    "spline_coupling": transforms.spline_coupling,
    "reversal": pv.Reversal,
    "conditional_householder": lambda size: transforms.conditional_householder(size, CONTEXT, [8]),
    "conditional_planar": lambda size: transforms.conditional_planar(size, CONTEXT, [8]),
    "conditional_radial": lambda size: transforms.conditional_radial(size, CONTEXT, [8]),
    "conditional_affine_autoregressive": lambda size: transforms.conditional_affine_autoregressive(size, CONTEXT, [8]),
    "conditional_affine_coupling": lambda size: transforms.conditional_affine_coupling(size, CONTEXT, [8]),
}
WITHOUT_INVERSE = [name for name in LAYERS if "planar" in name or "radial" in name or "sylvester" in name]
# Pyro's splines add 1e-6 to slopes and square roots, which is what their two directions differ by.
TOLERANCE = {"spline": 1e-7, "spline_coupling": 1e-7}


def strong(layers: list[nn.Module], std: float = 0.5) -> list[nn.Module]:
    """Give layers larger parameters: as Pyro begins them, some are the identity up to hundredths."""
    for layer in layers:
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=std)
    return layers


def posterior_of(name: str) -> pv.FlowPosterior:
    layers = strong([LAYERS[name](SIZE) for _ in range(2)])
    return pv.FlowPosterior(layers, CONTEXT if name.startswith("conditional") else 0)


@pytest.mark.parametrize("name", LAYERS)
def test_the_density_of_a_draw_is_the_bases_over_the_jacobian(name: str) -> None:
    head = posterior_of(name)
    outputs = torch.randn(5, head.num_outputs((SIZE,)))
    flow = head(outputs, (SIZE,))
    z = flow.rsample()
    density = flow.log_prob(z)
    base = DiagonalGaussian()(outputs[:, : 2 * SIZE], (SIZE,))
    assert isinstance(flow, FlowDistribution)
    start = z
    # The draw's way back is in the transforms' caches, for those too that have no inverse.
    for part in reversed(flow.transforms):
        start = part.inv(start)
    for i in range(5):

        def forth(z0: Tensor, i: int = i) -> Tensor:
            for part in head.flow.transforms(outputs[i : i + 1, 2 * SIZE :]):
                z0 = part(z0)
            return z0

        jacobian = torch.autograd.functional.jacobian(forth, start[i : i + 1].detach()).reshape(SIZE, SIZE)
        exact = base.log_prob(start)[i] - torch.linalg.slogdet(jacobian).logabsdet
        tolerance = TOLERANCE.get(name, 1e-10)
        torch.testing.assert_close(density[i], exact, rtol=tolerance, atol=tolerance)


def grid(half_width: float, points: int) -> tuple[Tensor, float]:
    """Return the points of a square grid, (N, 2), and the area of a cell."""
    line = torch.linspace(-half_width, half_width, points)
    return torch.cartesian_prod(line, line), float(line[1] - line[0]) ** 2


@pytest.mark.parametrize("name", SCORING)
def test_a_prior_integrates_to_one_and_has_the_mean_of_its_draws(name: str) -> None:
    # A trapezoid rule on densities that vanish at the edge. It is exact to rounding where they are smooth; the kinks of
    # a coupling's ReLU leave 1e-6 at this spacing, those of a spline's slope and the bins' edges 6e-4.
    prior = pv.FlowPrior(2, strong([LAYERS[name](2), pv.Reversal(2), LAYERS[name](2)], std=0.15))
    z, area = grid(10.0, 401)
    with torch.no_grad():
        density = prior().log_prob(z).exp()
        base, base_area = grid(8.0, 321)
        pushed = base
        for part in prior().transforms:
            pushed = part(pushed)
        mean = (pushed * Normal(0.0, 1.0).log_prob(base).sum(-1).exp().unsqueeze(-1)).sum(0) * base_area
        tolerance = 1e-3 if "spline" in name else 1e-5
        torch.testing.assert_close(density.sum() * area, torch.ones(()), rtol=0, atol=tolerance)
        torch.testing.assert_close((z * density.unsqueeze(-1)).sum(0) * area, mean, rtol=0, atol=10 * tolerance)


def test_pyros_own_sylvester_misses_its_jacobian_and_ours_does_not() -> None:
    ours = strong([pv.Sylvester(SIZE, 2)])[0]
    theirs = transforms.Sylvester(SIZE, 2)
    theirs.load_state_dict(ours.state_dict())
    z = torch.randn(6, SIZE)
    errors = []
    for flow in (ours, theirs):
        volume = torch.stack(
            [torch.linalg.slogdet(torch.autograd.functional.jacobian(flow, each)).logabsdet for each in z]
        )
        errors.append(float((flow.log_abs_det_jacobian(z, flow(z)) - volume).abs().max().detach()))
    assert errors[0] < 1e-12
    assert errors[1] > 0.01


def test_a_call_keeps_nothing_of_the_one_before() -> None:
    head = posterior_of("stable affine_autoregressive")
    before = {name: dict(vars(module)) for name, module in head.named_modules()}
    head(torch.randn(5, head.num_outputs((SIZE,))), (SIZE,)).rsample()
    for name, module in head.named_modules():
        assert all(vars(module)[key] is value for key, value in before[name].items()), name


def test_a_copy_of_a_flow_has_parameters_of_its_own() -> None:
    head = posterior_of("planar")
    other = copy.deepcopy(head)
    outputs = torch.randn(5, head.num_outputs((SIZE,)))
    draws = []
    for each in (head, strong([other])[0]):
        torch.manual_seed(0)
        draws.append(each(outputs, (SIZE,)).rsample())
    assert not torch.allclose(*draws)


# What is refused


@pytest.mark.parametrize("name", WITHOUT_INVERSE)
def test_flows_without_an_inverse_score_their_own_draws_only(name: str) -> None:
    head = posterior_of(name)
    flow = head(torch.randn(5, head.num_outputs((SIZE,))), (SIZE,))
    z = flow.rsample()
    flow.log_prob(z)
    with pytest.raises(NoInverseError, match=r"has no inverse .*affine_coupling, affine_autoregressive"):
        flow.log_prob(z.clone())


@pytest.mark.parametrize("name", [name for name in WITHOUT_INVERSE if not name.startswith("conditional")])
def test_flows_without_an_inverse_are_refused_as_priors(name: str) -> None:
    with pytest.raises(ValueError, match=r"not to be used as a prior.*score any point are those of affine_coupling"):
        pv.FlowPrior(SIZE, [LAYERS["affine_coupling"](SIZE), LAYERS[name](SIZE)])


def test_bad_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="a prior has no context"):
        pv.FlowPrior(SIZE, [LAYERS["conditional_affine_coupling"](SIZE)])
    with pytest.raises(ValueError, match="does not take vectors of size 4"):
        pv.FlowPrior(SIZE, [LAYERS["affine_coupling"](5)])
    with pytest.raises(ValueError, match="needs a context"):
        pv.FlowPosterior([LAYERS["conditional_planar"](SIZE)])
    with pytest.raises(ValueError, match="context is -1"):
        pv.FlowPosterior([], -1)
    with pytest.raises(ValueError, match=r"Linear is no module of pyro\.distributions\.transforms"):
        pv.FlowPosterior([nn.Linear(4, 4)])
    with pytest.raises(ValueError, match="its last dimension must be 8"):
        pv.FlowPosterior([])(torch.zeros(5, 7), (SIZE,))
