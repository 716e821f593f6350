"""Mutual information under the guide against closed forms, quadrature and its own limits; noise against β."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.transforms import Planar
from torch import Tensor

import pyro_vae as pv
from pyro_vae.data import DataSet
from pyro_vae.diagnostics.collapse import noise_modules
from pyro_vae.models import SRVAE, VAE, LinearGaussianMixtureVAE, LinearGaussianVAE, LinearTwoStageVAE
from pyro_vae.report.figures import collapse, scales
from pyro_vae.report.files import write_collapse
from pyro_vae.report.markdown import write_report
from pyro_vae.runtime.random_state import own_random_state


class Channel(pv.Pair):
    """A guide N(gain x, s² I): a Gaussian channel from data to latents, whose capacity is known."""

    def __init__(self, gain: float, scale: float = 1.0, size: int = 1) -> None:
        super().__init__()
        self.x_shape, self.gain, self.scale = (size,), gain, scale

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(self.x_shape), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.gain * x, self.scale).to_event(1))


def information(pair: Any, *batch: Tensor, seed: int = 0) -> pv.MutualInformation:
    found = pv.collapse_report(pair, *batch, num_particles=2, seed=seed).mutual_information
    assert found is not None
    return found


def test_a_gaussian_channel_has_its_capacity() -> None:
    # x ~ N(0, I₂), z = 0.7 x + ε: I = ½ log(1 + 0.49) per entry. The bias, some χ²/2B with χ² of the order of 1, is a
    # tenth of the standard error at B = 512.
    x, exact = torch.randn(512, 2), math.log1p(0.49)
    found = information(Channel(0.7, size=2), x)
    assert (found.num_data, found.sites) == (512, ("z",))
    assert found.limit == pytest.approx(math.log(512))
    assert abs(found.value - exact) <= 4 * found.standard_error
    assert found.standard_error < 0.1


def test_independent_latents_carry_nothing() -> None:
    found = information(Channel(0.0), torch.randn(50, 1))
    # Every density is the same: only the logarithm of a sum of 50 rounds.
    assert abs(found.value) < 1e-13
    assert found.standard_error < 1e-13


def test_far_posteriors_reach_the_limit_and_never_pass_it() -> None:
    found = information(Channel(1e4), torch.linspace(-1, 1, 40)[:, None])
    assert found.value == pytest.approx(math.log(40), rel=1e-13)
    report = pv.collapse_report(Channel(1e4), torch.linspace(-1, 1, 40)[:, None])
    assert "above the limit of so many data" in repr(report)
    assert "above what" not in repr(pv.collapse_report(Channel(1.0), torch.randn(40, 1)))


def test_given_its_batch_the_estimate_is_unbiased() -> None:
    x = torch.tensor([[-2.0], [-0.5], [0.3], [1.0], [4.0]])
    pair = Channel(0.8)
    # The information between z and the datum's index, h(mixture) − h(component), by quadrature over z.
    z = torch.linspace(-12, 14, 20_001)
    log_mixture = dist.Normal(0.8 * x, 1.0).log_prob(z).logsumexp(0) - math.log(5)
    entropy = -torch.trapezoid(log_mixture.exp() * log_mixture, z)
    exact = float(entropy) - 0.5 * math.log(2 * math.pi * math.e)
    values = torch.tensor([information(pair, x, seed=seed).value for seed in range(150)])
    assert abs(float(values.mean()) - exact) <= 4 * float(values.std()) / 150**0.5
    # Less than the log 5 that it cannot exceed, and more than noise.
    assert 0.3 < exact < math.log(5) - 0.3


def test_exact_posteriors_of_probabilistic_pca() -> None:
    pair = LinearGaussianVAE(5, 2)
    with torch.no_grad():
        x = pv.generate(pair, 500, seed=0).x
        # On the model's own data q(z) is the prior, and I = ½ log |I + WᵀW/γ²|.
        exact = 0.5 * float(torch.logdet(torch.eye(2) + pair.weight.mT @ pair.weight / pair.scale() ** 2))
    found = information(pair, x)
    # Biased downwards by some χ²/2B, which is less than e^{2I}/2B here.
    assert found.value <= exact + 4 * found.standard_error
    assert found.value >= exact - 4 * found.standard_error - math.exp(2 * exact) / 1000


def test_latents_count_together_and_discrete_ones_too() -> None:
    prior = pv.MixtureOfGaussians(3, 2)
    mixture, x = LinearGaussianMixtureVAE(4, prior), torch.randn(60, 4)
    assert information(mixture, x).sites == ("c", "z")
    two_stage = LinearTwoStageVAE(6, 2, pv.MixtureOfGaussians(3, 2), 2)
    # A point mass is data, and a prior that sees it bounds another information: no upper bound is claimed.
    report = pv.collapse_report(two_stage, torch.randn(40, 6))
    assert report.mutual_information is not None
    assert report.mutual_information.sites == ("c", "u", "z")
    assert "at most the KL" not in repr(report)
    assert "at most the KL" in repr(pv.collapse_report(mixture, x))


def test_it_does_not_exceed_the_divergence() -> None:
    pair, x = VAE((4,), pv.StandardNormal(3)), 3 * torch.randn(200, 4)
    report = pv.collapse_report(pair, x, seed=0)
    found = report.mutual_information
    assert found is not None
    assert found.value <= report.sites["z"].kl + 4 * math.hypot(
        found.standard_error, report.sites["z"].kl_standard_error
    )


class Flow(Channel):
    """A guide whose density is known at its own draws only."""

    def __init__(self) -> None:
        super().__init__(1.0, size=2)
        self.planar = Planar(2)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.TransformedDistribution(dist.Normal(x, 1.0).to_event(1), [self.planar]))


def test_a_guide_that_cannot_score_other_values_has_none() -> None:
    report = pv.collapse_report(Flow(), torch.randn(20, 2), seed=0)
    assert report.mutual_information is None
    assert "I(x;" not in repr(report)
    assert report.sites["z"].kl > -1


# Noise


@pytest.mark.parametrize("scale", [0.1, 0.5, 3.0])
def test_noise_amounts_to_beta(scale: float) -> None:
    pair, x = VAE((4,), pv.StandardNormal(2), pv.Gaussian(pv.FixedScale(scale))), torch.randn(7, 4)

    def gradient(beta: float) -> Tensor:
        with own_random_state(0):
            terms = pv.log_terms(pair, x)
        objective = (terms.log_lik + beta * (terms.log_prior - terms.log_guide)).sum()
        return torch.cat([g.flatten() for g in torch.autograd.grad(objective, list(pair.parameters()))])

    with_noise = gradient(1.0)
    assert pv.collapse_report(pair, x).noise["x"] == pytest.approx(scale)
    pair.p_x.head.scale = pv.FixedScale(1.0)
    # Same draws, for the guide does not see γ; then the same direction, 1/γ² times as long.
    torch.testing.assert_close(with_noise * scale**2, gradient(scale**2), rtol=1e-9, atol=1e-11)


def test_noise_is_that_of_data_sites() -> None:
    pair, x = LinearTwoStageVAE(6, 2, pv.MixtureOfGaussians(3, 2), 2, x_scale=0.3, y_scale=0.6), torch.randn(5, 6)
    # All start at scales of their own; z's belongs to a latent, though it has the value of none.
    assert noise_modules(pair, x) == {"y": "y_scale", "x": "x_scale"}
    noise = pv.collapse_report(pair, x).noise
    assert noise == {"y": pytest.approx(0.6), "x": pytest.approx(0.3)}
    equal = LinearTwoStageVAE(6, 2, pv.MixtureOfGaussians(3, 2), 2)
    assert noise_modules(equal, x) == {"y": "y_scale", "x": "x_scale"}
    batch_optimal = VAE((4,), pv.StandardNormal(2), pv.Gaussian(pv.BatchOptimalScale()))
    assert noise_modules(batch_optimal, torch.randn(5, 4)) == {"x": "p_x.head.scale"}
    assert noise_modules(VAE((4,), pv.StandardNormal(2), pv.Bernoulli()), torch.ones(5, 4)) == {}
    assert pv.collapse_report(VAE((4,), pv.StandardNormal(2), pv.Bernoulli()), torch.ones(5, 4)).noise == {}


def digits() -> DataSet:
    data = pv.data.load("digits")
    return data._replace(train=data.train[:64].double(), test=data.test[:24].double())


def test_a_run_reports_what_its_latents_carry_and_its_noise_over_time(tmp_path: Path) -> None:
    data, pair = digits(), SRVAE((1, 8, 8), 2, pv.MixtureOfGaussians(3, 2), "delta")
    fitted = {"epochs": 3, "batch_size": 32, "warmup": 2, "beta": 2.0, "run_dir": tmp_path, "progress": False}
    run = pv.fit(pair, data.train, **fitted)
    write_collapse(tmp_path, pair, data)
    report = write_report(tmp_path).read_text()
    ours = pv.collapse_report(pair, data.test, seed=0)
    for line in ours.sentences:
        assert f"* {line}" in report
    assert f"| z | {ours.sites['z'].kl:.3f} ± {ours.sites['z'].kl_standard_error:.3f} | " in report
    assert json.loads((tmp_path / "collapse.json").read_text())["mutual_information"]["value"] == (
        ours.mutual_information.value if ours.mutual_information is not None else None
    )
    first, last = run.metrics[0], run.metrics[-1]
    for site, module in (("x", "p_x.head.scale"), ("y", "p_y.head.scale")):
        began, ended = first["monitor"][module], last["monitor"][module]
        assert f"{site}: γ was {began:.4g} after epoch 1 and {ended:.4g} after epoch 3" in report
        # β of training, here 2 after its warm-up, times that of the noise.
        assert f"and {2 * ended**2:.3g}." in report
    assert "![collapse](figures/collapse.png)" in report
    figure = scales(pair, data, run.metrics)
    assert figure is not None
    lines = {line.get_label(): line.get_ydata() for line in figure.axes[1].get_lines()}
    expected = [record["beta"] * record["monitor"]["p_x.head.scale"] ** 2 for record in run.metrics]
    assert list(lines["site x"]) == pytest.approx(expected)


def test_the_figure_of_units_shows_each_and_whether_it_is_active() -> None:
    report = pv.collapse_report(Channel(1.0, size=3), torch.randn(30, 3) * torch.tensor([3.0, 1.0, 0.0]), seed=0)
    figure = collapse(report)
    assert figure is not None
    heights = sorted(bar.get_height() for bar in figure.axes[0].patches)
    assert heights == pytest.approx(sorted(report.sites["z"].kl_per_dimension.tolist()))
    assert {text.get_text() for text in figure.axes[0].get_legend().get_texts()} == {"2 active", "1 idle"}
