"""What ArviZ is given: exact posteriors and predictions, log p(x) that may be compared, names for every axis."""

from __future__ import annotations

import math
import types
import warnings
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyro_vae as pv
from pyro_vae.diagnostics.arviz_containers import inference_data
from pyro_vae.models import VAE, LinearGaussianMixtureVAE, LinearGaussianVAE
from tests.support.off_guides import WrongScale

with warnings.catch_warnings():
    # ArviZ 0.23 announces its successor when it is imported.
    warnings.simplefilter("ignore", FutureWarning)
    import arviz

ROUNDING = {"rtol": 1e-9, "atol": 1e-9}


def drawn(data: Any, group: str, name: str) -> Tensor:
    """Return a variable of one chain as a tensor, (S, …)."""
    return torch.tensor(np.array(data[group][name]))[0]


def assert_mean(values: Tensor, expected: float = 0.0) -> None:
    """Hold independent values' mean against its expectation, within four of its standard errors."""
    assert abs(float(values.mean()) - expected) <= 4 * float(values.std()) / len(values) ** 0.5


@pytest.mark.parametrize("factor", [1.0, 1.4, 0.9])
def test_posterior_holds_the_exact_posterior_whatever_the_guide(factor: float) -> None:
    pair, x = WrongScale(factor), torch.randn(300, 3)
    data = pv.to_arviz(pair, x, num_particles=2000, num_draws=200)
    with torch.no_grad():
        exact = pair.exact_posterior(x)
    standard = (drawn(data, "posterior", "z") - exact.mean) / exact.stddev
    # One value per datum, so that how draws of one datum hang together does not matter.
    assert_mean(standard.mean(0)[:, 0])
    assert_mean((standard**2).mean(0)[:, 0], 1.0)
    if factor != 1:
        # The guide's own draws are far outside.
        guide = (pv.posterior(pair, x, num_particles=200).latents["z"] - exact.mean) / exact.stddev
        spread = (guide**2).mean(0)[:, 0]
        assert abs(float(spread.mean()) - 1) > 10 * float(spread.std()) / 300**0.5


def test_discrete_latents_have_their_exact_probabilities() -> None:
    pair, x = LinearGaussianMixtureVAE(4, pv.MixtureOfGaussians(3, 2)), torch.randn(300, 4)
    with torch.no_grad():
        exact = (pair.prior.logits.log_softmax(-1) + pair.exact_components(x)[0]).softmax(-1)
    c = drawn(pv.to_arviz(pair, x, num_particles=100, num_draws=100), "posterior", "c")
    for component in range(3):
        assert_mean((c == component).double().mean(0) - exact[:, component])


def test_posterior_predictive_is_the_exact_one() -> None:
    pair, x = LinearGaussianVAE(3, 2), torch.randn(400, 3)
    replicated = drawn(pv.to_arviz(pair, x, num_particles=50, num_draws=50), "posterior_predictive", "x")
    with torch.no_grad():
        exact = pair.exact_posterior(x)
        mean = exact.mean @ pair.weight.mT + pair.bias
        variance = (pair.weight @ exact.covariance_matrix @ pair.weight.mT).diagonal(dim1=-2, dim2=-1)
        standard = (replicated - mean) / (variance + pair.scale() ** 2).sqrt()
    assert_mean(standard.mean((0, 2)))
    assert_mean((standard**2).mean((0, 2)), 1.0)


def test_an_exact_guide_has_no_particle_drawn_twice() -> None:
    data = pv.to_arviz(LinearGaussianVAE(3, 2), torch.randn(5, 3), num_particles=64, num_draws=64)
    particle = drawn(data, "sample_stats", "particle")
    torch.testing.assert_close(particle, torch.arange(64).unsqueeze(-1).expand(64, 5))


def test_particles_are_drawn_as_often_as_their_weights_say() -> None:
    data = pv.to_arviz(WrongScale(1.4), torch.randn(40, 3), num_particles=50, num_draws=50)
    log_weights = torch.tensor(np.array(data["sample_stats"]["log_weights"]))
    particle = drawn(data, "sample_stats", "particle")
    counts = torch.nn.functional.one_hot(particle, 50).sum(0).mT
    # Systematic resampling rounds S w either down or up.
    assert float((counts - 50 * log_weights.softmax(0)).abs().max()) <= 1 + 1e-9
    assert (particle.diff(dim=0) >= 0).all()


