"""Measure the gain of a flow in the guide over the same VAE without one, per flow and depth, on static MNIST."""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import ConditionalTransformModule

import pyro_vae as pv
from benchmarks.harness.common import negative_elbo, trained
from benchmarks.harness.tables import provenance, spread
from pyro_vae.cli.recipes.flow_vae import posterior_layers
from pyro_vae.networks.mlp import MLP
from pyro_vae.report.markdown import markdown_table

TITLE = "Flows in the guide, static MNIST, 784–200–20"
EPOCHS = 5
SEEDS = (0, 1, 2)
LATENT, CONTEXT, HIDDEN = 20, 32, 200
DATA, PARTICLES = 1000, 200
# Each gets a depth; "none" is the plain VAE.
ROWS = (
    ("none", 0),
    ("householder", 4),
    ("planar", 1),
    ("planar", 4),
    ("planar", 8),
    ("sylvester", 4),
    ("autoregressive", 2),
    ("autoregressive", 4),
    ("coupling", 4),
)


def run(scale: float, data_root: str | None) -> dict[str, Any]:
    """Train each flow with each seed and return test −ELBO and log p(x)."""
    data = pv.data.load("static-mnist", data_root)
    epochs = max(1, round(scale * EPOCHS))
    x = pv.data.subset_after_shuffle(data.test, DATA)
    rows = []
    for flow, length in ROWS:
        bounds, likelihoods, seconds = [], [], 0.0
        for seed in SEEDS:
            torch.manual_seed(seed)
            pair = make_pair(flow, length, data.x_shape)
            name = f"flows/{flow}-{length}-{epochs}-{seed}"
            seconds += trained(pair, data, name, epochs=epochs, batch_size=100, seed=seed)[0]
            bounds.append(negative_elbo(pair, data.test))
            ll = pv.log_likelihood(pair, x, num_particles=PARTICLES, seed=seed, proposal="guide")
            likelihoods.append(ll.mean)
        row = {"flow": flow, "length": length, "negative_elbo": bounds, "log_likelihood": likelihoods}
        rows.append({**row, "seconds": seconds / len(SEEDS)})
    return {"rows": rows, "epochs": epochs, "seeds": list(SEEDS), "data": DATA, "particles": PARTICLES}


def table(record: dict[str, Any]) -> str:
    """Return the table of bounds and gains by flow and depth."""
    results = record["results"]
    plain = results["rows"][0]
    header = ["flow", "layers", "test −ELBO", "gain", "log p(x)", "gain", "training, s"]
    rows = []
    for row in results["rows"]:
        bound, likelihood = row["negative_elbo"], row["log_likelihood"]
        gains = [a - b for a, b in zip(plain["negative_elbo"], bound, strict=True)]
        better = [b - a for a, b in zip(plain["log_likelihood"], likelihood, strict=True)]
        cells = [spread(bound), spread(gains, sign="+"), spread(likelihood), spread(better, sign="+")]
        if row is plain:
            cells[1] = cells[3] = "–"
        rows.append([row["flow"], str(row["length"]), *cells, f"{row['seconds']:.0f}"])
    return (
        f"{markdown_table(header, rows)}\n\n"
        f"Nats per datum, mean ± standard deviation over {len(results['seeds'])} seeds, each gain over the plain VAE "
        f"of its seed; −ELBO on all test digits, log p(x) with K = {results['particles']} on {results['data']} of them "
        f"after a seeded shuffle. No published figure was made with these networks and {results['epochs']} epochs: the "
        f"comparison is with the first row alone. {provenance(record)}"
    )


def make_pair(flow: Any, length: int, x_shape: tuple[int, ...]) -> pv.Pair:
    layers = posterior_layers(flow, length, LATENT, CONTEXT) if length else []
    seen = any(isinstance(layer, ConditionalTransformModule) for layer in layers)
    posterior = pv.FlowPosterior(layers, CONTEXT if seen else 0)
    encoder = MLP([x_shape], posterior.num_outputs((LATENT,)), (HIDDEN, HIDDEN))
    decoder = MLP([(LATENT,)], 784, (HIDDEN, HIDDEN))
    prior = pv.StandardNormal(LATENT)
    return pv.models.FlowVAE(x_shape, prior, posterior, pv.Bernoulli(), encoder=encoder, decoder=decoder)
