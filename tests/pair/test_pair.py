"""The contract of a pair: what its log-terms sum, what it refuses, and that its parameters are its own."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.inspection.data import check_batch
from pyro_vae.models import LinearGaussianMixtureVAE, LinearGaussianVAE, LinearTwoStageVAE
from pyro_vae.pair.pair import Pair
from pyro_vae.pair.trace import log_terms, site_terms

# Cholesky factors of small, well-conditioned matrices: rounding stays below 1e-11 relative.
ROUNDING = {"rtol": 1e-10, "atol": 1e-10}


class Coin(Pair):
    """z ~ N(0, 1), x ~ N(z, 1), the guide off the posterior."""

    x_shape = ()

    def __init__(self) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.tensor(0.3))

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.loc, 0.7))


def exact_pairs() -> list[Any]:
    prior = pv.MixtureOfGaussians(3, 2, weights=torch.rand(3) + 0.2)
    return [
        LinearGaussianVAE(5, 2),
        LinearGaussianMixtureVAE(5, prior),
        LinearTwoStageVAE(6, 2, copy.deepcopy(prior), 2),
    ]


@pytest.mark.parametrize("particles", [1, 4])
@pytest.mark.parametrize("index", range(3))
def test_exact_pairs_have_one_weight_for_every_particle(index: int, particles: int) -> None:
    pair = exact_pairs()[index]
    x = torch.randn(7, *pair.x_shape)
    terms = log_terms(pair, x, num_particles=particles)
    assert terms.log_lik.shape == terms.log_prior.shape == terms.log_guide.shape == (particles, 7)
    exact = pair.exact_log_likelihood(x).expand(particles, 7)
    torch.testing.assert_close(terms.log_weights, exact, **ROUNDING)
    torch.testing.assert_close(terms.log_lik + terms.log_prior - terms.log_guide, exact, **ROUNDING)


@pytest.mark.parametrize("index", range(3))
def test_site_terms_sum_to_log_terms(index: int) -> None:
    pair = exact_pairs()[index]
    x = torch.randn(4, *pair.x_shape)
    with torch.random.fork_rng(devices=[]):
        terms = log_terms(pair, x, num_particles=3)
    by_site = site_terms(pair, x, num_particles=3)
    data = {"x", "y"} & set(by_site)
    assert by_site["x"].log_guide.eq(0).all()
    assert all(term.shape == (3, 4) for site in by_site.values() for term in site)
    torch.testing.assert_close(sum(by_site[name].log_model for name in data), terms.log_lik)
    torch.testing.assert_close(sum(t.log_model for n, t in by_site.items() if n not in data), terms.log_prior)
    torch.testing.assert_close(sum(t.log_guide for t in by_site.values()), terms.log_guide)


def test_site_terms_are_the_sites_own_densities() -> None:
    pair, x = Coin(), torch.randn(3)
    with torch.random.fork_rng(devices=[]):
        z = poutine.trace(pair.guide).get_trace(x).nodes["z"]["value"]
    terms = site_terms(pair, x)
    torch.testing.assert_close(terms["z"].log_model[0], dist.Normal(0.0, 1.0).log_prob(z))
    torch.testing.assert_close(terms["z"].log_guide[0], dist.Normal(0.3, 0.7).log_prob(z))
    torch.testing.assert_close(terms["x"].log_model[0], dist.Normal(z, 1.0).log_prob(x))


def test_a_point_mass_counts_as_data() -> None:
    pair = exact_pairs()[2]
    x = torch.randn(4, 6)
    with torch.random.fork_rng(devices=[]):
        terms = log_terms(pair, x, num_particles=3)
    by_site = site_terms(pair, x, num_particles=3)
    # The point mass itself adds log 1 to the guide; its density under the model is a data term.
    assert by_site["y"].log_guide.eq(0).all()
    torch.testing.assert_close(terms.log_lik, by_site["x"].log_model + by_site["y"].log_model)


class Nodes(Pair):
    """Five nodes per datum in a plate of their own, z_bn ~ N(0, 1), x_bn ~ N(z_bn, 1), with the exact posterior."""

    max_plate_nesting = 2
    x_shape = (5,)

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-2), pyro.plate("nodes", 5, dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-2), pyro.plate("nodes", 5, dim=-1):
            pyro.sample("z", dist.Normal(x / 2, math.sqrt(0.5)))


class NodesLeft(Nodes):
    """The same with the nodes' plate to the left of the data's."""

    def model(self, x: Tensor) -> None:
        with pyro.plate("nodes", 5, dim=-2), pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x.mT)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("nodes", 5, dim=-2), pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x.mT / 2, math.sqrt(0.5)))


@pytest.mark.parametrize("kind", [Nodes, NodesLeft])
def test_other_plates_are_summed(kind: type[Pair]) -> None:
    x = torch.randn(3, 5)
    terms = log_terms(kind(), x, num_particles=4)
    exact = dist.Normal(0.0, math.sqrt(2.0)).log_prob(x).sum(-1)
    assert terms.log_lik.shape == terms.log_prior.shape == terms.log_guide.shape == (4, 3)
    torch.testing.assert_close(terms.log_weights, exact.expand(4, 3), **ROUNDING)
    torch.testing.assert_close(pv.log_likelihood(kind(), x, num_particles=5, seed=0).per_datum, exact, **ROUNDING)


class Faulty(Coin):
    """A coin with one fault of those that would make weights silently wrong."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault = fault

    def model(self, x: Tensor) -> None:
        subsample = 1 if self.fault == "subsampled" else None
        if self.fault == "outside":
            pyro.sample("shift", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x), subsample_size=subsample) as rows:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            if self.fault == "missing":
                z = z + pyro.sample("forgotten", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x if subsample is None else x[rows])

    def guide(self, x: Tensor) -> None:
        subsample = 1 if self.fault == "subsampled" else None
        if self.fault == "outside":
            pyro.sample("shift", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x), subsample_size=subsample):
            pyro.sample("z", dist.Normal(self.loc, 0.7))
            if self.fault == "extra":
                pyro.sample("unknown", dist.Normal(0.0, 1.0))


