"""The ways of taking a training step that the benchmarks time, each a function of one batch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pyro
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

import pyro_vae as pv
from pyro_vae.inspection import inspect
from pyro_vae.networks.mlp import MLP
from pyro_vae.training.captured_step import captured_step
from pyro_vae.training.precision import mixed
from pyro_vae.training.step import eager_step

PIXELS = 784
BATCH = 128
LEARNING_RATE = 1e-3
SIDE = 28
SRVAES = ("SRVAE, conv nets", "SRVAE, MLPs")
IMAGE = (1, SIDE, SIDE)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

Row = Callable[[Tensor], object]


def batches_of(shape: tuple[int, ...], size: int = BATCH) -> list[Tensor]:
    """Return binary batches of data of one shape."""
    return [torch.rand(size, *shape).gt(0.7).float().to(DEVICE) for _ in range(16)]


def vae(hidden: int, latent: int, pixels: int = PIXELS) -> pv.models.VAE:
    """Return a Bernoulli VAE with one hidden layer on each side."""
    torch.manual_seed(0)
    encoder, decoder = MLP([(pixels,)], 2 * latent, (hidden,)), MLP([(latent,)], pixels, (hidden,))
    pair = pv.models.VAE((pixels,), pv.StandardNormal(latent), pv.Bernoulli(), encoder=encoder, decoder=decoder)
    return pair.to(DEVICE)


def srvae(name: str) -> pv.models.SRVAE:
    """Return an SRVAE of MNIST's shape, y on the grid of 256 gray levels, with the default conv nets or with MLPs."""
    torch.manual_seed(0)
    x, y, size = IMAGE, (1, SIDE // 2, SIDE // 2), 16
    head = pv.DiscretisedLogistic(256)
    networks = {
        "q_u": MLP([y], 2 * size),
        "q_z": MLP([x], 2 * size),
        "p_y": MLP([(size,)], head.num_outputs(y)),
        "p_x": MLP([y, (size,)], head.num_outputs(x)),
    }
    prior = pv.MixtureOfGaussians(10, size)
    chosen: Any = networks if "MLP" in name else {}
    return pv.models.SRVAE(x, 2, prior, "discretised", head, levels=256, networks=chosen).to(DEVICE)


def vae_rows(hidden: int, latent: int) -> dict[str, Row]:
    """Return every way of taking a step of a VAE."""
    pair = vae(hidden, latent)
    rows = pair_rows(pair) | {
        "captured, compiled, bf16": in_bf16(copy.deepcopy(pair)),
        "PyTorch by hand": by_hand(copy.deepcopy(pair), compiled=False),
        "PyTorch by hand, torch.compile": by_hand(copy.deepcopy(pair), compiled=True),
    }
    return rows | ({"five products, oneDNN": products(hidden)} if DEVICE.type == "cpu" else {})


def srvae_rows(name: str) -> dict[str, Row]:
    """Return the ways of taking a step of any pair."""
    return pair_rows(srvae(name))


def pair_rows(pair: pv.Pair) -> dict[str, Row]:
    """Return the ways of taking a step that any pair has."""
    return {
        "captured, compiled": captured(copy.deepcopy(pair), compiled=True),
        "captured": captured(copy.deepcopy(pair), compiled=False),
        "eager": eager(copy.deepcopy(pair)),
        "Pyro's SVI.step": by_svi(copy.deepcopy(pair)),
    }


def captured(pair: pv.Pair, compiled: bool) -> Row:
    """Return the captured step."""
    return captured_step(pair, Trace_ELBO(), adam(pair), compiled=compiled)


def eager(pair: pv.Pair) -> Row:
    """Return the package's eager step, under the same optimiser."""
    return eager_step(pair, Trace_ELBO(), adam(pair))


def in_bf16(pair: pv.Pair) -> Row:
    """Return the captured step with its networks in bfloat16, as ``fit(precision="bf16-mixed")`` takes it."""
    modules = list(inspect(pair, (torch.zeros(2, *pair.x_shape, device=DEVICE),)).networks)
    step = captured(pair, compiled=True)

    def mixed_step(x: Tensor) -> object:
        with mixed(modules, DEVICE):
            return step(x)

    return mixed_step


def by_svi(pair: pv.Pair) -> Row:
    """Return the step of Pyro's SVI with Pyro's optimiser, without validation."""
    return SVI(pair.model, pair.guide, pyro.optim.Adam({"lr": LEARNING_RATE}), Trace_ELBO()).step


def by_hand(pair: pv.models.VAE, compiled: bool) -> Row:
    """Return the step that a tutorial would write: the networks, a draw, the loss with its divergence closed."""
    encoder, decoder, optimizer = pair.q_z.network, pair.p_x.network, adam(pair)

    def loss(x: Tensor) -> Tensor:
        loc, raw = encoder(x).chunk(2, -1)
        scale = torch.nn.functional.softplus(raw) + 1e-4
        z = loc + scale * torch.randn_like(scale)
        divergence = 0.5 * (loc**2 + scale**2 - 1).sum() - scale.log().sum()
        return (binary_cross_entropy_with_logits(decoder(z), x, reduction="sum") + divergence) / len(x)

    # On CUDA the mode that replays CUDA graphs. Tuning each product as well would take minutes a size.
    cuda = DEVICE.type == "cuda"
    mode = "reduce-overhead" if cuda else None
    # A graph for each batch size: one for them all would be slower, and is made once a short last batch has come.
    forward = torch.compile(loss, mode=mode, dynamic=False) if compiled else loss

    def step(x: Tensor) -> object:
        if cuda and compiled:
            torch.compiler.cudagraph_mark_step_begin()
        optimizer.zero_grad()
        value = forward(x)
        value.backward()
        optimizer.step()
        # Reading it would wait for the device, which a fast loop does once in a while, as ours does.
        return value.detach().clone() if cuda else value.item()

    return step


def adam(pair: pv.Pair) -> torch.optim.Optimizer:
    """Return the fused optimiser."""
    return torch.optim.Adam(pair.parameters(), lr=LEARNING_RATE, fused=True)


def products(hidden: int) -> Row:
    """Return the five large matrix products of a step alone: two forward, three backward."""
    shapes: Sequence[tuple[int, int, int]] = [
        (BATCH, PIXELS, hidden),
        (BATCH, hidden, PIXELS),
        (BATCH, PIXELS, hidden),
        (hidden, BATCH, PIXELS),
        (PIXELS, BATCH, hidden),
    ]
    pairs = [(torch.randn(rows, inner), torch.randn(columns, inner)) for rows, inner, columns in shapes]

    def step(x: Tensor) -> None:
        for left, right in pairs:
            torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], None)

    return step
