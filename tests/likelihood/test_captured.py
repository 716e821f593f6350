"""Log-weights from a recording are those of Pyro's eager pass, for every pair, and refusals name their reason."""

from __future__ import annotations

import re
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.capture.tracer import CaptureError
from pyro_vae.likelihood import captured as chunks
from pyro_vae.models import VAE
from pyro_vae.networks.mlp import MLP
from pyro_vae.pair.modes import evaluation
from tests.support.capture_cases import CASES, batches

ALWAYS: Any = {"num_particles": 3, "memory": 2**20, "capture": True}


def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "compile_graph", lambda graph, inputs: None)


def small_vae() -> VAE:
    shape = (9,)
    networks: dict[str, Any] = {"encoder": MLP([shape], 6, (8,)), "decoder": MLP([(3,)], 9, (8,))}
    return VAE(shape, pv.StandardNormal(3), pv.Bernoulli(), **networks)


def weights(pair: pv.Pair) -> chunks.LogWeights:
    return lambda chunk, size: pv.log_terms(pair, *chunk, num_particles=size).log_weights


@pytest.mark.parametrize("name", CASES)
def test_recorded_weights_of_every_pair_are_the_eager_ones(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    uncompiled(monkeypatch)
    pair = CASES[name]()
    batch, *others = batches(pair)
    with evaluation(pair):
        replay = chunks.recorded_chunks(pair, weights(pair), batch, (6, 3), **ALWAYS)
        # Another chunk of the shape, a shorter one, and fewer particles.
        for chunk, size in [(others[0], 3), (others[1], 3), (batch, 2)]:
            torch.manual_seed(0)
            expected = weights(pair)(chunk, size)
            torch.manual_seed(0)
            assert torch.equal(replay(chunk, size).expand_as(expected), expected)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_a_compiled_estimate_is_the_eager_one_up_to_rounding(dtype: torch.dtype, tolerance: float) -> None:
    pair, x = small_vae().to(dtype), torch.rand(7, 9).gt(0.5).to(dtype)
    # A budget that holds neither all data nor all particles: there are short chunks of both.
    settings: dict[str, Any] = {"num_particles": 50, "memory": 20_000, "seed": 3}
    state = torch.get_rng_state()
    eager, compiled, again = (pv.log_likelihood(pair, x, capture=flag, **settings) for flag in (False, True, True))
    assert torch.equal(torch.get_rng_state(), state)
    for name in ("per_datum", "standard_error", "ess", "smoothed", "curve"):
        torch.testing.assert_close(getattr(compiled, name), getattr(eager, name), rtol=tolerance, atol=tolerance)
    # k̂ divides by the distances between close weights.
    torch.testing.assert_close(compiled.pareto_k, eager.pareto_k, rtol=100 * tolerance, atol=100 * tolerance)
    assert torch.equal(again.per_datum, compiled.per_datum)


def test_parameters_are_read_at_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    uncompiled(monkeypatch)
    pair, x = small_vae(), torch.ones(4, 9)
    with evaluation(pair):
        replay = chunks.recorded_chunks(pair, weights(pair), (x,), (4, 2), **ALWAYS)
    with torch.no_grad():
        pair.p_x.network.layers[-1].bias += 1.0
    with evaluation(pair):
        torch.manual_seed(0)
        expected = weights(pair)((x,), 2)
        torch.manual_seed(0)
        assert torch.equal(replay((x,), 2), expected)


def test_auto_compiles_for_two_thousand_full_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    uncompiled(monkeypatch)
    pair, x = small_vae(), torch.ones(10, 9)
    eager, default = weights(pair), 512 * 2**20

    def is_eager(num_particles: int, memory: int, capture: chunks.Capture) -> bool:
        options: Any = {"num_particles": num_particles, "memory": memory, "capture": capture}
        return chunks.recorded_chunks(pair, eager, (x,), (2, 10), **options) is eager

    with evaluation(pair):
        # 5 · 399 and 5 · 400 full chunks of two data and ten particles.
        assert is_eager(3999, default, "auto")
        assert not is_eager(4000, default, "auto")
        # In smaller chunks the same number is less work.
        assert is_eager(4000, 2**20, "auto")
        assert not is_eager(3999, default, True)
        assert is_eager(4000, default, False)


class AsksForAValue(pv.Pair):
    """z ~ N(0, 1), x ~ N(z, 1), with a scale that Python chooses by the data."""

    x_shape = ()

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, self.scale if x.sum() > 0 else 0.5))


def test_what_cannot_be_recorded_is_eager_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "BYTES_BEFORE_CAPTURE", 1)
    pair, x = AsksForAValue(), torch.randn(5)
    with pytest.warns(UserWarning, match=r"test_captured.py:\d+ asks for a tensor's value") as caught:
        ll = pv.log_likelihood(pair, x, num_particles=20, seed=0)
    assert len(caught) == 1
    assert torch.equal(ll.per_datum, pv.log_likelihood(pair, x, num_particles=20, seed=0, capture=False).per_datum)
    with pytest.raises(CaptureError, match=r"test_captured.py:\d+ asks for a tensor's value"):
        pv.log_likelihood(pair, x, num_particles=20, capture=True)


class Counts(AsksForAValue):
    """A pair that remembers, in Python, how often it ran."""

    calls = 0

    def guide(self, x: Tensor) -> None:
        self.calls = self.calls + 1
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, self.scale))


def test_a_program_that_changes_itself_is_refused() -> None:
    pair = Counts()
    with pytest.raises(CaptureError, match="the program sets 'calls' of Counts"):
        pv.log_likelihood(pair, torch.randn(5), num_particles=20, capture=True)


def test_products_are_compared_alone_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    uncompiled(monkeypatch)
    monkeypatch.setattr("pyro_vae.capture.onednn.FEWEST_MULTIPLICATIONS", 0)
    pair, x = small_vae().float(), torch.ones(4, 9, dtype=torch.float32)
    compared = []

    def faster(graph: Any, inputs: Any) -> Any:
        compared.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
        graph(*inputs)
        return graph

    monkeypatch.setattr(chunks, "_FASTER", {})
    monkeypatch.setattr(chunks, "with_faster_products", faster)
    with evaluation(pair):
        for _ in range(2):
            chunks.recorded_chunks(pair, weights(pair), (x,), (4, 3), **ALWAYS)
    # Two layers of the encoder, two of the decoder.
    assert compared in ([[torch.ops.aten.addmm.default] * 4], [])
    assert bool(compared) == torch.backends.mkldnn.is_available()


def test_another_value_of_capture_is_refused() -> None:
    with pytest.raises(ValueError, match=re.escape("capture is 'yes'; it must be 'auto', True or False")):
        pv.log_likelihood(small_vae(), torch.ones(2, 9), capture="yes")  # type: ignore[arg-type]
