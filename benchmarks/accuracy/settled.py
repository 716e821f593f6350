"""Estimate the log-likelihoods of test digits from the guide and from chosen proposals, for ten trained models.

    python -m benchmarks.accuracy.settled --models mlp conv

Each model is trained first, or taken up from its run folder. All rows are of the same digits, on one thread. Times are
of whole calls, recording and compiling included. Each model's rows are kept as they are done.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
import tyro
from torch import nn

import pyro_vae as pv
from benchmarks.accuracy import two_stage_mnist
from benchmarks.harness.common import RESULTS, RUNS, save, trained
from benchmarks.published import flows, iwae, ladder, vamp_prior
from pyro_vae.networks.convolutional import ConvDecoder, ConvEncoder
from pyro_vae.networks.mlp import MLP
from pyro_vae.runtime.files import read_json

# The literature's protocol first; the last row is to take a quarter of its time.
ROWS: tuple[tuple[Literal["guide", "auto"], int], ...] = (("guide", 5000), ("auto", 1000), ("auto", 100))


@dataclass(frozen=True)
class Model:
    """A model to train.

    Args:
        title: for tables.
        data: name of the data set.
        make: makes the pair from the data.
        settings: of training.
    """

    title: str
    data: str
    make: Callable[[pv.data.DataSet], pv.Pair]
    settings: dict[str, Any]


def mlp(data: pv.data.DataSet) -> pv.Pair:
    """Return the VAE 784–400–40."""
    encoder, decoder = (
        MLP([data.x_shape], 80, (400,), nn.functional.relu),
        MLP([(40,)], 784, (400,), nn.functional.relu),
    )
    return pv.models.VAE(data.x_shape, pv.StandardNormal(40), pv.Bernoulli(), encoder=encoder, decoder=decoder)


def conv(data: pv.data.DataSet) -> pv.Pair:
    """Return a convolutional VAE with 40 latents."""
    encoder, decoder = ConvEncoder(data.x_shape, 80), ConvDecoder([(40,)], data.x_shape)
    return pv.models.VAE(data.x_shape, pv.StandardNormal(40), pv.Bernoulli(), encoder=encoder, decoder=decoder)


def importance_weighted(data: pv.data.DataSet) -> pv.Pair:
    """Return the IWAE 784–200–200–50."""
    pair = pv.models.VAE(
        data.x_shape,
        pv.StandardNormal(50),
        pv.Bernoulli(),
        encoder=MLP([data.x_shape], 100, (200, 200), torch.tanh),
        decoder=MLP([(50,)], 784, (200, 200), torch.tanh),
    )
    iwae.initialise(pair, data.train.mean(0).flatten())
    return pair


def two_stage(name: str) -> Model:
    """Return one of the two-stage models on MNIST, or the VAE beside them."""
    return Model(
        f"{name}, MNIST",
        "mnist",
        lambda data: two_stage_mnist.make_pair(name, data.x_shape),
        {"epochs": 8, "batch_size": 128},
    )


MODELS = {
    "mlp": Model("VAE 784–400–40", "static-mnist", mlp, {"epochs": 25}),
    "conv": Model("convolutional VAE, 40 latents", "static-mnist", conv, {"epochs": 15}),
    "vamp-prior": Model(
        "VampPrior, gated 784–300–300–40",
        "static-mnist",
        lambda data: vamp_prior.make_pair("VampPrior", data),
        {"epochs": 12, "lr": 5e-4, "warmup": 4},
    ),
    "iwae": Model(
        "IWAE 784–200–200–50, k = 5",
        "static-mnist",
        importance_weighted,
        {"epochs": 10, "loss": pv.objectives.iwae, "num_particles": 5},
    ),
    "flow": Model(
        "autoregressive flow, 784–200–20",
        "static-mnist",
        lambda data: flows.make_pair("autoregressive", 4, data.x_shape),
        {"epochs": 15},
    ),
    "ladder": Model(
        "ladder of 3 layers, batch norm",
        "static-mnist",
        lambda data: ladder.make_pair(*ladder.LADDERS[3], data.x_shape, batch_norm=True),
        {"epochs": 15, "warmup": 8},
    ),
    **{
        name.lower().replace(", ", "-"): two_stage(name)
        for name in ("VAE", "SRVAE, delta", "SRVAE, gaussian", "SRVAE, discretised")
    },
}


@dataclass(frozen=True)
class Options:
    """Train models and evaluate them in several ways."""

    models: tuple[str, ...] = tuple(MODELS)
    """Models by name."""
    size: int = 10_000
    """Test digits, after a seeded shuffle."""
    seed: int = 0
    """Of training and draws."""
    data_root: str | None = None
    """Folder of the data sets."""
    results: Path = RESULTS
    """Folder for the results."""


def main(options: Options) -> None:
    """Print a row for each estimate, and save them with those of other models."""
    torch.set_num_threads(1)
    for name in options.models:
        started, model = time.perf_counter(), MODELS[name]
        data = pv.data.load(model.data, options.data_root)
        pair = trained_pair(name, model, data, options.seed)
        x = pv.data.subset_after_shuffle(data.test, options.size)
        rows = [measured(pair, x, *row, options.seed) for row in ROWS]
        kept = read_json(path)["results"] if (path := options.results / "settled.json").exists() else {}
        settings = {key: str(value) for key, value in model.settings.items()}
        kept[name] = {"title": model.title, "rows": rows, "seed": options.seed, "training": settings}
        save("settled", kept, started, options.results)


def trained_pair(name: str, model: Model, data: pv.data.DataSet, seed: int) -> pv.Pair:
    """Return the pair, from its run folder or trained there."""
    torch.manual_seed(seed)
    pair, folder = model.make(data), f"settled/{name}"
    checkpoint = RUNS / folder / "checkpoint" / "pair.safetensors"
    if checkpoint.exists():
        pair.load_state_dict(safetensors.torch.load_file(checkpoint))
    else:
        trained(pair, data, folder, seed=seed, **{"batch_size": 100, **model.settings})
    return pair


def measured(
    pair: pv.Pair, x: torch.Tensor, proposal: Literal["guide", "auto"], count: int, seed: int
) -> dict[str, Any]:
    """Return the estimate by one proposal."""
    began = time.perf_counter()
    ll = pv.log_likelihood(pair, x, num_particles=count, seed=seed, proposal=proposal, progress=False)
    row = {
        "proposal": proposal,
        "num_particles": count,
        "data": len(x),
        "quantity": ll.quantity,
        "mean": ll.mean,
        "standard_error": ll.mean_standard_error,
        "monte_carlo_error": ll.mean_monte_carlo_error,
        "share_settled": float(ll.settled.double().mean()),
        "proposals": {kind: ll.proposals.count(kind) for kind in sorted(set(ll.proposals))},
        "median_ess": float(ll.ess.median()),
        "milliseconds_per_datum": 1000 * (time.perf_counter() - began) / len(x),
    }
    print(json.dumps(row), flush=True)
    return row


if __name__ == "__main__":
    main(tyro.cli(Options))
