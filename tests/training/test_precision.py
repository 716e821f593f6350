"""Mixed precision rounds what networks multiply and nothing else; a run's precision is one of its settings."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.inspection import inspect
from pyro_vae.models import VAE
from pyro_vae.pair.trace import trace_pair
from pyro_vae.runtime.files import read_json
from pyro_vae.training.captured_step import captured_step
from pyro_vae.training.precision import mixed
from pyro_vae.training.step import Step, eager_step
from tests.support.capture_cases import CASES, batches

CPU = torch.device("cpu")
# Eight significant bits, rounded to nearest.
UNIT_ROUNDOFF = 2.0**-8


@pytest.fixture(autouse=True)
def _single() -> None:
    # The suite's own double precision comes back with its fixture.
    torch.set_default_dtype(torch.float32)


@pytest.fixture(autouse=True)
def _narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    # Processors without bfloat16 instructions take the same numbers, slowly.
    monkeypatch.setattr("pyro_vae.training.precision.has_bfloat16", lambda _: True)


class Decoded(pv.Pair):
    """z ~ N(0, I) in model and guide, x ~ N(W z + b, I): its loss hears of rounding by the decoder's means only."""

    x_shape = (6,)

    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.Linear(4, 6)

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(4), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.new_zeros(4), 1.0).to_event(1))


def first_loss(step: Step, *batch: Tensor) -> float:
    torch.manual_seed(0)
    return float(step(*batch))


@pytest.mark.parametrize("make", [eager_step, captured_step])
def test_the_loss_is_that_of_single_precision_up_to_the_rounding_of_products(make: Any) -> None:
    pair, x = Decoded(), torch.randn(50, 6)
    twin = copy.deepcopy(pair)
    exact = first_loss(eager_step(twin, Trace_ELBO(), torch.optim.SGD(twin.parameters())), x)
    torch.manual_seed(0)
    z = trace_pair(pair, x).guide["z"].drawn.squeeze(0)
    with torch.no_grad():
        # Weights, inputs and outputs are rounded once each, the bias at most twice; sums are in float32.
        loc = pair.decoder(z)
        error = 4 * UNIT_ROUNDOFF * (z.abs() @ pair.decoder.weight.abs().mT + pair.decoder.bias.abs())
        # log N(x; m + δ, 1) − log N(x; m, 1) = (x − m) δ − ½ δ².
        bound = float(((x - loc).abs() * error + error**2 / 2).sum(-1).mean())
    with mixed(list(inspect(pair, (x,)).networks), CPU):
        rounded = first_loss(make(pair, Trace_ELBO(), torch.optim.SGD(pair.parameters())), x)
    assert 0 < abs(rounded - exact) <= bound
    # A bound that says something: densities in bfloat16 would be off by their own eight bits.
    assert bound < 10 * UNIT_ROUNDOFF * abs(exact)


@pytest.mark.parametrize("name", CASES)
def test_draws_and_densities_are_in_single_precision(name: str) -> None:
    pair = CASES[name]()
    batch = batches(pair, (6,))[0]
    with mixed(list(inspect(pair, batch).networks), CPU):
        trace = trace_pair(pair, *batch)
        for site in (*trace.guide.values(), *trace.model.values()):
            assert site.drawn.dtype in (torch.float32, torch.int64, torch.bool)
            assert site.fn.log_prob(site.drawn).dtype == torch.float32


class Seen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[torch.dtype] = []

    def forward(self, h: Tensor) -> Tensor:
        self.dtypes.append(h.dtype)
        return h


def small_vae() -> VAE:
    encoder = nn.Sequential(nn.Linear(4, 8), Seen(), nn.Linear(8, 4))
    return VAE((4,), pv.StandardNormal(2), encoder=encoder, decoder=nn.Linear(2, 4))


def test_networks_are_narrow_inside_and_left_as_they_were() -> None:
    pair, x = small_vae(), torch.randn(6, 4)
    encoder: Any = pair.q_z.network
    found = list(inspect(pair, (x,)).networks)
    # The outermost modules, not their layers.
    assert encoder in found
    assert encoder[0] not in found
    encoder[1].dtypes.clear()
    with mixed(found, CPU):
        assert pair.q_z(x).mean.dtype == torch.float32
    assert pair.q_z(x).mean.dtype == torch.float32
    assert encoder[1].dtypes == [torch.bfloat16, torch.float32]
    assert all("forward" not in vars(module) for module in pair.modules())


