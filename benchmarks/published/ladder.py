"""Ladder VAEs of three and five layers on the static MNIST, by warm-up and by free bits: KL per layer, and log p(x)."""

from __future__ import annotations

import statistics
from itertools import pairwise, product
from typing import Any

import torch
from torch import nn

import pyro_vae as pv
from benchmarks.harness.common import trained
from benchmarks.harness.tables import provenance, with_error
from pyro_vae.networks.mlp import MLP
from pyro_vae.objectives.bounds import free_bits
from pyro_vae.report.markdown import markdown_table

TITLE = "Ladder VAE, static MNIST"
EPOCHS = 28
SEEDS = (0, 1)
LADDERS = {3: ((32, 16, 8), (256, 128, 64)), 5: ((64, 32, 16, 8, 4), (256, 128, 64, 32, 32))}
WAYS = ("warm-up", "warm-up and batch norm", "free bits")
FREE_BITS = 2.0
DATA, PARTICLES = 1000, 200
# Every layer should carry more nats than this.
LEAST = 0.5
# −log p(x) in nats of five layers with 128 latent variables, on dynamically binarised MNIST.
PUBLISHED = 81.84


def run(scale: float, data_root: str | None) -> dict[str, Any]:
    """Train each ladder with each seed and return the KL of its layers and test log p(x)."""
    data = pv.data.load("static-mnist", data_root)
    epochs = max(1, round(scale * EPOCHS))
    x = pv.data.subset_after_shuffle(data.test, DATA)
    rows: dict[str, Any] = {}
    for layers, way in product(LADDERS, WAYS):
        name = f"{layers} layers, {way}"
        rows[name] = {"divergences": [], "negative_log_likelihood": [], "standard_error": [], "seconds": []}
        for seed in SEEDS:
            torch.manual_seed(seed)
            pair = make_pair(*LADDERS[layers], data.x_shape, batch_norm="batch norm" in way)
            # An objective has no β to warm up.
            settings = {"warmup": max(1, epochs // 2)} if "warm-up" in way else {"loss": free_bits(FREE_BITS)}
            run = f"ladder/{layers}-{way.replace(' ', '-')}-{epochs}-{seed}"
            seconds = trained(pair, data, run, epochs=epochs, batch_size=100, seed=seed, **settings)[0]
            report = pv.collapse_report(pair, x, seed=seed)
            ll = pv.log_likelihood(pair, x, num_particles=PARTICLES, seed=seed, proposal="guide")
            rows[name]["divergences"].append([report.sites[f"z{i + 1}"].kl for i in range(layers)])
            rows[name]["negative_log_likelihood"].append(-ll.mean)
            rows[name]["standard_error"].append(ll.mean_standard_error)
            rows[name]["seconds"].append(seconds)
    return {"ladders": rows, "epochs": epochs, "seeds": list(SEEDS), "data": DATA, "particles": PARTICLES}


def table(record: dict[str, Any]) -> str:
    """Return the table of each layer's KL and of −log p(x), by ladder and seed."""
    results = record["results"]
    rows, idle = [], dict.fromkeys(WAYS, 0)
    for name, row in results["ladders"].items():
        for i, seed in enumerate(results["seeds"]):
            divergences = row["divergences"][i]
            idle[name.split(", ")[1]] += sum(value <= LEAST for value in divergences)
            value = with_error(row["negative_log_likelihood"][i], row["standard_error"][i])
            shown = ", ".join(f"{value:.2f}" for value in divergences)
            rows.append([name, str(seed), shown, value, f"{row['seconds'][i]:.0f}"])
    values = {name: statistics.mean(row["negative_log_likelihood"]) for name, row in results["ladders"].items()}
    best = min((name for name in values if name.startswith("5")), key=values.__getitem__)
    carried = "; ".join(
        f"{way}: {count or 'no'} layer{'' if count == 1 else 's'} at {LEAST} nats or less"
        for way, count in idle.items()
    )
    header = ["ladder", "seed", "KL of z1, z2, … (nats)", "−log p(x)", "training, s"]
    return (
        f"{markdown_table(header, rows)}\n\n"
        f"{carried}. The warm-up takes the first half of {results['epochs']} epochs; free bits are {FREE_BITS} nats a "
        f"layer. −log p(x) with K = {results['particles']}, and the KL, on {results['data']} test digits after a "
        f"seeded shuffle, ± standard error over data. Published for five layers is {PUBLISHED}, dynamically binarised "
        f"MNIST, after far longer training with batch normalisation; {best}, is {values[best] - PUBLISHED:+.2f} nats "
        f"from it, on the static one. {provenance(record)}"
    )


def make_pair(
    sizes: tuple[int, ...], hidden: tuple[int, ...], x_shape: tuple[int, ...], *, batch_norm: bool
) -> pv.Pair:
    norm: Any = {"batch_norm": batch_norm}
    first = MLP([x_shape], hidden[0], (hidden[0],), **norm)
    bottom_up = [
        nn.Sequential(net, nn.SiLU()) for net in (first, *(MLP([(a,)], b, (b,), **norm) for a, b in pairwise(hidden)))
    ]
    decoder = MLP([(sizes[0],)], 784, (256, 256), **norm)
    networks: Any = {"bottom_up": bottom_up, "decoder": decoder}
    return pv.models.LadderVAE(x_shape, sizes, pv.Bernoulli(), hidden=hidden, **norm, **networks)
