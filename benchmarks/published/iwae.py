"""The one-layer importance-weighted auto-encoder on the statically binarised MNIST."""

from __future__ import annotations

from typing import Any

import torch

import pyro_vae as pv
from benchmarks.harness.common import evaluated, trained
from benchmarks.harness.tables import provenance
from pyro_vae.networks.mlp import MLP
from pyro_vae.report.markdown import markdown_table

TITLE = "IWAE, static MNIST, 784–200–200–50"
# Stage i of the published eight lasts 3^(i − 1) epochs at a rate of 1e-3 · 10^(−(i − 1) / 7). The fourth, of 27, is cut
# short.
STAGES, PUBLISHED_EPOCHS = (1, 3, 9, 9), 3280
PUBLISHED = {1: 88.71, 5: 87.63, 50: 87.10}


def run(scale: float, data_root: str | None) -> dict[str, Any]:
    """Train with k = 1, 5 and 50 over the first stages, ``scale`` of each, and evaluate."""
    data = pv.data.load("static-mnist", data_root)
    stages = [max(1, round(scale * epochs)) for epochs in STAGES]
    return {"stages": stages, "k": {str(k): _one(data, k, stages) for k in PUBLISHED}}


def _one(data: pv.data.DataSet, k: int, stages: list[int]) -> dict[str, Any]:
    torch.manual_seed(0)
    pair = pv.models.VAE(
        data.x_shape,
        pv.StandardNormal(50),
        pv.Bernoulli(),
        encoder=MLP([data.x_shape], 100, (200, 200), torch.tanh),
        decoder=MLP([(50,)], 784, (200, 200), torch.tanh),
    )
    initialise(pair, data.train.mean(0).flatten())
    seconds, negative_elbo = 0.0, 0.0
    name = f"iwae/{k}-{sum(stages)}"
    for stage, epochs in enumerate(stages):
        took, negative_elbo = trained(
            pair,
            data,
            f"{name}/{stage}",
            epochs=epochs,
            batch_size=20,
            # With one draw the bound is the ELBO.
            loss=pv.objectives.iwae if k > 1 else pv.objectives.elbo,
            num_particles=k,
            optimizer=_Adam(10 ** (-3 - stage / 7)),
            seed=stage,
        )
        seconds += took
    return {"seconds": seconds, "negative_elbo": negative_elbo, **evaluated(pair, data, f"{name}/{len(stages) - 1}")}


def initialise(pair: pv.models.VAE, mean: torch.Tensor) -> None:
    """Begin as published: weights by Glorot and Bengio (2010), biases at zero, the output's at the data's mean."""
    for layer in (module for module in pair.modules() if isinstance(module, torch.nn.Linear)):
        torch.nn.init.xavier_uniform_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    with torch.no_grad():
        # A pixel that is always black would have an infinite logit.
        pair.p_x.network.layers[-1].bias.copy_(mean.clamp(1e-3, 1 - 1e-3).logit())


class _Adam:
    """Make the published optimiser."""

    def __init__(self, lr: float) -> None:
        self.lr = lr

    def __call__(self, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, lr=self.lr, betas=(0.99, 0.999), eps=1e-4, fused=True)


def table(record: dict[str, Any]) -> str:
    """Return the results as Markdown, with the published figures and the distance from them."""
    results = record["results"]
    header = [
        *("k", "validation −ELBO, nats", "−log p(x), K = 200, all test data", "−log p(x), K = 5000"),
        *("published", "difference", "share with k̂ above the threshold", "training, s"),
    ]
    rows = []
    for k, row in results["k"].items():
        published = PUBLISHED[int(k)]
        rows.append(
            [
                k,
                f"{row['negative_elbo']:.2f}",
                f"{-row['all']['mean']:.2f} ± {row['all']['standard_error']:.2f}",
                f"{-row['some']['mean']:.2f} ± {row['some']['standard_error']:.2f}",
                f"{published:.2f}",
                f"{-row['some']['mean'] - published:+.2f}",
                f"{100 * row['some']['share_above_threshold']:.0f} %",
                f"{row['seconds']:.0f}",
            ]
        )
    some = next(iter(results["k"].values()))["some"]
    return (
        f"{markdown_table(header, rows)}\n\n"
        f"{' + '.join(map(str, results['stages']))} epochs at the rates of the published first "
        f"{len(results['stages'])} of eight stages (published: 1 + 3 + 9 + 27 + …, {PUBLISHED_EPOCHS}), batch 20, "
        f"Adam begun anew at each stage; k = 1 is the VAE. K = 5000 on "
        f"{some['data']} test digits after a seeded shuffle (± standard error over data), the same for every k. "
        f"One seed. {provenance(record)}"
    )
