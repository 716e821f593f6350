"""Count how often 95 % intervals from pv.log_likelihood contain the log p(x) that is known, as the guide narrows.

    python -m benchmarks.accuracy.coverage

Probabilistic PCA with one latent; the guide is the posterior with its scale off by a factor r. The tail of its weights
has the shape k = 1 − r² for r < 1: their variance is finite for r² > 1/2. For r > 1 they are bounded, and end like a
square root: k = −2.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
import tyro
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor

import pyro_vae as pv
from benchmarks.harness.common import ROOT, save
from pyro_vae.report.figures import save_figure

# The standard normal's 97.5 % point.
QUANTILE = 1.959964
# Data whose estimates are repeated a thousand times, to compare their standard errors with their spread.
WATCHED = 10
FIGURE = ROOT / "docs" / "coverage.png"


@dataclass(frozen=True)
class Options:
    """Estimate log p(x) many times by guides of several widths."""

    scales: tuple[float, ...] = (1.1, 0.9, 0.8, 0.7, 0.6)
    """The guide's scale over the posterior's, r."""
    data: int = 500
    """Number of data."""
    repeats: int = 20
    """Estimates for each datum."""
    num_particles: int = 1000
    """K."""
    seed: int = 0
    """Of model, data and draws."""


class OffGuide(pv.models.LinearGaussianVAE):
    """Probabilistic PCA with one latent and a guide whose scale is r times the posterior's."""

    def __init__(self, ratio: float) -> None:
        super().__init__(3, 1)
        self.ratio = ratio

    def guide(self, x: Tensor) -> None:
        exact = self.exact_posterior(x)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(exact.mean, self.ratio * exact.stddev).to_event(1))


def main(options: Options) -> None:
    """Estimate, print a table, draw, and save the figures."""
    torch.set_default_dtype(torch.float64)
    started = time.perf_counter()
    rows = [measure(ratio, options) for ratio in options.scales]
    results = {
        "rows": rows,
        "data": options.data,
        "repeats": options.repeats,
        "spread_repeats": 1000,
        "spread_data": WATCHED,
        "num_particles": options.num_particles,
        "dtype": "float64",
        "seed": options.seed,
    }
    path = save("coverage", results, started)
    save_figure(drawn(rows), FIGURE)
    show(rows)
    print(f"saved in {path}, drawn in {FIGURE}")


def measure(ratio: float, options: Options) -> dict[str, float]:
    """Return coverage, tail and the ratio of standard error to spread for one width of the guide."""
    torch.manual_seed(options.seed)
    pair = OffGuide(ratio)
    x = pv.generate(pair, options.data, seed=options.seed).x
    truth = pair.exact_log_likelihood(x).detach()
    hits, tails = [], []
    for repeat in range(options.repeats):
        ll = pv.log_likelihood(
            pair, x, num_particles=options.num_particles, seed=options.seed + repeat, proposal="guide"
        )
        hits.append(((ll.per_datum - truth).abs() <= QUANTILE * ll.standard_error).double())
        tails.append(ll.pareto_k)
    covered, tail = torch.stack(hits), torch.stack(tails)
    same = [
        pv.log_likelihood(
            pair, datum.expand(1000, -1), num_particles=options.num_particles, seed=options.seed + i, proposal="guide"
        )
        for i, datum in enumerate(x[:WATCHED].split(1))
    ]
    ratios = torch.stack([ll.standard_error.pow(2).mean().sqrt() / ll.per_datum.std() for ll in same])
    return {
        "scale": ratio,
        "coverage": float(covered.mean()),
        # Draws are independent, and the law of the weights over p(x) is the same for every datum of this pair.
        "coverage_standard_error": float(covered.std() / covered.numel() ** 0.5),
        "pareto_k": float(tail.mean()),
        "exact_k": 1 - ratio**2 if ratio < 1 else -2.0,
        "share_above_threshold": float((tail > ll.threshold).double().mean()),
        "error_over_spread": float(ratios.mean()),
        "error_over_spread_standard_error": float(ratios.std() / WATCHED**0.5),
    }


def drawn(rows: list[dict[str, float]]) -> Figure:
    """Draw coverage and k̂ over the guide's width."""
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    scales = [row["scale"] for row in rows]
    left.axhline(0.95, color="k", lw=0.8, ls=":")
    errors = [2 * row["coverage_standard_error"] for row in rows]
    left.errorbar(scales, [row["coverage"] for row in rows], yerr=errors, fmt="o-", capsize=3)
    left.set(ylabel="coverage of the 95 % interval")
    right.plot(scales, [row["pareto_k"] for row in rows], "o", label="mean k̂")
    right.plot(scales, [row["exact_k"] for row in rows], "kx", ms=9, label="exact: 1 − r², or −2 for r > 1")
    right.set(ylabel="shape of the weights' tail")
    right.legend()
    for ax in (left, right):
        ax.set_xlabel("guide's scale / posterior's, r")
        ax.grid(alpha=0.3)
    return figure


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table."""
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*(f"{value:.4f}" for value in row.values()))
    Console().print(table)


if __name__ == "__main__":
    main(tyro.cli(Options))
