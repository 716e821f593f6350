"""Figures of a log-likelihood."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from pyro_vae.likelihood.estimate import LogLikelihood
from pyro_vae.report.figures import Figure

__all__ = [
    "LIKELIHOOD_FIGURES",
    "error_against_draws",
    "guide_against_settled",
    "likelihood_curve",
    "likelihood_histogram",
    "pareto_k",
]

# Bounds that lack so many times as much as L_8 are left out of the curve.
FAR = 20.0
# Colours of the kinds of proposal, safe for the colour-blind (Okabe and Ito).
COLOURS = {"guide": "#0072B2", "prior": "#999999", "own": "#CC79A7", "fitted": "#009E73", "annealed": "#E69F00"}


def likelihood_curve(ll: LogLikelihood, guide: LogLikelihood | None = None) -> Figure | None:
    """Draw L_K, the mean over data, against K, with its Monte Carlo error."""
    rows = torch.tensor([[float(value) for value in row] for row in ll.record()["curve"]], dtype=torch.float64)
    # The first bounds are −∞ if single weights may be zero.
    rows = rows[rows[:, 1].isfinite()].nan_to_num(0.0)
    # A mixture's few draws may all be of its wide parts: their bounds would squeeze the others.
    far = rows[-1, 1] - rows[:, 1] > FAR * (rows[-1, 1] - rows[min(3, len(rows) - 1), 1]).clamp(min=0.1)
    particles, means, errors = rows[~far].mT.numpy()
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


def pareto_k(ll: LogLikelihood, guide: LogLikelihood | None = None) -> Figure | None:
    """Draw the k̂ of each datum in ascending order, by its proposal; None if no k̂ is finite."""
    ordered, order = ll.pareto_k.sort(stable=True)
    rank, finite = torch.arange(len(ordered)) + 1, ordered.isfinite()
    if not finite.any():
        return None
    figure = Figure(figsize=(5.2, 3.4), layout="constrained")
    ax = figure.subplots()
    kinds, settled = [ll.proposals[i] for i in order.tolist()], ll.settled[order]
    for kind in dict.fromkeys(kinds):
        of_kind = finite & torch.tensor([other == kind for other in kinds])
        for which, marker, word in ((of_kind & settled, ".", "settled"), (of_kind & ~settled, "x", "not settled")):
            if not which.any():
                continue
            label = f"{kind}, {word}: {int(which.sum())} data"
            ax.plot(rank[which].numpy(), ordered[which].numpy(), marker, ms=4, color=COLOURS[kind], label=label)
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


def guide_against_settled(ll: LogLikelihood, guide: LogLikelihood | None = None) -> Figure | None:
    """Draw the guide's estimate less this one, by datum, against this one; None without a guide's."""
    if guide is None:
        return None
    figure = Figure(figsize=(5.2, 3.4), layout="constrained")
    ax = figure.subplots()
    difference = guide.per_datum - ll.per_datum
    for which, marker, word in ((ll.settled, ".", "settled"), (~ll.settled, "x", "not settled")):
        if which.any():
            x, y = ll.per_datum[which].numpy(), difference[which].numpy()
            ax.plot(x, y, marker, ms=4, color=COLOURS["fitted" if marker == "." else "annealed"], label=word)
    mean = float(difference.mean())
    ax.axhline(0, color="black", linewidth=0.8)
    ax.axhline(mean, linestyle="--", color=COLOURS["guide"], label=f"mean {mean:.2f} nats")
    ax.set_xlabel(f"{ll.quantity}, estimated by {' and '.join(dict.fromkeys(ll.proposals))} (nats)", fontsize=9)
    ax.set_ylabel(f"{guide.num_particles} draws of the guide, less that (nats)", fontsize=9)
    ax.legend(fontsize=8)
    ax.grid(alpha=0.3)
    return figure


def error_against_draws(ll: LogLikelihood, guide: LogLikelihood | None = None) -> Figure | None:
    """Draw the error that K draws a datum give the mean, here and from the guide alone; None without a guide's."""
    if guide is None:
        return None
    figure = Figure(figsize=(5.2, 3.4), layout="constrained")
    ax = figure.subplots()
    for each, colour, label in ((guide, COLOURS["guide"], "guide alone"), (ll, COLOURS["fitted"], "chosen proposals")):
        errors = each.curve_standard_error.square().sum(1).sqrt() / len(each.per_datum)
        # The curve's entries are means over groups of K draws: one group's error is larger.
        errors = errors * (each.num_particles / torch.tensor(each.curve_particles)).floor().sqrt()
        ax.plot(each.curve_particles, errors.numpy(), "o-", ms=4, color=colour, label=label)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xticks(ll.curve_particles, [f"{k}" for k in ll.curve_particles], fontsize=8)
    ax.set_xlabel("particles per datum, K")
    ax.set_ylabel("Monte Carlo error of the data's mean (nats)", fontsize=9)
    ax.legend(fontsize=8)
    ax.grid(alpha=0.3)
    return figure


def likelihood_histogram(ll: LogLikelihood, guide: LogLikelihood | None = None) -> Figure | None:
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


LIKELIHOOD_FIGURES: dict[str, Callable[[LogLikelihood, LogLikelihood | None], Figure | None]] = {
    "likelihood_curve": likelihood_curve,
    "pareto_k": pareto_k,
    "guide_against_settled": guide_against_settled,
    "error_against_draws": error_against_draws,
    "likelihood_histogram": likelihood_histogram,
}
