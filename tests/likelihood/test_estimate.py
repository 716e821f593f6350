"""What an estimate says of itself: its table, in a terminal and in a report, its figures, and its refusals."""

from __future__ import annotations

import json
import math
import re
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyro_vae as pv
from pyro_vae.likelihood.estimate import likelihood_notes, likelihood_rows
from pyro_vae.models import LinearGaussianVAE
from pyro_vae.report.files import forget_likelihood, record_likelihood
from pyro_vae.report.likelihood_figures import LIKELIHOOD_FIGURES, likelihood_curve, pareto_k
from tests.support.off_guides import WrongScale
from tests.support.repetitions import repetitions

# The estimator itself, from the pair's own guide.
log_likelihood = partial(pv.log_likelihood, proposal="guide")


def made_up(**changed: Any) -> pv.LogLikelihood:
    """Return an estimate for four data whose every number is known."""
    fields = {
        "per_datum": torch.tensor([-1.0, -2.0, -3.0, -6.0]),
        "standard_error": torch.tensor([0.3, 0.4, 0.0, 0.0]),
        "ess": torch.tensor([50.0, 60.0, 70.0, 80.0]),
        "num_particles": 100,
        "quantity": "log p(x)",
        "discrete": True,
        "num_dimensions": 2,
        "pareto_k": torch.tensor([0.4, 0.9, -math.inf, 0.55]),
        "smoothed": torch.zeros(4),
        "curve": torch.tensor([[-4.0] * 4, [-3.5] * 4]),
        "curve_standard_error": torch.tensor([[0.02] * 4, [0.04] * 4]),
    }
    return pv.LogLikelihood(**(fields | changed))


def test_the_table_holds_the_numbers() -> None:
    # Mean −3, sample variance 14/3, hence its error √(7/6); Monte Carlo √(0.09 + 0.16)/4; −mean/(2 log 2) bits.
    assert likelihood_rows(made_up().record()) == [
        ("log p(x)", "-3.000 ± 1.080 nats (mean over data ± standard error)"),
        ("Monte Carlo part of the error", "± 0.1250 nats"),
        ("bits per dimension", "2.1640"),
        ("data", "4"),
        ("particles per datum, K", "100"),
        ("median effective sample size", "60.0"),
        ("data with k̂ above 0.50", "50.0 %"),
        ("settled", "2 of 4 (guide 2); not settled: 2, data 1, 3"),
        ("error bars", "too small: k̂ above 0.50 for 50.0 % of data"),
        ("largest k̂: datum (k̂)", "1 (0.90), 3 (0.55), 0 (0.40)"),
        ("L_1 ± Monte Carlo error", "-4.000 ± 0.0100 nats"),
        ("L_2 ± Monte Carlo error", "-3.500 ± 0.0200 nats"),
    ]


def test_repr_is_the_table_line_by_line() -> None:
    ll = made_up()
    first, *lines = repr(ll).splitlines()
    rows = likelihood_rows(ll.record())
    assert first == " = ".join(rows[0])
    assert [tuple(re.split(r"\s{2,}", line.strip())) for line in lines] == rows[1:]
    assert str(ll) == repr(ll)


def test_what_is_not_known_is_said() -> None:
    few = likelihood_rows(made_up(num_particles=10, pareto_k=torch.full((4,), math.nan), discrete=False).record())
    assert ("Pareto k̂", "needs K ≥ 25") in few
    assert not any("bits" in label for label, _ in few)
    equal = dict(likelihood_rows(made_up(pareto_k=torch.full((4,), -math.inf)).record()))
    assert equal["largest k̂: datum (k̂)"] == "none, every datum's weights are equal"
    assert equal["data with k̂ above 0.50"] == "0.0 %"


def test_the_record_is_json_also_where_a_number_is_not_finite() -> None:
    one = torch.tensor([-1.0])
    infinite = {"pareto_k": torch.tensor([math.inf]), "curve": torch.full((2, 1), -math.inf)}
    ll = made_up(per_datum=one, standard_error=torch.zeros(1), **infinite)
    record = json.loads(json.dumps(ll.record(), allow_nan=False))
    assert likelihood_rows(record) == likelihood_rows(ll.record())
    assert dict(likelihood_rows(record))["log p(x)"] == "-1.000 nats (one datum)"
    assert dict(likelihood_rows(record))["largest k̂: datum (k̂)"] == "0 (inf)"


def test_notes_say_what_a_reader_must_know() -> None:
    calm = made_up(pareto_k=torch.zeros(4))
    assert likelihood_notes(calm.record()) == []
    assert "50.0 % of the data" in likelihood_notes(made_up().record())[0]
    assert "Fewer than 10 of 100" in likelihood_notes(calm._replace(ess=torch.full((4,), 2.0)).record())[0]
    joint = calm._replace(quantity="log p(x, y)", beside="the model observes 'y' too")
    assert "This is log p(x, y): the model observes 'y' too." in likelihood_notes(joint.record())[0]
    assert "bits_per_dimension" not in joint.record()