def test_log_likelihood_is_the_marginal_and_its_error_that_of_the_estimator() -> None:
    pair, x = WrongScale(1.4), torch.randn(200, 3)
    data = pv.to_arviz(pair, x, num_particles=1000, num_draws=10)
    stats = data["sample_stats"]
    error = np.array(stats["standard_error"])
    marginal = drawn(data, "log_likelihood", "x")
    assert (marginal == marginal[0]).all()
    with torch.no_grad():
        assert_mean((marginal[0] - pair.exact_log_likelihood(x)) / torch.tensor(error))
    weights = np.array(stats["log_weights"])
    np.testing.assert_allclose(np.logaddexp.reduce(weights) - math.log(1000), marginal[0])
    np.testing.assert_allclose(
        np.exp(2 * np.logaddexp.reduce(weights) - np.logaddexp.reduce(2 * weights)), stats["ess"]
    )
    # Wider than the posterior: weights bounded, a tail without a mean would be above 1.
    assert float(stats["pareto_k"].max()) < 0.7


def test_leaving_a_datum_out_with_its_own_latents_is_a_harmonic_mean() -> None:
    pair = WrongScale(1.0, x_size=10)
    x = pv.generate(pair, 200).x
    data = pv.to_arviz(pair, x, num_particles=1000, num_draws=1000)
    with torch.no_grad():
        truth = pair.exact_log_likelihood(x).numpy()
        z = drawn(data, "posterior", "z")
        conditional = dist.Normal(z @ pair.weight.mT + pair.bias, pair.scale()).log_prob(x).sum(-1)
        # The raw weights 1/p(x | z) have a tail of this shape under the posterior.
        ratio = float((pair.weight**2).sum() / pair.scale() ** 2)
    assert ratio / (1 + ratio) > 0.9
    # Wrong: log p(x_i | z_i) for ArviZ's loo; it comes out too high, and k̂ says that it means nothing.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        wrong = arviz.loo(_with_log_likelihood(data, conditional.numpy()), pointwise=True)
    assert float(wrong.pareto_k.mean()) > 0.7
    assert abs(float(wrong.pareto_k.mean()) - ratio / (1 + ratio)) < 0.3
    assert _elpd(wrong) > truth.sum() + 0.3 * len(x)
    # Ours: what is left of the others is p(x_i).
    assert _elpd(pv.to_elpd(pv.log_likelihood(pair, x, num_particles=50))) == pytest.approx(truth.sum(), rel=1e-9)
    if arviz.__version__.startswith("0."):
        with pytest.warns(UserWarning, match="shape parameter of Pareto distribution"):
            ours = arviz.loo(data, pointwise=True)
        assert _elpd(ours) == pytest.approx(truth.sum(), rel=1e-9)
        assert (np.asarray(ours.pareto_k) == np.inf).all()
    else:
        with pytest.raises(ValueError, match="All tail values are the same"):
            arviz.loo(data)


def _with_log_likelihood(data: Any, log_likelihood: np.ndarray) -> Any:
    groups = {name: data[name] for name in ("posterior", "log_likelihood")}
    groups = {name: group.to_dataset() if hasattr(group, "to_dataset") else group for name, group in groups.items()}
    groups["log_likelihood"] = groups["log_likelihood"].assign(x=(("chain", "draw", "datum"), log_likelihood[None]))
    return inference_data(groups)


def _elpd(result: Any) -> float:
    return float(result.elpd if hasattr(result, "elpd") else result.elpd_loo)


