"""Matrix products through oneDNN: the same products, and the choice by timing leaves everything as it was."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_vae.capture import onednn as products
from pyro_vae.capture.onednn import matmul_operator, through_onednn, with_faster_products

onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs torch built with oneDNN")


@pytest.fixture(autouse=True)
def _every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "FEWEST_MULTIPLICATIONS", 0)


def step(x: Tensor, weight: Tensor, bias: Tensor, count: Tensor) -> tuple[Tensor, ...]:
    count.add_(1)
    h = torch.addmm(bias, x, weight.t()) + torch.randn(4, 5, dtype=x.dtype)
    return h, h @ weight, h.t() @ x, torch.addmm(h, x, weight.t()), torch.addmm(bias, x, weight.t(), beta=2)


def inputs(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    x, weight, bias = (torch.randn(shape, dtype=dtype) for shape in ((4, 3), (5, 3), (5,)))
    return [x, weight, bias, torch.zeros((), dtype=dtype)]


@onednn
def test_products_are_the_same() -> None:
    arguments = inputs()
    graph = make_fx(step, tracing_mode="fake")(*arguments)
    other = through_onednn(graph)
    assert other is not None
    # Neither a matrix added to the product nor a scaled bias is a linear layer.
    assert len(other.graph.find_nodes(op="call_function", target=matmul_operator())) == 3
    torch.manual_seed(0)
    expected = graph(*arguments)
    torch.manual_seed(0)
    # Sums of five products in float32.
    torch.testing.assert_close(other(*arguments), expected, rtol=1e-5, atol=1e-5)


def test_products_in_bfloat16_run_on_every_processor() -> None:
    # oneDNN has no bfloat16 matmul without AVX-512; there torch's are kept.
    arguments = inputs(torch.bfloat16)
    graph = make_fx(step, tracing_mode="fake")(*arguments)
    chosen = through_onednn(graph) or graph
    torch.manual_seed(0)
    expected = graph(*arguments)
    torch.manual_seed(0)
    # Sums of five products, rounded to eight bits once more or once less.
    torch.testing.assert_close(chosen(*arguments), expected, rtol=2.0**-6, atol=2.0**-6)


def test_the_operator_is_registered_at_its_first_use() -> None:
    code = (
        "import torch, pyro_vae; from pyro_vae.capture.onednn import matmul_operator as op; "
        "assert not hasattr(torch.ops.pyro_vae, 'matmul'); assert op() is op() is torch.ops.pyro_vae.matmul.default"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


@onednn
def test_small_products_stay_with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = make_fx(step, tracing_mode="fake")(*inputs())
    # 4 × 3 by 3 × 5, 4 × 5 by 5 × 3, 5 × 4 by 4 × 3: sixty multiplications each.
    for fewest, sent in ((60, 3), (61, 0)):
        monkeypatch.setattr(products, "FEWEST_MULTIPLICATIONS", fewest)
        other = through_onednn(graph)
        found = [] if other is None else other.graph.find_nodes(op="call_function", target=matmul_operator())
        assert len(found) == sent


def test_double_precision_stays_with_torch() -> None:
    arguments = inputs(torch.float64)
    graph = make_fx(step, tracing_mode="fake")(*arguments)
    assert through_onednn(graph) is None
    assert with_faster_products(graph, arguments) is graph


@onednn
@pytest.mark.parametrize(("gain", "kept"), [(1.0, True), (-1e9, False)])
def test_the_choice_leaves_inputs_and_generator(monkeypatch: pytest.MonkeyPatch, gain: float, kept: bool) -> None:
    # No way is faster by all of its time, and every way is by less than nothing.
    monkeypatch.setattr(products, "LEAST_GAIN", gain)
    arguments = inputs()
    graph = make_fx(step, tracing_mode="fake")(*arguments)
    before, generator = [tensor.clone() for tensor in arguments], torch.get_rng_state()
    assert (with_faster_products(graph, arguments) is graph) == kept
    assert all(map(torch.equal, arguments, before))
    assert torch.equal(generator, torch.get_rng_state())
