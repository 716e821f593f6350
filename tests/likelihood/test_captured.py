"""Log-weights from a recording are those of Pyro's eager pass, for every pair, and refusals name their reason."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.capture.tracer import CaptureError
from pyro_vae.likelihood import captured
from pyro_vae.likelihood.blocks import Blocks, single
from pyro_vae.models import VAE
from pyro_vae.networks.mlp import MLP
from pyro_vae.pair.modes import evaluation
from tests.support.capture_cases import CASES, batches

# The estimator itself, from the pair's own guide.
log_likelihood = partial(pv.log_likelihood, proposal="guide")


def blocks_of(num_particles: int, size: int, nbytes: int = 100) -> Blocks:
    return Blocks(0, num_particles, size, nbytes)


def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captured, "compile_graph", lambda graph, inputs: None)


def small_vae() -> VAE:
    shape = (9,)
    networks: dict[str, Any] = {"encoder": MLP([shape], 6, (8,)), "decoder": MLP([(3,)], 9, (8,))}
    return VAE(shape, pv.StandardNormal(3), pv.Bernoulli(), **networks)


def weights(pair: pv.Pair) -> captured.LogWeights:
    return lambda chunk, size: pv.log_terms(pair, *chunk, num_particles=size).log_weights


@pytest.mark.parametrize("name", CASES)
def test_recorded_weights_of_every_pair_are_the_eager_ones(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    uncompiled(monkeypatch)
    pair = CASES[name]()
    batch, *_ = batches(pair)
    with evaluation(pair):
        # Recorded without being compiled: 60 blocks of 3 and of 1 particles are to come.
        monkeypatch.setattr(captured, "BLOCKS_BEFORE_RECORDING", 60)
        replay = captured.captured_blocks(pair, weights(pair), blocks_of(4, 3), 60, "auto")
        for row, size in [(0, 3), (1, 3), (5, 1), (3, 2)]:
            datum = single(batch, row)
            torch.manual_seed(0)
            expected = weights(pair)(datum, size)
            torch.manual_seed(0)
            assert torch.equal(replay(datum, size).expand_as(expected), expected)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_a_compiled_estimate_is_the_eager_one_up_to_rounding(dtype: torch.dtype, tolerance: float) -> None:
    pair, x = small_vae().to(dtype), torch.rand(7, 9).gt(0.5).to(dtype)
    settings: dict[str, Any] = {"num_particles": 50, "seed": 3}
    state = torch.get_rng_state()
    eager, compiled, again = (log_likelihood(pair, x, capture=flag, **settings) for flag in (False, True, True))
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
        replay = captured.captured_blocks(pair, weights(pair), blocks_of(2, 2), 4, True)
    with torch.no_grad():
        pair.p_x.network.layers[-1].bias += 1.0
    with evaluation(pair):
        torch.manual_seed(0)
        expected = weights(pair)((x[1:2],), 2)
        torch.manual_seed(0)
        assert torch.equal(replay((x[1:2],), 2), expected)


def test_auto_records_for_a_thousand_blocks_and_compiles_for_enough_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    pair, x, made = small_vae(), torch.ones(1, 9), []
    recorded = captured._recorded

    def noted(*arguments: Any, compiled: bool) -> Any:
        made.append(compiled)
        return recorded(*arguments)

    monkeypatch.setattr(captured, "_recorded", noted)

    def choices(num_particles: int, nbytes: int, num_data: int, capture: captured.Capture) -> list[tuple[int, bool]]:
        made.clear()
        blocks = blocks_of(num_particles, 10, nbytes)
        replay = captured.captured_blocks(pair, weights(pair), blocks, num_data, capture)
        sizes = []
        for size in dict.fromkeys(blocks.sizes):
            count = len(made)
            with evaluation(pair):
                replay((x,), size)
            sizes += [size] * (len(made) - count)
        return list(zip(sizes, made, strict=True))

    assert choices(10, 100, 999, "auto") == []
    assert choices(10, 100, 1000, "auto") == [(10, False)]
    # Two full blocks a datum, and a smaller one.
    assert choices(25, 100, 500, "auto") == [(10, False)]
    assert choices(25, 100, 1000, "auto") == [(10, False), (5, False)]
    # 2000 times 32 MiB, as 1000 blocks of 64; the small blocks hold half as much.
    assert choices(10, 64 * 2**20, 999, "auto") == []
    assert choices(10, 64 * 2**20, 1000, "auto") == [(10, True)]
    assert choices(15, 64 * 2**20, 1000, "auto") == [(10, True), (5, False)]
    assert choices(25, 100, 1, True) == [(10, True), (5, True)]
    assert choices(10, 64 * 2**20, 1000, False) == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_an_uncompiled_recording_is_bitwise_the_eager_pass(dtype: torch.dtype) -> None:
    # 110 data of two blocks, one of 31 and one of 30 particles, are recorded; of 60 data the same two are not.
    pair, x = small_vae().to(dtype), torch.rand(110, 9).gt(0.5).to(dtype)
    settings: dict[str, Any] = {"num_particles": 61, "seed": 3}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(captured, "BLOCKS_BEFORE_RECORDING", 100)
        patch.setattr("pyro_vae.runtime.memory.CPU_WORKING_SET", 40 * 9 * x.element_size() * 8)
        eager, auto = (log_likelihood(pair, x, capture=flag, **settings) for flag in (False, "auto"))
        few = log_likelihood(pair, x[:60], **settings)
    for name in ("per_datum", "standard_error", "ess", "pareto_k", "smoothed", "curve", "curve_standard_error"):
        assert torch.equal(getattr(auto, name), getattr(eager, name)), name
        assert torch.equal(getattr(auto, name)[..., :60], getattr(few, name)), name


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
            pyro.sample("z", dist.Normal(x / 2, self.scale if bool(x.isfinite().all()) else 0.5))


def test_what_cannot_be_recorded_is_eager_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captured, "BYTES_BEFORE_COMPILING", 1)
    pair, x = AsksForAValue(), torch.randn(5)
    with pytest.warns(UserWarning, match=r"test_captured.py:\d+ asks for a tensor's value") as caught:
        ll = log_likelihood(pair, x, num_particles=20, seed=0)
    assert [warning.filename for warning in caught] == [__file__]
    assert torch.equal(ll.per_datum, log_likelihood(pair, x, num_particles=20, seed=0, capture=False).per_datum)
    with pytest.raises(CaptureError, match=r"test_captured.py:\d+ asks for a tensor's value"):
        log_likelihood(pair, x, num_particles=20, capture=True)


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
        log_likelihood(pair, torch.randn(5), num_particles=20, capture=True)


def test_products_are_compared_alone_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    uncompiled(monkeypatch)
    monkeypatch.setattr("pyro_vae.capture.onednn.FEWEST_MULTIPLICATIONS", 0)
    pair, x = small_vae().float(), torch.ones(4, 9, dtype=torch.float32)
    compared = []

    def faster(graph: Any, inputs: Any) -> Any:
        compared.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
        graph(*inputs)
        return graph

    monkeypatch.setattr(captured, "_FASTER", {})
    monkeypatch.setattr(captured, "with_faster_products", faster)
    with evaluation(pair):
        for _ in range(2):
            captured.captured_blocks(pair, weights(pair), blocks_of(3, 3), 4, True)((x[:1],), 3)
    # Two layers of the encoder, two of the decoder.
    assert compared in ([[torch.ops.aten.addmm.default] * 4], [])
    assert bool(compared) == torch.backends.mkldnn.is_available()


def test_another_value_of_capture_is_refused() -> None:
    with pytest.raises(ValueError, match=re.escape("capture is 'yes'; it must be 'auto', True or False")):
        log_likelihood(small_vae(), torch.ones(2, 9), capture="yes")  # type: ignore[arg-type]


class MatrixFirst(pv.Pair):
    """Parameters to the left of a batched tensor, where torch's matmul looks at ``requires_grad``."""

    x_shape = (4,)

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.inverse = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(3, 4))

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
            loc = (self.weight @ z.unsqueeze(-1)).squeeze(-1)
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            loc = (self.inverse @ x.unsqueeze(-1)).squeeze(-1)
            pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_recording_has_the_eager_bits_with_a_matrix_to_the_left(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    pair, x = MatrixFirst().to(dtype), torch.randn(3, 4, dtype=dtype)
    eager = log_likelihood(pair, x, num_particles=333, seed=0, capture=False)
    monkeypatch.setattr(captured, "BLOCKS_BEFORE_RECORDING", 1)
    assert torch.equal(log_likelihood(pair, x, num_particles=333, seed=0).per_datum, eager.per_datum)