@pytest.mark.parametrize("function", [log_terms, site_terms])
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("missing", r"model samples \['forgotten'\], the guide does not"),
        ("extra", r"guide samples \['unknown'\], which is no latent site"),
        ("outside", r"site 'shift' lies outside the data plate: sample .* inside pyro.plate\('data', len\(x\)\)"),
        ("subsampled", r"plate 'data' subsamples: write pyro.plate\('data', len\(x\)\)"),
    ],
)
def test_faults_are_named(fault: str, message: str, function: Any) -> None:
    with pytest.raises(ValueError, match=message):
        function(Faulty(fault), torch.randn(3))


@pytest.mark.parametrize("particles", [0, -1])
def test_at_least_one_particle(particles: int) -> None:
    with pytest.raises(ValueError, match=rf"num_particles is {particles}; .* at least 1"):
        log_terms(Coin(), torch.randn(3), num_particles=particles)


def test_scales_around_a_pair_are_refused() -> None:
    # Taken off in silence, they would leave an objective on log-terms without the weights that were asked for.
    with poutine.scale(scale=100.0), pytest.raises(ValueError, match="is scaled inside the pair or around the call"):
        log_terms(exact_pairs()[0], torch.randn(4, 5), num_particles=2)


def test_masks_do_enter() -> None:
    class Masked(Coin):
        def model(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                with poutine.mask(mask=x > 0):
                    pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.tensor([-1.0, 2.0, -3.0])
    assert log_terms(Masked(), x).log_lik[0].ne(0).tolist() == [False, True, False]


# Copies


def same(first: nn.Module, second: nn.Module) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "state_dict"])
def test_copies_agree_and_share_nothing(how: str) -> None:
    pair = exact_pairs()[2]
    if how == "deepcopy":
        other = copy.deepcopy(pair)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(pair))
    else:
        other = exact_pairs()[2]
        assert not same(pair, other)
        other.load_state_dict(pair.state_dict())
    x = torch.randn(4, 6)
    with torch.random.fork_rng(devices=[]):
        expected = log_terms(pair, x, num_particles=2)
    assert same(pair, other)
    found = log_terms(other, x, num_particles=2)
    assert all(torch.equal(getattr(found, n), getattr(expected, n)) for n in ("log_lik", "log_prior", "log_guide"))
    before = copy.deepcopy(pair)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1.0)
    assert same(pair, before)


