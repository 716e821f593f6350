"""VampPrior, RealNVP prior and N(0, I) on the static MNIST, in the gated networks of Tomczak and Welling (2018)."""

from __future__ import annotations

from typing import Any

import torch

import pyro_vae as pv
from benchmarks.harness.common import evaluated, lowered, trained
from benchmarks.harness.tables import provenance, spread, with_error
from pyro_vae.cli.recipes.flow_vae import prior_layers
from pyro_vae.models.vamp_prior_vae import starting_pseudo_inputs
from pyro_vae.networks.mlp import GatedMLP
from pyro_vae.report.markdown import markdown_table

TITLE = "VampPrior, static MNIST, gated 784–300–300–40, 500 pseudo-inputs"
EPOCHS = 50
# The published warm-up takes 100 epochs.
WARMUP, LR = 10, 5e-4
# The rate falls to a third after each of these shares of the epochs.
MILESTONES = (0.7, 0.9)
SEEDS = (0,)
LATENT = 40
PSEUDO_INPUTS = 500
# −log p(x) in nats: Tomczak and Welling (2018), and a rerun by the pythae library.
PUBLISHED, RERUN, PUBLISHED_EPOCHS = 85.57, 85.79, 2000


def run(scale: float, data_root: str | None) -> dict[str, Any]:
    """Train each prior with each seed and return test log p(x) by importance sampling."""
    data = pv.data.load("static-mnist", data_root)
    epochs = max(1, round(scale * EPOCHS))
    priors = {name: [_one(name, data, seed, epochs) for seed in SEEDS] for name in ("N(0, I)", "RealNVP", "VampPrior")}
    return {"priors": priors, "epochs": epochs, "seeds": list(SEEDS)}


def _one(prior: str, data: pv.data.DataSet, seed: int, epochs: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    pair, name = make_pair(prior, data), f"vamp_prior/{prior.split('(')[0].lower()}-{epochs}-{seed}"
    # With as much patience as there are epochs none is left out, and the best by validation is kept.
    settings: dict[str, Any] = {"epochs": epochs, "batch_size": 100, "lr": LR, "seed": seed, "patience": epochs}
    settings |= {"warmup": min(WARMUP, epochs), "scheduler": lowered(epochs, MILESTONES, 1 / 3)}
    seconds, negative_elbo = trained(pair, data, name, **settings)
    return {"seconds": seconds, "negative_elbo": negative_elbo, **evaluated(pair, data, name, some=100)}


def table(record: dict[str, Any]) -> str:
    """Return the table of test −log p(x) by prior and seed, and the distance from the published figure."""
    results = record["results"]
    header = ["prior", "seed", "validation −ELBO, nats", "−log p(x), K = 200, all test data", "−log p(x), K = 5000"]
    header += ["share with k̂ above the threshold", "training, s"]
    rows = [
        [
            *(name, str(seed), f"{row['negative_elbo']:.2f}"),
            *(with_error(-row[key]["mean"], row[key]["standard_error"]) for key in ("all", "some")),
            *(f"{100 * row['some']['share_above_threshold']:.0f} %", f"{row['seconds']:.0f}"),
        ]
        for name, by_seed in results["priors"].items()
        for seed, row in zip(results["seeds"], by_seed, strict=True)
    ]
    values = {name: [-row["all"]["mean"] for row in by_seed] for name, by_seed in results["priors"].items()}
    mean = sum(values["VampPrior"]) / len(values["VampPrior"])
    some = results["priors"]["VampPrior"][0]["some"]
    return (
        f"{markdown_table(header, rows)}\n\n"
        f"Nats per datum, ± standard error over data; K = 5000 on {some['data']} test digits after a seeded shuffle. "
        f"By seeds, K = 200: {'; '.join(f'{name} {spread(each)}' for name, each in values.items())}. "
        f"Published for the VampPrior is {PUBLISHED} (a rerun by pythae: {RERUN}), with K = 5000 on all test digits "
        f"after up to {PUBLISHED_EPOCHS} epochs; at most {results['epochs']} epochs here, the best by validation, with "
        f"a warm-up of {WARMUP} in place of 100, leave {mean - PUBLISHED:+.2f} nats. {provenance(record)}"
    )


def make_pair(name: str, data: pv.data.DataSet) -> pv.Pair:
    networks: dict[str, Any] = {
        "encoder": GatedMLP([data.x_shape], 2 * LATENT),
        "decoder": GatedMLP([(LATENT,)], 784),
    }
    if name == "VampPrior":
        start = starting_pseudo_inputs(data.train, PSEUDO_INPUTS)
        return pv.models.VampPriorVAE(start, LATENT, pv.Bernoulli(), **networks)
    if name == "RealNVP":
        prior = pv.FlowPrior(LATENT, prior_layers("coupling", 4, LATENT, hidden=100))
        return pv.models.FlowVAE(data.x_shape, prior, pv.FlowPosterior([]), pv.Bernoulli(), **networks)
    return pv.models.VAE(data.x_shape, pv.StandardNormal(LATENT), pv.Bernoulli(), **networks)
