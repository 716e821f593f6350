"""A site lays its value out by particle and datum, whatever plates the program has, and puts it back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.torch_distribution import ExpandedDistribution
from torch import Tensor

from pyro_vae.distributions import OneHots
from pyro_vae.pair.pair import Pair
from pyro_vae.pair.site import Site, bare, is_point_mass
from pyro_vae.pair.trace import run_guide, run_model, trace_pair


class Plates(Pair):
    """A vector w per datum and one z for each of four nodes of a datum; data to the left or right of the nodes."""

    max_plate_nesting = 2
    x_shape = (4,)

    def __init__(self, data_dim: int) -> None:
        super().__init__()
        self.data_dim = data_dim

    def _sample(self, x: Tensor, *, model: bool) -> None:
        with pyro.plate("data", len(x), dim=self.data_dim):
            w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            with pyro.plate("nodes", 4, dim=-3 - self.data_dim):
                z = pyro.sample("z", dist.Normal(w.sum(-1), 1.0))
                if model:
                    pyro.sample("x", dist.Normal(z, 1.0), obs=x if self.data_dim == -2 else x.mT)

    def model(self, x: Tensor) -> None:
        self._sample(x, model=True)

    def guide(self, x: Tensor) -> None:
        self._sample(x, model=False)


@pytest.mark.parametrize("data_dim", [-1, -2])
def test_values_are_laid_out_by_particle_and_datum_and_put_back(data_dim: int) -> None:
    trace = trace_pair(Plates(data_dim), torch.randn(5, 4), num_particles=2)
    w, z, x = trace.guide["w"], trace.guide["z"], trace.x
    assert (w.value.shape, z.value.shape, x.value.shape) == ((2, 5, 3), (2, 5, 4), (2, 5, 4))
    assert (w.plates, z.plates) == (("particles", "data"), ("particles", "data", "nodes"))
    assert torch.equal(x.value, trace.data.expand(2, 5, 4))
    for site in (w, z):
        assert torch.equal(site.as_drawn(site.value), site.drawn)
        weights = torch.randn(2, 5)
        broadcast = site.lay_out(site.broadcast(weights) * torch.ones_like(site.drawn))
        assert torch.equal(broadcast, weights[..., None].expand_as(site.value))
    assert torch.equal(z.log_prob, dist.Normal(w.value.sum(-1, keepdim=True), 1.0).log_prob(z.value).sum(-1))


def test_a_site_without_a_plate_of_particles_has_no_such_axis() -> None:
    sites = run_guide(Plates(-2), torch.randn(5, 4))
    assert sites["z"].value.shape == (5, 4)
    assert sites["z"].log_prob.shape == (5,)


def test_held_values_are_scored_as_latents() -> None:
    pair, x = Plates(-2), torch.randn(5, 4)
    trace = trace_pair(pair, x, num_particles=2)
    values = {name: site.drawn for name, site in trace.guide.items()}
    for program, sites in ((run_guide, trace.guide), (run_model, trace.model)):
        again = program(pair, x, num_particles=2, values=values)
        assert all(torch.equal(again[name].log_prob, site.log_prob) for name, site in sites.items())
        assert all(again[name].is_observed == site.is_observed for name, site in sites.items())


def test_x_is_found_in_a_run_that_draws_it_anew() -> None:
    pair, x = Plates(-2), torch.randn(5, 4)
    (drawn,) = (site for site in run_model(pair, x, draw=("x",)).values() if site.observation is x)
    assert drawn.name == "x"
    assert not drawn.is_observed
    assert not torch.equal(drawn.drawn, x)


def named(site: Any) -> tuple[Any, ...]:
    return site.family, site.is_point_mass, site.is_discrete, site.is_reparameterised


def test_facts_are_of_the_distribution_without_its_wrappers() -> None:
    class Wrapped(Pair):
        x_shape = (2,)

        def model(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("c", dist.Bernoulli(0.5 * torch.ones(2)).to_event(1))
                pyro.sample("y", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).mask(False).to_event(1), obs=x)

        def guide(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("c", dist.Bernoulli(0.5 * torch.ones(2)).to_event(1))
                pyro.sample("y", dist.Delta(x).to_event(1))

    trace = trace_pair(Wrapped(), torch.randn(3, 2))
    assert named(trace.guide["c"]) == ("Bernoulli", False, True, False)
    assert named(trace.guide["y"]) == ("Delta", True, False, True)
    assert named(trace.x) == ("Normal", False, False, True)
    assert trace.point_masses == {"y"}
    assert list(trace.latents) == ["c"]
    assert list(trace.data_sites) == ["y", "x"]
    # A masked site counts nothing.
    assert torch.equal(trace.x.log_prob, torch.zeros(1, 3))


class Uniform(dist.TorchDistribution):
    """A distribution without ``expand``: Pyro wraps it where a plate is larger."""

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = dist.constraints.unit_interval
    has_rsample = True

    def __init__(self) -> None:
        super().__init__(torch.Size(()), validate_args=False)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        return torch.rand(torch.Size(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        return torch.zeros_like(value)


def test_a_distribution_that_pyro_expands_keeps_its_family() -> None:
    class Expanded(Pair):
        x_shape = ()

        def model(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", Uniform())
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        def guide(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("z", Uniform())

    trace = trace_pair(Expanded(), torch.randn(5), num_particles=3)
    site = trace.guide["z"]
    assert type(site.fn) is ExpandedDistribution
    assert named(site) == ("Uniform", False, False, True)
    assert site.value.shape == site.log_prob.shape == (3, 5)
    assert is_point_mass(ExpandedDistribution(dist.Delta(torch.zeros(())), torch.Size((5,))))


def test_a_subclass_of_a_wrapper_is_a_family_of_its_own() -> None:
    rows = OneHots(torch.zeros(2, 3))
    assert bare(rows) is rows
    assert bare(rows.mask(True)) is rows


class Stray(Pair):
    """A pair whose z has an axis of four outside every plate."""

    max_plate_nesting = 2
    x_shape = ()

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(4, 1), 1.0))
            pyro.sample("x", dist.Normal(z.sum(-2, keepdim=True), 1.0), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(4, 1), 1.0))


@pytest.mark.parametrize("read", [lambda site: site.value, lambda site: site.log_prob])
def test_an_axis_of_no_plate_is_refused(read: Callable[[Site], Tensor]) -> None:
    site = run_guide(Stray(), torch.randn(5))["z"]
    with pytest.raises(ValueError, match="site 'z' has 4 entries in dimension -2 of its batch, which belongs to no"):
        read(site)


@pytest.mark.parametrize("data_dim", [-1, -2])
def test_a_new_value_and_a_new_distribution_are_scored_in_place(data_dim: int) -> None:
    site = trace_pair(Plates(data_dim), torch.randn(5, 4), num_particles=2).guide["z"]
    value = torch.randn(2, 5, 4)
    other = site.replace(fn=dist.Normal(1.0, 2.0).expand(site.fn.batch_shape), drawn=site.as_drawn(value))
    assert torch.equal(other.value, value)
    torch.testing.assert_close(other.log_prob, dist.Normal(1.0, 2.0).log_prob(value).sum(-1))
    assert not torch.equal(site.drawn, other.drawn)


def test_a_partial_mask_counts_its_entries_alone() -> None:
    seen = torch.tensor([[True, False, True]])

    class Masked(Pair):
        x_shape = (3,)

        def model(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z.unsqueeze(-1), 1.0).mask(seen.expand_as(x)).to_event(1), obs=x)

        def guide(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(0.0, 1.0))

    x = torch.randn(4, 3)
    trace = trace_pair(Masked(), x, num_particles=2)
    each = dist.Normal(trace.guide["z"].value.unsqueeze(-1), 1.0).log_prob(x)
    torch.testing.assert_close(trace.x.log_prob, each[..., [0, 2]].sum(-1))