def test_two_pairs_of_a_class_share_no_parameter() -> None:
    first, second = LinearGaussianVAE(4, 2), LinearGaussianVAE(4, 2)
    assert not {id(p) for p in first.parameters()} & {id(p) for p in second.parameters()}
    x = torch.randn(3, 4)
    for pair in (first, second):
        trace = poutine.trace(pair.guide).get_trace(x)
        own = {site["value"].unconstrained() for site in trace.nodes.values() if site["type"] == "param"}
        assert {id(p) for p in own} == {id(p) for p in pair.parameters()}


def test_programs_are_found_on_the_class_as_plain_functions() -> None:
    pair = Coin()
    assert callable(Coin.model)
    assert not isinstance(Coin.model, nn.Module)
    assert isinstance(pair.model, nn.Module)
    # The programs are made anew at every access and are no submodules: a pair's state is its parameters' only.
    assert list(pair.state_dict()) == ["loc"]
    assert [name for name, _ in pair.named_modules()] == [""]


# Batches


def test_check_batch_accepts_what_fits() -> None:
    check_batch(LinearGaussianVAE(3, 1), (torch.zeros(2, 3),))
    check_batch(LinearGaussianVAE(3, 1).float(), (torch.zeros(2, 3, dtype=torch.float32), torch.arange(2)))


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (lambda: (), "x must be a tensor"),
        (lambda: ([1.0, 2.0, 3.0],), "x is a list: pass one tensor"),
        (lambda: (torch.zeros(2, 4),), r"x has shape \(2, 4\); LinearGaussianVAE expects \(N, 3\)"),
        (lambda: (torch.zeros(3),), r"x has shape \(3,\); LinearGaussianVAE expects \(N, 3\)"),
        (lambda: (torch.zeros(0, 3),), "x holds no data"),
        (lambda: (torch.zeros(2, 3), torch.zeros(3)), r"\[2, 3\] rows; they must be equal"),
        (lambda: (torch.zeros(2, 3).float(),), r"torch.float32, .* computes with torch.float64: use x.to"),
        (lambda: (torch.zeros(2, 3).byte(),), r"torch.uint8, .* computes with torch.float64"),
        (
            lambda: (torch.tensor([[0.0, 0, 0], [0, NAN, 0]]),),
            r"has 1 NaN or infinite value, the first at index \(1, 1\)",
        ),
        (lambda: (torch.tensor([[0.0, 0, INF], [0, NAN, 0]]),), r"has 2 NaN or infinite values, .* index \(0, 2\)"),
        (lambda: (torch.zeros(2, 3), torch.tensor([0.0, NAN])), r"1 NaN or infinite value, .* index \(1,\)"),
    ],
)
def test_check_batch_says_what_is_wrong(batch: Callable[[], tuple[Any, ...]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_batch(LinearGaussianVAE(3, 1), batch())


def test_check_batch_names_its_argument() -> None:
    with pytest.raises(ValueError, match=r"^validation holds no data"):
        check_batch(LinearGaussianVAE(3, 1), (torch.zeros(0, 3),), "validation")


def test_a_pair_may_take_data_of_its_own_type() -> None:
    class Tokens(Coin):
        x_dtype = torch.int64

    check_batch(Tokens(), (torch.arange(3),))
    with pytest.raises(ValueError, match=r"computes with torch\.int64"):
        check_batch(Tokens(), (torch.zeros(3),))


class StrayDimension(Coin):
    """A pair with a plate of its own whose observed site puts the particles where that plate would be."""

    max_plate_nesting = 2

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            with pyro.plate("nodes", 4, dim=-2):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z.sum(-2), 1.0), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1), pyro.plate("nodes", 4, dim=-2):
            pyro.sample("z", dist.Normal(self.loc, 0.7))


def test_a_batch_dimension_of_no_plate_is_refused_instead_of_summed() -> None:
    with pytest.raises(ValueError, match="site 'x' has 3 entries in dimension -2 of its batch, which belongs to no"):
        log_terms(StrayDimension(), torch.randn(5), num_particles=3)