def test_models_are_compared_by_exact_differences_and_paired_errors() -> None:
    torch.manual_seed(3)
    pairs = {"true": LinearGaussianVAE(5, 2), "other": LinearGaussianVAE(5, 1)}
    x = pv.generate(pairs["true"], 150).x
    with torch.no_grad():
        exact = {name: pair.exact_log_likelihood(x) for name, pair in pairs.items()}
    with warnings.catch_warnings():
        # pandas announces its next version inside ArviZ 0.23.
        warnings.simplefilter("ignore", DeprecationWarning)
        table = arviz.compare(
            {name: pv.to_elpd(pv.log_likelihood(pair, x, num_particles=50)) for name, pair in pairs.items()}
        )
    assert list(table.index) == ["true", "other"]
    difference = exact["true"] - exact["other"]
    # ArviZ 1 rounds to the digits that the standard error supports.
    tolerance = {"rel": 1e-9} if "elpd_loo" in table else {"rel": 0.1}
    error = float((150 * difference.var(correction=0)).sqrt())
    assert abs(table.loc["other", "elpd_diff"]) == pytest.approx(float(difference.sum()), **tolerance)
    assert table.loc["other", "dse"] == pytest.approx(error, **tolerance)
    assert table.loc["true", "elpd_loo" if "elpd_loo" in table else "elpd"] == pytest.approx(
        float(exact["true"].sum()), **tolerance
    )
    assert not table["warning"].any() if "warning" in table else True


def test_an_elpd_carries_the_diagnostics_of_its_estimates() -> None:
    ll = pv.log_likelihood(WrongScale(0.4), torch.randn(30, 3), num_particles=1000, proposal="guide")
    elpd = pv.to_elpd(ll)
    assert _elpd(elpd) == pytest.approx(float(ll.per_datum.sum()), rel=1e-12)
    assert elpd.se == pytest.approx(float(ll.mean_standard_error * 30 * (29 / 30) ** 0.5), rel=1e-9)
    np.testing.assert_array_equal(elpd.pareto_k, ll.pareto_k)
    assert elpd.warning
    assert "Pareto k" in str(elpd)


def test_a_joint_density_is_not_compared() -> None:
    pair = pv.models.SRVAE((1, 4, 4), scale=2, prior=pv.StandardNormal(2), transition="delta")
    ll = pv.log_likelihood(pair, torch.rand(3, 1, 4, 4), num_particles=2)
    with pytest.raises(
        ValueError, match=r"this is log p\(x, y\): the guide fixes .* models are compared by log p\(x\)"
    ):
        pv.to_elpd(ll)


def test_every_axis_has_a_name_and_coordinates() -> None:
    pair = pv.models.SRVAE((1, 4, 4), scale=2, prior=pv.StandardNormal(3), transition="delta")
    x = torch.rand(5, 1, 4, 4)
    data = pv.to_arviz(pair, x, num_particles=6, num_draws=4)
    image = ("x_channel", "x_row", "x_column")
    assert data["posterior_predictive"]["x"].dims == ("chain", "draw", "datum", *image)
    assert data["observed_data"]["x"].dims == ("datum", *image)
    assert data["posterior"]["u"].dims == ("chain", "draw", "datum", "u_dim_0")
    assert set(data["posterior"].data_vars) == {"u", "z"}
    # What the guide fixes is no latent: y = d(x) once per datum.
    y = data["constant_data"]["y"]
    assert y.dims == ("datum", "y_channel", "y_row", "y_column")
    np.testing.assert_allclose(y, pair.down_scale(x))
    np.testing.assert_array_equal(data["observed_data"]["x"], x)
    assert data["posterior"].attrs["quantity"] == "log p(x, y)"
    for group in ("posterior", "posterior_predictive", "observed_data"):
        assert all(list(index) == list(range(len(index))) for index in data[group].coords.values())


class Nodes(pv.Pair):
    """z_bn ~ N(0, 1), x_bn ~ N(z_bn + c_b, 1) over a plate of nodes, on either side of the data's, with a condition."""

    max_plate_nesting = 2
    x_shape = (3,)

    def __init__(self, left: bool) -> None:
        super().__init__()
        self.left = left

    def turned(self, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor, int]:
        return (x.mT, c.mT, -1) if self.left else (x, c, -2)

    def model(self, x: Tensor, c: Tensor) -> None:
        x, c, dim = self.turned(x, c)
        with pyro.plate("data", x.shape[dim], dim=dim), pyro.plate("nodes", 3, dim=-3 - dim):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + c, 1.0), obs=x)

    def guide(self, x: Tensor, c: Tensor) -> None:
        x, c, dim = self.turned(x, c)
        with pyro.plate("data", x.shape[dim], dim=dim), pyro.plate("nodes", 3, dim=-3 - dim):
            pyro.sample("z", dist.Normal((x - c) / 2, 1.1 * 0.5**0.5))