def test_the_errors_of_the_curve_are_the_spread_of_repeated_curves() -> None:
    pair, repeats = WrongScale(1.4), 400
    x = repetitions(torch.randn(1, 3), repeats)
    ll = log_likelihood(pair, x, num_particles=256, seed=0)
    spread = ll.curve.std(1)
    claimed = (ll.curve_standard_error**2).mean(1).sqrt()
    # A standard deviation of n values has relative error 1/√(2n), for draws with tails as heavy as a Gaussian's. The
    # last claim is the delta method's, with a bias of order 1/K; with two blocks, the one before it, a claim is a
    # variance on one degree of freedom, and the mean of 400 such has relative error √(2/400).
    blocks = torch.tensor([float(256 >> j) for j in range(9)])
    error = (1 / (2 * repeats) + 1 / (2 * repeats * (blocks - 1).clamp(min=1))).sqrt()
    assert ((spread / claimed - 1).abs() <= 4 * error + 1 / 256).all()


def test_equal_weights_have_a_curve_without_error() -> None:
    pair, x = LinearGaussianVAE(5, 2), 100 * torch.randn(6, 5)
    with torch.no_grad():
        ll = log_likelihood(pair, x, num_particles=30, seed=0)
    # Distances are taken from a weight, so that no digit is lost to log-weights of −10⁵ nats: some tens of 10⁵ × 2⁻⁵².
    assert float(ll.per_datum.min()) < -1e4
    assert float(ll.curve_standard_error[:-1].max()) < 1e-8
    # The delta method's is the root of a difference of two such numbers.
    assert float(ll.curve_standard_error[-1].max()) < 1e-4


# Figures


def test_figures_show_the_estimate() -> None:
    ll = made_up(pareto_k=torch.tensor([0.4, 0.9, -math.inf, math.inf]))
    figure = likelihood_curve(ll)
    assert figure is not None
    points, *_ = figure.axes[0].get_lines()
    assert [tuple(point) for point in points.get_xydata()] == [(1, -4), (2, -3.5)]
    figure = pareto_k(ll)
    assert figure is not None
    legend = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert legend[:3] == ["guide, settled: 1 data", "guide, not settled: 1 data", "threshold 0.50"]
    assert [text for text in legend if "inf" in text] == [
        "1 data at -inf (equal weights)",
        "1 data at +inf (too many ties)",
    ]


def test_bounds_that_are_infinite_are_left_out_of_the_curve() -> None:
    figure = likelihood_curve(made_up(curve=torch.tensor([[-math.inf] * 4, [-3.5] * 4])))
    assert figure is not None
    assert [tuple(point) for point in figure.axes[0].get_lines()[0].get_xydata()] == [(2, -3.5)]