@pytest.mark.parametrize("name", ["vae", "srvae"])
def test_a_recording_has_the_eager_steps_numbers(name: str) -> None:
    pair = CASES[name]()
    batch = batches(pair, (6,))[0]
    found = []
    for make in (eager_step, captured_step):
        own = copy.deepcopy(pair)
        step = make(own, Trace_ELBO(), torch.optim.SGD(own.parameters(), lr=1e-4))
        with mixed(list(inspect(own, batch).networks), CPU):
            torch.manual_seed(0)
            found.append((torch.tensor([float(step(*batch)) for _ in range(4)]), dict(own.state_dict())))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-7)


def fit(pair: pv.Pair, x: Tensor, **kwargs: Any) -> pv.Run:
    return pv.fit(pair, x, **{"epochs": 2, "batch_size": 16, "progress": False, "device": "cpu"} | kwargs)


def test_mixed_training_keeps_parameters_in_single_precision() -> None:
    plain, x = small_vae(), torch.randn(64, 4)
    pair = copy.deepcopy(plain)
    fit(plain, x)
    fit(pair, x, precision="bf16-mixed", capture=True)
    assert all(parameter.dtype == torch.float32 for parameter in pair.parameters())
    theirs = plain.state_dict()
    distance = max(float((value - theirs[name]).abs().max()) for name, value in pair.state_dict().items())
    # Whatever was rounded, Adam's eight steps move a parameter by lr each: by Cauchy and Schwarz |m̂| exceeds √v̂, with
    # these few steps, by less than a tenth.
    assert 0 < distance <= 2 * 8 * 1.1e-3
    assert all("forward" not in vars(module) for module in pair.modules())


def test_double_precision_converts_pair_and_data() -> None:
    pair, x = small_vae(), torch.randn(64, 4)
    twin = copy.deepcopy(pair).double()
    fit(pair, x, precision="float64", validation=x[:8])
    fit(twin, x.double(), validation=x[:8].double())
    assert all(torch.equal(a, b) for a, b in zip(pair.parameters(), twin.parameters(), strict=True))
    assert pair.q_z(x.double()).mean.dtype == torch.float64


def test_a_run_goes_on_in_its_precision_only(tmp_path: Path) -> None:
    x = torch.randn(64, 4)
    fit(small_vae(), x, precision="bf16-mixed", run_dir=tmp_path)
    assert read_json(tmp_path / "config.json")["fit"]["precision"] == "bf16-mixed"
    for other in (None, "float32"):
        with pytest.raises(ValueError, match="begun with other settings: precision;"):
            fit(small_vae(), x, epochs=3, precision=other, run_dir=tmp_path, resume=True)
    # None takes the pair as it is, and is recorded by what that was.
    fit(small_vae(), x, run_dir=tmp_path / "plain")
    fit(small_vae(), x, epochs=3, precision="float32", run_dir=tmp_path / "plain", resume=True)


def test_bfloat16_is_refused_where_it_can_only_lose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x, pair = torch.randn(64, 4), small_vae()
    fit(small_vae(), x, precision="bf16-mixed", run_dir=tmp_path / "begun")
    monkeypatch.setattr("pyro_vae.training.precision.has_bfloat16", lambda _: False)
    with pytest.raises(ValueError, match="bf16-mixed would be slower than float32 on this cpu"):
        fit(pair, x, precision="bf16-mixed", run_dir=tmp_path / "new")
    assert not (tmp_path / "new").exists()
    # A run of another machine goes on.
    run = fit(small_vae(), x, epochs=3, precision="bf16-mixed", run_dir=tmp_path / "begun", resume=True)
    assert len(run.metrics) == 3


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"precision": "bf16"}, "precision is 'bf16'; it must be one of float32, float64, bf16-mixed"),
        ({"tf32": True}, "tf32 is a mode of CUDA devices, and this run is on cpu"),
    ],
)
def test_unknown_precisions_are_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(small_vae(), torch.randn(64, 4), **kwargs)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("tf32", [False, True])
def test_products_are_rounded_to_tf32_when_asked_for_only(tf32: bool) -> None:
    seen: list[str] = []

    def objective(terms: pv.LogTerms) -> Tensor:
        # The pair is first inspected on a few data, in the caller's settings.
        if terms.log_weights.shape[-1] == 64:
            seen.append(torch.backends.cuda.matmul.fp32_precision)
        return terms.log_weights.mean(0)

    before = torch.backends.cuda.matmul.fp32_precision
    fit(small_vae(), torch.randn(64, 4), device="cuda", tf32=tf32, loss=objective, capture=False)
    assert set(seen) == {"tf32" if tf32 else "ieee"}
    assert torch.backends.cuda.matmul.fp32_precision == before