@pytest.mark.parametrize("left", [False, True])
def test_plates_of_the_pairs_own_keep_their_names(left: bool) -> None:
    x, c = torch.randn(50, 3), torch.randn(50, 1)
    data = pv.to_arviz(Nodes(left), x, c, num_particles=1000, num_draws=100)
    axes = ("datum", "nodes")
    assert set(data["posterior"]["z"].dims) == {"chain", "draw", *axes}
    z = data["posterior"]["z"].transpose("chain", "draw", *axes)
    standard = (torch.tensor(np.array(z))[0] - (x - c) / 2) / 0.5**0.5
    assert_mean(standard.mean((0, 2)))
    assert_mean((standard**2).mean((0, 2)), 1.0)
    np.testing.assert_array_equal(data["observed_data"]["x"].transpose(*axes), x)
    np.testing.assert_array_equal(data["constant_data"]["condition_0"], c)
    assert set(data["posterior_predictive"]["x"].dims) == {"chain", "draw", *axes}


def test_arviz_summarises_what_it_is_given() -> None:
    pair, x = LinearGaussianVAE(3, 1), torch.zeros(2, 3)
    data = pv.to_arviz(pair, x, num_particles=400, num_draws=400)
    effective = np.array(arviz.ess(data, var_names=["z"])["z"])
    # Independent draws: ArviZ's estimate scatters by a few times 1/√S around S.
    assert (effective > 250).all()
    # A fifth of the particles in use shows as autocorrelation, though every draw was made at once.
    off = pv.to_arviz(WrongScale(5.0), x, num_particles=400, num_draws=400)
    weighted = np.array(off["sample_stats"]["ess"])
    assert (np.array(arviz.ess(off, var_names=["z"], method="mean")["z"])[:, 0] < 2 * weighted).all()
    assert (weighted < 200).all()


def test_chunks_change_neither_layout_nor_value() -> None:
    pair, x = LinearGaussianVAE(3, 2), torch.randn(7, 3)
    data = pv.to_arviz(pair, x, num_particles=50, num_draws=30, memory=20_000)
    assert dict(data["posterior"]["z"].sizes) == {"chain": 1, "draw": 30, "datum": 7, "z_dim_0": 2}
    assert dict(data["posterior_predictive"]["x"].sizes) == {"chain": 1, "draw": 30, "datum": 7, "x_dim_0": 3}
    with torch.no_grad():
        torch.testing.assert_close(drawn(data, "log_likelihood", "x")[0], pair.exact_log_likelihood(x), **ROUNDING)


def test_seeded_exports_repeat_and_others_differ() -> None:
    pair, x = VAE((4,), pv.StandardNormal(2)), torch.randn(3, 4)
    state = torch.get_rng_state()
    first, second, third = (
        drawn(pv.to_arviz(pair, x, num_particles=9, num_draws=9, seed=s), "posterior", "z") for s in (1, 1, None)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, third)
    assert torch.equal(state, torch.get_rng_state())
    assert pair.training


def test_bad_requests_are_refused() -> None:
    pair, x = WrongScale(1.0), torch.randn(3, 3)
    for draws in (0, 11):
        with pytest.raises(ValueError, match=f"num_draws is {draws}, num_particles 10"):
            pv.to_arviz(pair, x, num_particles=10, num_draws=draws)
    # The index is that among all data, in a chunk of its own too.
    x[2] = 1e200
    for memory in (5_000, 10**9):
        with pytest.raises(ValueError, match="all 10 weights of datum 2 are zero, infinite or NaN"):
            pv.to_arviz(pair, x, num_particles=10, num_draws=1, memory=memory)


def test_for_arviz_1_a_tree_of_the_same_groups_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    pair, x = LinearGaussianVAE(3, 2), torch.randn(4, 3)
    data = pv.to_arviz(pair, x, num_particles=5, num_draws=5, seed=0)
    monkeypatch.setattr("pyro_vae.diagnostics.arviz_containers.arviz", lambda: types.SimpleNamespace(__version__="1.0"))
    tree = pv.to_arviz(pair, x, num_particles=5, num_draws=5, seed=0)
    assert set(tree.children) == {
        "posterior",
        "posterior_predictive",
        "log_likelihood",
        "sample_stats",
        "observed_data",
    }
    for name in tree.children:
        assert tree[name].to_dataset().identical(getattr(data[name], "to_dataset", lambda name=name: data[name])())