def test_a_new_evaluation_replaces_all_of_an_earlier_one(tmp_path: Path) -> None:
    paths = record_likelihood(tmp_path, made_up(), made_up())
    assert [path.stem for path in paths] == list(LIKELIHOOD_FIGURES)
    assert all(path.exists() for path in paths)
    # Equal weights throughout have no finite k̂ to draw.
    record_likelihood(tmp_path, made_up(pareto_k=torch.full((4,), -math.inf)))
    assert not (tmp_path / "figures" / "pareto_k.png").exists()
    forget_likelihood(tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


# Progress


def test_a_bar_is_drawn_where_it_takes_long(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pair, x = WrongScale(1.4), torch.randn(5, 3)
    monkeypatch.setattr("pyro_vae.runtime.progress.DELAY", math.inf)
    log_likelihood(pair, x, num_particles=5)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("pyro_vae.runtime.progress.DELAY", 0.0)
    log_likelihood(pair, x, num_particles=5, progress=False)
    assert capsys.readouterr().err == ""
    log_likelihood(pair, x, num_particles=5)
    assert re.search(r"log-likelihood.*100%", capsys.readouterr().err)


# Refusals


@pytest.mark.parametrize("estimate", [log_likelihood, pv.naive_log_likelihood])
def test_the_least_memory_that_an_error_names_is_enough(estimate: Any) -> None:
    pair, x = LinearGaussianVAE(5, 2), torch.randn(3, 5)
    with pytest.raises(ValueError, match=r"raise it to \d+ at least \(1 MiB\)") as error:
        estimate(pair, x, num_particles=50, memory=100, seed=0)
    least = int(re.search(r"raise it to (\d+)", str(error.value))[1])
    assert estimate(pair, x, num_particles=50, memory=least, seed=0).num_particles == 50
    with pytest.raises(ValueError, match=f"raise it to {least} at least"):
        estimate(pair, x, num_particles=50, memory=least - 1, seed=0)


class Faulty(pv.Pair):
    """A pair whose sites can be made to fail, for data whose first entry says so."""

    def __init__(self, guide_scale: Any = None, model_loc: Any = None) -> None:
        super().__init__()
        self.x_shape, self.guide_scale, self.model_loc = (2,), guide_scale, model_loc

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            loc = z if self.model_loc is None else z + self.model_loc(x).unsqueeze(-1)
            pyro.sample("x", dist.Normal(loc, 1.0).expand([*loc.shape[:-1], 2]).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        scale = torch.ones(len(x)) if self.guide_scale is None else self.guide_scale(x)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(len(x), 1), scale.unsqueeze(-1)).to_event(1))


def nan_above(limit: float, otherwise: float) -> Any:
    return lambda x: torch.where(x[:, 0] > limit, math.nan, otherwise)


def test_nan_weights_name_their_datum_and_site() -> None:
    x = torch.zeros(140, 2)
    # In the second chunk of 128 data, so that the index is one of the whole.
    x[131] = 5.0
    with pytest.raises(ValueError, match=r"a weight of datum 131 is NaN: the guide's site 'z' .* pv.site_terms"):
        log_likelihood(Faulty(guide_scale=nan_above(1, 1.0)), x, num_particles=3)
    for estimate in (log_likelihood, pv.naive_log_likelihood):
        with pytest.raises(ValueError, match="a weight of datum 131 is NaN: the model's site 'x'"):
            estimate(Faulty(model_loc=nan_above(1, 0.0)), x, num_particles=3)
    x[3] = x[4] = 5.0
    with pytest.raises(ValueError, match=r"a weight of datum 3 \(2 such data among the 128 of its chunk\) is NaN"):
        log_likelihood(Faulty(model_loc=nan_above(1, 0.0)), x, num_particles=3)


class Pole(Faulty):
    """A Beta(½, ½) likelihood, whose density is infinite at 0 and at 1."""

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            half = 0.5 + 0 * z.expand(*z.shape[:-1], 2)
            pyro.sample("x", dist.Beta(half, half).to_event(1), obs=x)


class Spike(dist.Normal):
    """A guide's Gaussian that says its density is infinite where it draws a positive number."""

    def log_prob(self, value: Tensor) -> Tensor:
        return torch.where(value > 0, math.inf, super().log_prob(value))


class SpikyGuide(Faulty):
    """A guide whose density is infinite at some of its draws."""

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", Spike(torch.zeros(len(x), 1), 1.0).to_event(1))


def test_an_infinite_density_is_named() -> None:
    x = torch.full((5, 2), 0.3)
    x[2, 1] = 0.0
    for estimate in (log_likelihood, pv.naive_log_likelihood):
        with pytest.raises(ValueError, match=r"datum 2 is infinite .* the model's site 'x' has an infinite density"):
            estimate(Pole(), x, num_particles=3)
    # Such draws would have weight zero, and the others alone a plausible estimate.
    with pytest.raises(ValueError, match=r"datum 0 .* the guide's site 'z' has an infinite density"):
        log_likelihood(SpikyGuide(), x, num_particles=30)


def test_one_impossible_draw_is_no_error_and_nothing_but_such_draws_is() -> None:
    class Wall(Faulty):
        def model(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
                allowed = torch.where((z[..., 0] > 0) & (x[..., 0] < 1), 0.0, -math.inf)
                pyro.factor("wall", allowed, has_rsample=False)
                pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1), obs=x)

    x = torch.zeros(3, 2)
    ll = log_likelihood(Wall(), x, num_particles=400, seed=0)
    # Half of the prior is behind the wall: p(x) = N(0; 0, I)/2, and the share of draws before it is binomial.
    exact = -math.log(2 * math.pi) - math.log(2)
    assert ((ll.per_datum - exact).abs() <= 4 / 400**0.5).all()
    assert (ll.curve[0] == -math.inf).all()
    assert "L_1 ± Monte Carlo error" in repr(ll)
    x[1] = 2.0
    for estimate in (log_likelihood, pv.naive_log_likelihood):
        with pytest.raises(ValueError, match=r"all 7 weights of datum 1 are zero: .*the model's site 'wall' rules"):
            estimate(Wall(), x, num_particles=7)


@pytest.mark.parametrize(
    ("likelihood", "value"),
    [
        (pv.Bernoulli(), 0.5),
        (pv.ContinuousBernoulli(), 1.5),
        (pv.DiscretisedLogistic(17), 0.3),
    ],
)
def test_data_of_the_wrong_kind_are_refused_with_what_would_take_them(likelihood: Any, value: float) -> None:
    pair, x = pv.models.VAE((3,), pv.StandardNormal(2), likelihood), torch.full((2, 3), value)
    for estimate in (log_likelihood, pv.naive_log_likelihood):
        with pytest.raises(ValueError, match=r"6 values outside the support of site 'x' .* use a Bernoulli"):
            estimate(pair, x)


def test_equal_data_share_their_error_and_negative_zero_is_zero() -> None:
    pair, one = WrongScale(0.8), torch.randn(1, 3)
    once = log_likelihood(pair, one, num_particles=50, seed=0)
    twice = log_likelihood(pair, one.expand(9, 3), num_particles=50, seed=0)
    assert twice.mean_monte_carlo_error == pytest.approx(once.mean_monte_carlo_error, rel=1e-12)
    zero = torch.zeros(1, 3)
    plus, minus = (log_likelihood(pair, x, num_particles=50, seed=0).per_datum for x in (zero, -zero))
    assert torch.equal(plus, minus)
