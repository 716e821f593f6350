"""VampPrior, RealNVP prior and N(0, I) on the static MNIST, in the gated networks of Tomczak and Welling (2018)."""

from __future__ import annotations

import time
from typing import Any

import torch
from render import provenance

import pyro_vae as pv
from pyro_vae.models.flow_vae import prior_layers
from pyro_vae.models.vamp_prior_vae import starting_pseudo_inputs
from pyro_vae.networks import GatedMLP
from pyro_vae.report import markdown_table

TITLE = "VampPrior, static MNIST, gated 784–300–300–40, 500 pseudo-inputs"
EPOCHS = 5
WARMUP = 2
SEEDS = (0, 1)
LATENT = 40
PSEUDO_INPUTS = 500
DATA, PARTICLES = 200, 200
# −log p(x) in nats: Tomczak and Welling (2018), and a rerun by the pythae library.
PUBLISHED, RERUN, PUBLISHED_EPOCHS = 85.57, 85.79, 2000


def run(scale: float, data_root: str | None) -> dict[str, Any]:
    """Train each prior with each seed and return test −log p(x) by importance sampling."""
    data = pv.data.load("static-mnist", data_root)
    epochs = max(1, round(scale * EPOCHS))
    x = pv.data.subset_after_shuffle(data.test, DATA)
    rows: dict[str, Any] = {}
    for name in ("N(0, I)", "RealNVP", "VampPrior"):
        rows[name] = {"negative_log_likelihood": [], "standard_error": [], "seconds": []}
        for seed in SEEDS:
            torch.manual_seed(seed)
            pair, start = _pair(name, data), time.perf_counter()
            warmup = min(WARMUP, epochs)
            pv.fit(pair, data.train, epochs=epochs, batch_size=100, warmup=warmup, seed=seed, progress=False)
            rows[name]["seconds"].append(round(time.perf_counter() - start, 1))
            ll = pv.log_likelihood(pair, x, num_particles=PARTICLES, seed=seed)
            rows[name]["negative_log_likelihood"].append(-ll.mean)
            rows[name]["standard_error"].append(ll.mean_standard_error)
    return {"priors": rows, "epochs": epochs, "seeds": list(SEEDS), "data": DATA, "particles": PARTICLES}


def table(record: dict[str, Any]) -> str:
    """Return the table of test −log p(x) by prior and seed, and the distance from the published figure."""
    results = record["results"]
    header = ["prior", *(f"seed {seed}" for seed in results["seeds"]), "mean", "training, s"]
    rows = []
    for name, row in results["priors"].items():
        values = row["negative_log_likelihood"]
        cells = [f"{v:.2f} ± {e:.2f}" for v, e in zip(values, row["standard_error"], strict=True)]
        rows.append([name, *cells, f"{sum(values) / len(values):.2f}", f"{sum(row['seconds']):.0f}"])
    values = results["priors"]["VampPrior"]["negative_log_likelihood"]
    distance = sum(values) / len(values) - PUBLISHED
    return (
        f"{markdown_table(header, rows)}\n\n"
        f"−log p(x) in nats, K = {results['particles']}, on {results['data']} test digits after a seeded shuffle, ± "
        f"standard error over data. Published for the VampPrior is {PUBLISHED} (a rerun by pythae: {RERUN}), with "
        f"K = 5000 on all test digits after up to {PUBLISHED_EPOCHS} epochs; {results['epochs']} epochs here leave "
        f"{distance:+.2f} nats. {provenance(record)}"
    )


def _pair(name: str, data: pv.data.DataSet) -> pv.Pair:
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
