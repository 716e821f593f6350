"""Each refusal names the cause that holds, and each number the quantity that it is."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoIAFNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from pyro.nn import PyroModule, PyroSample
from torch import Tensor, nn
from torch.nn import functional as F

import pyro_vae as pv
from pyro_vae.inspection import inspect
from pyro_vae.likelihood.estimate import likelihood_notes

SIZE = 4
CALLS: dict[str, Callable[..., Any]] = {
    "fit": lambda pair, *batch: pv.fit(pair, batch, epochs=1, batch_size=5, progress=False),
    "log_likelihood": lambda pair, *batch: pv.log_likelihood(pair, *batch, num_particles=5, progress=False),
    "log_terms": lambda pair, *batch: pv.log_terms(pair, *batch),
    "generate": lambda pair, *batch: pv.generate(pair, 5, *(part[:5] for part in batch[1:])),
}


class Simple(pv.Pair):
    """p(z) = N(0, I), x ~ N(Wz, 1/4), and what a test changes of it."""

    plate, names = "data", ("x", "z")

    def __init__(self) -> None:
        super().__init__()
        self.x_shape, self.dec, self.enc = (SIZE,), nn.Linear(2, SIZE), nn.Linear(SIZE, 4)

    def likelihood(self, z: Tensor) -> Any:
        return dist.Normal(self.dec(z), 0.5).to_event(1)

    def posterior(self, x: Tensor) -> Any:
        loc, raw = self.enc(x).chunk(2, -1)
        return dist.Normal(loc, F.softplus(raw) + 0.1).to_event(1)

    def more(self, *sites: Tensor) -> None:
        """Sample more sites of the model."""

    def model(self, x: Tensor, *conditions: Tensor) -> None:
        with pyro.plate(self.plate, len(x)):
            z = pyro.sample(self.names[1], dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample(self.names[0], self.likelihood(z), obs=x)
            self.more(z, *conditions)

    def guide(self, x: Tensor, *conditions: Tensor) -> None:
        with pyro.plate(self.plate, len(x)):
            pyro.sample(self.names[1], self.posterior(x))


def like(**methods: Any) -> pv.Pair:
    """Return a simple pair with other attributes."""
    return type("Changed", (Simple,), methods)()


def x() -> Tensor:
    return torch.randn(10, SIZE)


def one_sentence(error: pytest.ExceptionInfo[ValueError]) -> bool:
    return "\n" not in str(error.value)


# Names of sites, and of quantities.


def test_the_data_are_x_whatever_their_site_is_called() -> None:
    def binary(self: Any, z: Tensor) -> Any:
        return dist.Bernoulli(logits=self.dec(z)).to_event(1)

    data = x().gt(0).double()
    results = []
    for names in (("x", "z"), ("obs", "latent")):
        torch.manual_seed(0)
        pair = like(names=names, likelihood=binary)
        results.append(pv.log_likelihood(pair, data, num_particles=30, seed=0, progress=False))
    first, second = results
    assert second.quantity == first.quantity == "log p(x)"
    assert second.bits_per_dimension == first.bits_per_dimension
    assert repr(second) == repr(first)
    assert pv.to_elpd(second).n_data_points == 10
    assert likelihood_notes(second.record()) == likelihood_notes(first.record())


def test_a_second_observed_site_is_named_as_one() -> None:
    def more(self: Any, z: Tensor, c: Tensor) -> None:
        pyro.sample("c", dist.Categorical(logits=self.dec(z)[..., :3]), obs=c)

    c = torch.arange(10) % 3
    ll = pv.log_likelihood(like(more=more), x(), c, num_particles=30, seed=0, progress=False)
    assert ll.quantity == "log p(x, c)"
    assert "the model observes 'c' too" in likelihood_notes(ll.record())[-1]
    for call in (lambda: pv.to_elpd(ll), lambda: ll.bits_per_dimension):
        with pytest.raises(ValueError, match="the model observes 'c' too") as error:
            call()
        assert "point mass" not in str(error.value)


def test_a_latent_called_x_does_not_take_the_name_of_the_data() -> None:
    def more(self: Any, z: Tensor, c: Tensor) -> None:
        pyro.sample("x", dist.Normal(z[..., 0], 1.0), obs=c)

    inspection = inspect(like(names=("rows", "z"), more=more), (x(), torch.randn(10)))
    assert inspection.quantity == "log p(rows, x)"


def test_a_factor_is_no_observed_site() -> None:
    """The estimate is log ∫ p(x, z) exp(f(z)) dz, with f = −1 here: log p(x) − 1."""

    def more(self: Any, z: Tensor) -> None:
        pyro.factor("classifier", torch.full_like(z[..., 0], -1.0))

    data = x()
    results = []
    for methods in ({}, {"more": more}):
        torch.manual_seed(0)
        results.append(pv.log_likelihood(like(**methods), data, num_particles=50, seed=0, progress=False))
    torch.testing.assert_close(results[1].per_datum, results[0].per_datum - 1, rtol=1e-10, atol=1e-10)
    assert results[1].quantity == "log p(x) with the factor 'classifier'"
    for call in (lambda: pv.to_elpd(results[1]), lambda: results[1].bits_per_dimension):
        with pytest.raises(ValueError, match="the model has a factor 'classifier', and no density"):
            call()
    pair = like(more=more)
    assert set(pv.generate(pair, 3).latents) == {"z"}
    found = pv.to_arviz(pair, data, num_particles=20, num_draws=5)
    assert list(found["observed_data"]) == list(found["log_likelihood"]) == ["x"]


def test_a_factor_or_data_in_the_guide_are_named() -> None:
    class Guided(Simple):
        observes = False

        def guide(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("z", self.posterior(x))
                if self.observes:
                    pyro.sample("y", dist.Normal(0.0, 1.0), obs=x[:, 0])
                else:
                    pyro.factor("classifier", x[:, 0], has_rsample=True)

    for observes, cause in ((False, r"the guide has a factor 'classifier'"), (True, "the guide observes 'y'")):
        pair = type("Guided", (Guided,), {"observes": observes})()
        for name in ("fit", "log_likelihood", "log_terms"):
            with pytest.raises(ValueError, match=cause):
                CALLS[name](pair, x())


# Programs.


@pytest.mark.parametrize("network", ["dec", "enc"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("call", ["fit", "log_likelihood", "generate"])
def test_a_parameter_that_is_not_finite_is_named(network: str, value: float, call: str) -> None:
    pair = Simple()
    with torch.no_grad():
        getattr(pair, network).weight[0, 0] = value
    with pytest.raises(ValueError, match=rf"parameter '{network}\.weight' has NaN or infinite values") as error:
        CALLS[call](pair, x())
    assert "obs=" not in str(error.value)


@pytest.mark.parametrize("call", CALLS)
def test_another_plate_is_named(call: str) -> None:
    with pytest.raises(ValueError, match=r"site 'z' lies in the plates \['batch'\]"):
        CALLS[call](like(plate="batch"), x())


def test_a_loop_over_the_data_is_named() -> None:
    class Looped(Simple):
        def model(self, x: Tensor) -> None:
            for i in pyro.plate("data", len(x)):
                z = pyro.sample(f"z_{i}", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                pyro.sample(f"x_{i}", self.likelihood(z), obs=x[i])

        def guide(self, x: Tensor) -> None:
            for i in pyro.plate("data", len(x)):
                pyro.sample(f"z_{i}", self.posterior(x[i]))

    with pytest.raises(ValueError, match="lies in a loop over plate 'data'"):
        pv.log_terms(Looped(), x())


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("size", [SIZE, 5, 10, 3])
def test_a_likelihood_without_an_event_is_told_about_it_in_one_sentence(call: str, size: int) -> None:
    """Also where its size is that of a batch, or of the few data that are looked at."""

    class NoEvent(Simple):
        def __init__(self) -> None:
            super().__init__()
            self.x_shape, self.dec, self.enc = (size,), nn.Linear(2, size), nn.Linear(size, 4)

        def likelihood(self, z: Tensor) -> Any:
            return dist.Normal(self.dec(z), 0.5)

    with pytest.raises(ValueError, match=r"site 'x' has \d+ entries in dimension -\d of its batch.*to_event") as error:
        CALLS[call](NoEvent(), torch.randn(10, size))
    assert one_sentence(error)


class Conditioned(Simple):
    """One condition, which no site observes."""

    def model(self, x: Tensor, y: Tensor) -> None:
        super().model(x)

    def guide(self, x: Tensor, y: Tensor) -> None:
        super().guide(x)


class Unconditional(Simple):
    """No condition."""

    def model(self, x: Tensor) -> None:
        super().model(x)

    def guide(self, x: Tensor) -> None:
        super().guide(x)


@pytest.mark.parametrize("call", CALLS)
def test_another_number_of_conditions_is_named_with_those_that_the_pair_takes(call: str) -> None:
    with pytest.raises(ValueError, match=r"Conditioned.model takes \(x, y\) and was given 1 tensor:"):
        CALLS[call](Conditioned(), x())
    with pytest.raises(ValueError, match=r"Unconditional.model takes \(x\) and was given 2 tensors:"):
        CALLS[call](Unconditional(), x(), torch.randn(10))


def test_an_error_of_the_users_program_stays_as_it_is() -> None:
    def likelihood(self: Any, z: Tensor) -> Any:
        raise TypeError("mine")

    with pytest.raises(TypeError, match="mine"):
        pv.log_likelihood(like(likelihood=likelihood), x(), num_particles=5, progress=False)


@pytest.mark.parametrize(
    "kind",
    [
        AutoNormal,
        AutoDelta,
        AutoDiagonalNormal,
        AutoMultivariateNormal,
        AutoLowRankMultivariateNormal,
        AutoIAFNormal,
    ],
)
@pytest.mark.parametrize("call", ["fit", "log_likelihood"])
def test_an_automatic_guide_is_told_of_as_one(kind: Any, call: str) -> None:
    class Automatic(Simple):
        def __init__(self) -> None:
            super().__init__()
            self.auto = kind(self.program)

        def program(self, x: Tensor) -> None:
            Simple.model(self, x)

        def guide(self, x: Tensor) -> None:
            self.auto(x)

    pyro.clear_param_store()
    with pytest.raises(ValueError, match=rf"{kind.__name__} is one of Pyro's AutoGuides.*write guide\(self, x\)"):
        CALLS[call](Automatic(), x())
    pyro.clear_param_store()


def test_an_automatic_guide_outside_the_module_is_known_by_its_site() -> None:
    class Hidden(Simple):
        def __init__(self) -> None:
            super().__init__()
            self.hidden = [AutoDiagonalNormal(lambda x: Simple.model(self, x))]

        def guide(self, x: Tensor) -> None:
            self.hidden[0](x)

    with pytest.raises(ValueError, match="'_AutoDiagonalNormal_latent' is that of one of Pyro's AutoGuides"):
        pv.log_terms(Hidden(), x())
    pyro.clear_param_store()


class Bayesian(Simple):
    """A decoder with weights drawn by PyroSample."""

    def __init__(self) -> None:
        super().__init__()
        self.dec = PyroModule[nn.Linear](2, SIZE)
        self.dec.weight = PyroSample(dist.Normal(0.0, 1.0).expand([SIZE, 2]).to_event(2))
        self.loc = nn.Parameter(torch.zeros(SIZE, 2))

    def guide(self, x: Tensor) -> None:
        pyro.sample("weight", dist.Normal(self.loc, 1.0).to_event(2))
        super().guide(x)


@pytest.mark.parametrize("call", CALLS)
def test_weights_by_pyro_sample_are_refused_with_the_right_way(call: str) -> None:
    with pytest.raises(ValueError, match=r"\['dec.weight'\] are drawn by PyroSample.*point estimate") as error:
        CALLS[call](Bayesian(), x())
    assert one_sentence(error)
    assert "inside" not in str(error.value)
    # A PyroModule puts its parameters in the global store when it runs, here as in Pyro.
    pyro.clear_param_store()


def test_missing_data_by_obs_mask_are_told_how_to_be_masked() -> None:
    class Missing(Simple):
        def model(self, x: Tensor, seen: Tensor) -> None:
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                pyro.sample("x", self.likelihood(z), obs=x, obs_mask=seen)

    with pytest.raises(ValueError, match=r"the missing part of 'x' a latent.*obs_mask=.*mask the likelihood"):
        pv.log_likelihood(Missing(), x(), torch.arange(10) < 5, num_particles=5, progress=False)


# Values of a second observed site.

LABELS: dict[str, tuple[Callable[[], Any], Callable[[], Tensor]]] = {
    "a fourth of three": (lambda: dist.Categorical(logits=torch.zeros(3)), lambda: torch.arange(10) % 4),
    "minus one": (lambda: dist.Categorical(logits=torch.zeros(3)), lambda: torch.arange(10) % 4 - 1),
    "two of a coin": (lambda: dist.Bernoulli(torch.tensor(0.5)), lambda: torch.arange(10) % 3.0),
    "three ones": (lambda: dist.OneHotCategorical(logits=torch.zeros(3)), lambda: torch.ones(10, 3)),
    "a negative count": (lambda: dist.Poisson(torch.tensor(0.5)), lambda: -torch.ones(10)),
    "no shares": (lambda: dist.Dirichlet(torch.ones(3)), lambda: torch.ones(10, 3)),
    "beyond the unit": (lambda: dist.Beta(torch.ones(2), 1.0).to_event(1), lambda: 2 * torch.ones(10, 2)),
    "one row in the middle": (
        lambda: dist.Bernoulli(torch.tensor(0.5)),
        lambda: torch.zeros(10).index_fill(0, torch.tensor([3]), 2.0),
    ),
}


@pytest.mark.parametrize("case", LABELS)
@pytest.mark.parametrize("call", ["fit", "log_likelihood", "generate"])
def test_conditions_outside_the_support_of_their_site_are_named(case: str, call: str) -> None:
    make, values = LABELS[case]

    class Observing(Simple):
        def model(self, x: Tensor, label: Tensor) -> None:
            super().model(x, label)

        def more(self, z: Tensor, label: Tensor) -> None:
            pyro.sample("y", make(), obs=label)

        def guide(self, x: Tensor, label: Tensor) -> None:
            super().guide(x)

    with pytest.raises(ValueError, match=r"label has \d+ values outside the support of site 'y'") as error:
        CALLS[call](Observing(), x(), values())
    assert one_sentence(error)


def test_labels_that_a_mask_leaves_out_are_labels_too() -> None:
    """log p(x, y) is log p(x) where y is unknown, and log p(x) − log 2 elsewhere."""

    def more(self: Any, z: Tensor, y: Tensor, known: Tensor) -> None:
        pyro.sample("y", dist.Bernoulli(torch.tensor(0.5)).mask(known), obs=y)

    data, y, known = x(), torch.arange(10) % 2.0, torch.arange(10) < 4
    results = []
    for methods, batch in (({}, (data,)), ({"more": more}, (data, y, known))):
        torch.manual_seed(0)
        pair = like(**methods)
        inspect(pair, batch)
        torch.manual_seed(1)
        results.append(pv.log_terms(pair, *batch).log_weights.detach())
    expected = torch.where(known, -math.log(2), 0.0).expand(1, 10)
    torch.testing.assert_close(results[1] - results[0], expected, rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match=r"outside the support of site 'y'.*also where a mask leaves them out"):
        inspect(like(more=more), (data, torch.where(known, y, -1.0), known))


# Families.


def test_a_gaussian_of_another_kind_is_not_called_something_else() -> None:
    def low_rank(self: Any, x: Tensor) -> Any:
        loc, raw = self.enc(x).chunk(2, -1)
        return dist.LowRankMultivariateNormal(loc, raw.unsqueeze(-1), F.softplus(raw) + 0.1)

    with pytest.raises(
        ValueError, match=r"is a LowRankMultivariateNormal: .* diagonal and full Gaussians only"
    ) as error:
        pv.inference_gap(like(posterior=low_rank), x()[:2], num_particles=5, steps=1)
    assert "not Gaussian" not in str(error.value)
    q = dist.LowRankMultivariateNormal(torch.zeros(3, 2), torch.ones(3, 2, 1), torch.ones(3, 2))
    with pytest.raises(ValueError, match="is LowRankMultivariateNormal: the divergence is closed here for") as error:
        pv.convex_kl_bound(q, pv.MixtureOfGaussians(2, 2)())
    assert "no Gaussian" not in str(error.value)


# Words of Pyro and torch.


def test_values_outside_a_support_name_their_site() -> None:
    bits = like(likelihood=lambda self, z: dist.Bernoulli(logits=self.dec(z)).to_event(1))
    for call in (pv.log_terms, pv.site_terms):
        with pytest.raises(ValueError, match=r"^site 'x' has values outside the support of its Bernoulli, .*$"):
            call(bits, x().abs())


@pytest.mark.parametrize("call", ["fit", "log_likelihood", "log_terms"])
def test_an_operation_without_a_value_is_not_blamed_on_the_learning_rate(call: str) -> None:
    pair = like(likelihood=lambda self, z: dist.Normal(torch.log(self.dec(z) - 10), 0.5).to_event(1))
    with pytest.raises(
        ValueError, match=r"'loc' as NaN, though the pair's parameters .* are finite: .*logarithm"
    ) as error:
        CALLS[call](pair, x())
    assert "lr" not in str(error.value)


@pytest.mark.parametrize("call", ["fit", "log_likelihood", "log_terms"])
def test_a_negative_scale_is_called_so(call: str) -> None:
    pair = like(likelihood=lambda self, z: dist.Normal(self.dec(z), -self.dec(z).abs()).to_event(1))
    with pytest.raises(ValueError, match=r"'scale' outside GreaterThan\(lower_bound=0\.0\): .*softplus"):
        CALLS[call](pair, x())


def test_parameters_that_are_nan_are_named() -> None:
    pair = like()
    pair.dec.weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"as NaN, since the pair's parameter 'dec\.weight' is not finite"):
        pv.log_terms(pair, x())


@pytest.mark.parametrize("value", [2.5, "2", True, None])
@pytest.mark.parametrize("call", [pv.posterior, pv.reconstruct, pv.log_terms])
def test_a_number_of_particles_is_a_whole_number(call: Any, value: Any) -> None:
    with pytest.raises(ValueError, match=r"^num_particles is .*; it must be a whole number$"):
        call(like(), x(), num_particles=value)
    with pytest.raises(ValueError, match=r"^num_samples is .*; it must be a whole number$"):
        pv.generate(like(), value)


@pytest.mark.parametrize("call", [pv.posterior, pv.reconstruct, pv.log_likelihood])
def test_a_seed_is_a_whole_number(call: Any) -> None:
    with pytest.raises(ValueError, match=r"^seed is 'a'; it must be a whole number$"):
        call(like(), x(), num_particles=30, seed="a")
