"""check_pair tells a user's pair what is wrong with it, and the contract's test class says the same."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.testing import PairContract, check_pair


def digits(size: int = 5) -> Tensor:
    return torch.randint(0, 17, (size, 1, 4, 4)) / 16


def small_vae(**networks: nn.Module) -> pv.models.VAE:
    return pv.models.VAE((1, 4, 4), pv.StandardNormal(2), pv.Gaussian(), **networks)


class Scalar(pv.Pair):
    """z ~ N(0, 1), x ~ N(z, 1): the pair that each broken one below differs from in one line."""

    x_shape = ()

    def __init__(self) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(()))

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(self.loc, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.7))


class LacksLatent(Scalar):
    def guide(self, x: Tensor) -> None:
        pass


class OutsidePlate(Scalar):
    def model(self, x: Tensor) -> None:
        scale = pyro.sample("scale", dist.LogNormal(self.loc, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, scale))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        super().guide(x)


class Subsamples(Scalar):
    def model(self, x: Tensor) -> None:
        with pyro.plate("data", 100, subsample_size=len(x)):
            z = pyro.sample("z", dist.Normal(self.loc, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)


class ReadsX(Scalar):
    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(self.loc, 1.0))
            pyro.sample("x", dist.Normal(0.5 * z + 0.5 * x, 1.0), obs=x)


class CouplesData(Scalar):
    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x - x.mean(), 0.7))


class UsesStore(Scalar):
    def guide(self, x: Tensor) -> None:
        scale = pyro.param("stored_scale", torch.tensor(0.7))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, scale))


class ObservesNothing(Scalar):
    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.loc, 1.0))


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (LacksLatent, r"the model samples \['z'\], the guide does not"),
        (OutsidePlate, "site 'scale' lies outside the data plate"),
        (Subsamples, "plate 'data' subsamples"),
        (ReadsX, "reads x outside obs=: the distribution at site 'x' changes"),
        (CouplesData, "data are coupled"),
        (UsesStore, r"\['stored_scale'\] live in Pyro's global store"),
        (ObservesNothing, "observes nothing"),
    ],
)
def test_what_is_wrong_raises(pair: type[pv.Pair], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_pair(pair(), torch.randn(4))


def test_a_clean_pair_has_no_finding() -> None:
    assert check_pair(Scalar(), torch.randn(4)) == []


def test_one_datum_is_not_enough() -> None:
    with pytest.raises(ValueError, match="at least two data"):
        check_pair(Scalar(), torch.randn(1))


def test_an_idle_parameter_is_named() -> None:
    pair = Scalar()
    pair.idle = nn.Parameter(torch.zeros(3))
    assert [(f.level, f.site) for f in check_pair(pair, torch.randn(4))] == [("not trainable this way", "idle")]


def test_a_mixture_in_the_guide_is_named_with_its_way_out() -> None:
    class MixtureGuide(Scalar):
        def guide(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                components = dist.Normal(torch.stack([x, -x], -1), 1.0)
                pyro.sample("z", dist.MixtureSameFamily(dist.Categorical(logits=torch.zeros(len(x), 2)), components))

    (finding,) = check_pair(MixtureGuide(), torch.randn(4))
    assert finding.level == "not trainable this way"
    assert "make its component a site" in finding.message


def test_batch_norm_and_batch_optimal_scale_are_noticed_in_training_only() -> None:
    norm = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
    for pair in (
        small_vae(encoder=norm),
        pv.models.VAE((1, 4, 4), pv.StandardNormal(2), pv.Gaussian(pv.BatchOptimalScale())),
    ):
        before = {name: value.clone() for name, value in pair.state_dict().items()}
        (finding,) = check_pair(pair, digits())
        assert finding.level == "not trainable this way"
        assert "training mode" in finding.message
        assert all(torch.equal(before[name], value) for name, value in pair.state_dict().items())
        assert pair.training


class TestScalar(PairContract):
    """A user's own pair inherits the contract; those of the package do so in their own files."""

    def make_pair(self) -> pv.Pair:
        return Scalar()

    def make_batch(self) -> tuple[Tensor, ...]:
        return (torch.randn(4),)


class ExpectsTooMuch(TestScalar):
    __test__ = False
    expected_findings = (("not log p(x)", "z"),)


def test_the_contract_fails_for_a_wrong_pair_and_for_wrong_expectations() -> None:
    with pytest.raises(AssertionError):
        ExpectsTooMuch().test_contract()

    class Broken(TestScalar):
        def make_pair(self) -> pv.Pair:
            return LacksLatent()

    for check in (Broken().test_contract, Broken().test_shapes):
        with pytest.raises(ValueError, match="the guide does not"):
            check()


def test_the_contract_says_which_methods_it_needs() -> None:
    for method in ("make_pair", "make_batch"):
        with pytest.raises(NotImplementedError, match=f"PairContract needs a method {method}"):
            getattr(PairContract(), method)()
