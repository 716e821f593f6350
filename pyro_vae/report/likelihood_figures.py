"""Figures of a log-likelihood."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from pyro_vae.likelihood.estimate import LogLikelihood
from pyro_vae.report.figures import Figure

__all__ = ["LIKELIHOOD_FIGURES", "likelihood_curve", "likelihood_histogram", "pareto_k"]


def likelihood_curve(ll: LogLikelihood) -> Figure | None:
    """Draw L_K, the mean over data, against K, with its Monte Carlo error."""
    rows = torch.tensor([[float(value) for value in row] for row in ll.record()["curve"]], dtype=torch.float64)
    # The first bounds are −∞ if single weights may be zero.
    particles, means, errors = rows[rows[:, 1].isfinite()].nan_to_num(0.0).mT.numpy()
    figure = Figure(figsize=(5.2, 3.4), layout="constrained")
    ax = figure.subplots()
    ax.errorbar(particles, means, yerr=errors, marker="o", markersize=4, capsize=3, label="L_K ± Monte Carlo error")
    ax.axhline(ll.mean, linestyle="--", color="gray", label=f"all {ll.num_particles} draws: {ll.mean:.3f}")
    ax.set_xscale("log", base=2)
    ax.set_xticks(particles, [f"{int(k)}" for k in particles], fontsize=8)
    ax.set_xlabel("particles per datum, K")
    ax.set_ylabel(f"{ll.quantity}, mean over data (nats)", fontsize=9)
    ax.legend(fontsize=8, loc="lower right")
    ax.grid(alpha=0.3)
    return figure


def pareto_k(ll: LogLikelihood) -> Figure | None:
    """Draw the k̂ of each datum in ascending order; None if no k̂ is finite."""
    ordered = ll.pareto_k.sort().values
    rank, finite = torch.arange(len(ordered)) + 1, ordered.isfinite()
    if not finite.any():
        return None
    figure = Figure(figsize=(5.2, 3.4), layout="constrained")
    ax = figure.subplots()
    low, high = finite & (ordered <= ll.threshold), finite & (ordered > ll.threshold)
    for which, colour, side in ((low, "tab:blue", "up to"), (high, "tab:red", "above")):
        label = f"{int(which.sum())} data {side} it"
        ax.plot(rank[which].numpy(), ordered[which].numpy(), ".", markersize=4, color=colour, label=label)
    ax.axhline(ll.threshold, linestyle="--", color="gray", label=f"threshold {ll.threshold:.2f}")
    # Infinite values lie on the edges of the frame; the legend explains them.
    bottom, top = ax.get_ylim()
    for value, edge, marker, reason in (
        (-math.inf, bottom, "v", "equal weights"),
        (math.inf, top, "^", "too many ties"),
    ):
        if (which := ordered == value).any():
            at, label = torch.full((int(which.sum()),), edge), f"{int(which.sum())} data at {value:+} ({reason})"
            ax.plot(
                rank[which].numpy(), at.numpy(), marker, markersize=5, color="tab:orange", clip_on=False, label=label
            )
    ax.set_ylim(bottom, top)
    ax.set_xlabel("data, by k̂")
    ax.set_ylabel(f"Pareto k̂ of {ll.num_particles} weights")
    ax.legend(fontsize=8, loc="upper left")
    ax.grid(alpha=0.3)
    return figure


def likelihood_histogram(ll: LogLikelihood) -> Figure | None:
    """Draw the histogram of the estimate over data."""
    figure = Figure(figsize=(5.2, 3.4), layout="constrained")
    ax = figure.subplots()
    # Rice's rule: twice the cube root of the number of data.
    bins = max(5, min(60, round(2 * len(ll.per_datum) ** (1 / 3))))
    ax.hist(ll.per_datum.numpy(), bins=bins, color="tab:blue", alpha=0.7)
    ax.axvline(ll.mean, linestyle="--", color="black", label=f"mean {ll.mean:.2f} ± {ll.mean_standard_error:.2f}")
    ax.set_xlabel(f"{ll.quantity} (nats)")
    ax.set_ylabel(f"data, of {len(ll.per_datum)}")
    ax.legend(fontsize=8)
    ax.grid(alpha=0.3)
    return figure


LIKELIHOOD_FIGURES: dict[str, Callable[[LogLikelihood], Figure | None]] = {
    "likelihood_curve": likelihood_curve,
    "pareto_k": pareto_k,
    "likelihood_histogram": likelihood_histogram,
}
