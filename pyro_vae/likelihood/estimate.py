"""The result of a log-likelihood estimate, and its table for a terminal and a report."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any, NamedTuple

import torch
from rich.cells import cell_len
from torch import Tensor

from pyro_vae.likelihood.psis import trust_threshold
from pyro_vae.likelihood.weights import SOURCES

__all__ = ["LogLikelihood", "likelihood_notes", "likelihood_rows", "likelihood_table"]

# The table names this many of the worst data.
NAMED = 5
# It lists as many data that are not settled.
LISTED = 20
# With so few effective draws the delta method's error is of the order of the estimate's bias.
FEW_EFFECTIVE = 10
# Share of data with k̂ above 1/2 from which errors are called too small.
SMALL_ERRORS = 0.2


class LogLikelihood(NamedTuple):
    """Estimated log-likelihood per datum, in nats.

    Check ``pareto_k`` first: above ``threshold`` neither the estimate nor its error can be trusted.

    Args:
        per_datum: L_K = log (1/K) Σ_k w_k, in expectation at most ``quantity``, (B,).
        standard_error: Monte Carlo error of ``per_datum`` by the delta method, (B,); NaN for K = 1.
        ess: effective sample size (Σ w)² / Σ w², (B,).
        num_particles: K.
        quantity: name of the estimated quantity. It is "log p(x)"; "lower bound on log p(x)" if the guide fixes a
            discrete site to a point mass; a joint density, e.g. "log p(x, y)", if it fixes a continuous one, or if the
            model observes another site.
        discrete: whether every observed site is a probability mass.
        num_dimensions: D, entries of one datum.
        pareto_k: shape k̂ of the weights' tail, (B,); −∞ for weights that are equal up to rounding, NaN for K < 25. At
            least that of a pilot which knew of modes that the datum's proposal lacks.
        smoothed: L_K with a Pareto-smoothed tail, (B,).
        curve: L_1, L_2, L_4, … up to the largest power of two within K, (J, B). Each is a mean over disjoint groups of
            the same draws; later entries have fewer groups. A datum of fewer draws repeats its last entry.
        curve_standard_error: Monte Carlo errors of ``curve`` from the spread of the groups, (J, B); the last one is
            by the delta method.
        num_scored: entries of each datum that the likelihood's mask leaves scored, (B,); None without a mask.
        beside: a clause on the sites that ``quantity`` concerns beside x; empty for log p(x) or a bound on it.
        draws: number of draws of each datum, (B,): K, or fewer by ``tolerance`` and for annealed data; None for K.
        source: number in ``SOURCES`` of the proposal that each datum's draws come from, (B,); None for the guide.
        tolerance: error per datum in nats that was asked for; None without one.
        unfit: why no proposal could be fitted where one was asked for; empty if one could.
    """

    per_datum: Tensor
    standard_error: Tensor
    ess: Tensor
    num_particles: int
    quantity: str
    discrete: bool
    num_dimensions: int
    pareto_k: Tensor
    smoothed: Tensor
    curve: Tensor
    curve_standard_error: Tensor
    num_scored: Tensor | None = None
    beside: str = ""
    draws: Tensor | None = None
    source: Tensor | None = None
    tolerance: float | None = None
    unfit: str = ""

    @property
    def mean(self) -> float:
        """The data's mean log-likelihood."""
        return float(self.per_datum.mean())

    @property
    def mean_standard_error(self) -> float:
        """Standard error of the mean over the data's population, Monte Carlo error included; NaN for one datum."""
        if len(self.per_datum) < 2:
            return math.nan
        return float(self.per_datum.std() / math.sqrt(len(self.per_datum)))

    @property
    def mean_monte_carlo_error(self) -> float:
        """Monte Carlo error of the mean, the part that more particles would remove.

        Equal data have equal draws, and so the same error, which adds up among them.
        """
        drawn = torch.stack([self.per_datum, self.standard_error])
        _, group = torch.unique(drawn, dim=1, return_inverse=True)
        sums = torch.zeros_like(self.standard_error).index_add_(0, group, self.standard_error)
        return float(sums.square().sum().sqrt() / len(self.per_datum))

    @property
    def threshold(self) -> float:
        """The k̂ up to which an estimate can be trusted, min(1 − 1/log10 K, 0.7); NaN for K < 25."""
        return trust_threshold(self.num_particles)

    @property
    def share_above_threshold(self) -> float:
        """The share of data with k̂ above the threshold; NaN for K < 25."""
        if math.isnan(self.threshold):
            return math.nan
        return float((~self.settled).double().mean())

    @property
    def share_above_half(self) -> float:
        """The share of data with k̂ above 1/2, whose weights have no finite variance by the fit; NaN for K < 25.

        If it is above 20 %, error bars are too small all over the data: those whose draws missed the tail show a small
        k̂ and a small error.
        """
        return math.nan if math.isnan(self.threshold) else float((self.pareto_k > 0.5).double().mean())

    @property
    def settled(self) -> Tensor:
        """True for data with k̂ up to the threshold of their draws, (B,); False for K < 25, whose k̂ is NaN."""
        if self.draws is None:
            return self.pareto_k <= self.threshold
        counts, places = self.draws.unique(return_inverse=True)
        thresholds = torch.tensor([trust_threshold(count) for count in counts.tolist()], dtype=torch.float64)
        return self.pareto_k <= thresholds[places.cpu()].to(self.pareto_k.device)

    @property
    def proposals(self) -> list[str]:
        """The kind of proposal that each datum's draws come from: "guide", "prior", "own", "fitted" or "annealed"."""
        if self.source is None:
            return ["guide"] * len(self.per_datum)
        return [SOURCES[i] for i in self.source.tolist()]

    @property
    def worst(self) -> Tensor:
        """The data by index, (B,), from the largest k̂ to the smallest."""
        return self.pareto_k.argsort(descending=True, stable=True)

    @property
    def has_bits(self) -> bool:
        """Whether bits per dimension have a meaning: a mass on discrete data, of x alone."""
        return self.discrete and not self.beside and self._dimensions > 0

    @property
    def bits_per_dimension(self) -> float:
        """−log p(x) / (D log 2), for a probability mass on discrete data; see ``has_bits``.

        If a mask leaves entries out, D is the mean number of entries that are scored.

        Raises:
            ValueError: for a density, since its value depends on the data's unit, for a joint density, and for data
                without a scored entry.
        """
        if self.beside:
            raise ValueError(f"bits per dimension are of p(x) alone; this is {self.quantity}: {self.beside}")
        if not self.discrete:
            raise ValueError(
                "bits per dimension need a probability mass: use a discretised likelihood on the data's own levels"
            )
        if self._dimensions == 0:
            raise ValueError("bits per dimension are of scored entries, and no entry of the data is scored")
        return -self.mean / (self._dimensions * math.log(2))

    @property
    def _dimensions(self) -> float:
        return self.num_dimensions if self.num_scored is None else float(self.num_scored.double().mean())

    @property
    def curve_particles(self) -> list[int]:
        """The numbers of particles along ``curve``: 1, 2, 4, …."""
        return [1 << j for j in range(len(self.curve))]

    def record(self) -> dict[str, Any]:
        """Return the numbers of a report, fit for JSON.

        A number that is not finite becomes a string: "nan", "inf" or "-inf".
        """
        spread = (self.curve_standard_error**2).sum(1).sqrt() / len(self.per_datum)
        # Equal weights have k̂ = −∞: such a datum is not among the worst.
        worst = [[i, k] for i in self.worst[:NAMED].tolist() if (k := float(self.pareto_k[i])) > -math.inf]
        curve = zip(self.curve_particles, self.curve.mean(1).tolist(), spread.tolist(), strict=True)
        record: dict[str, Any] = {
            "quantity": self.quantity,
            "mean": self.mean,
            "standard_error": self.mean_standard_error,
            "monte_carlo_error": self.mean_monte_carlo_error,
            "data": len(self.per_datum),
            "num_particles": self.num_particles,
            "median_ess": float(self.ess.median()),
            "threshold": self.threshold,
            "share_above_threshold": self.share_above_threshold,
            "share_above_half": self.share_above_half,
            "worst": worst,
            "curve": [list(row) for row in curve],
        }
        if self.has_bits:
            record["bits_per_dimension"] = self.bits_per_dimension
        if self.beside:
            record["beside"] = self.beside
        if self.unfit:
            record["unfit"] = self.unfit
        if not math.isnan(self.threshold):
            settled, kinds = self.settled.tolist(), self.proposals
            counts = Counter(kind for kind, is_settled in zip(kinds, settled, strict=True) if is_settled)
            unsettled = [i for i, is_settled in enumerate(settled) if not is_settled]
            record["settled"] = [[[kind, counts[kind]] for kind in SOURCES if kind in kinds], len(unsettled)]
            record["not_settled"] = unsettled[:LISTED]
        if self.draws is not None and bool((self.draws != self.num_particles).any()):
            record["mean_draws"] = float(self.draws.double().mean())
        if self.tolerance is not None:
            reached = (self.standard_error <= self.tolerance) & self.settled
            record["tolerance"] = [self.tolerance, int(reached.sum())]
        return _fit_for_json(record)

    def __repr__(self) -> str:
        return likelihood_table(self.record())


def _has_small_errors(record: dict[str, Any]) -> bool:
    """Return whether the error bars of a :meth:`LogLikelihood.record` are known to be too small.

    With shapes k near 1/2 the variance of the weights is estimated from draws that lack its tail. On Gaussian guides
    whose weights have k = 0.36, 15 % of the k̂ are above 1/2 and 95 % intervals cover 94 %; with k = 0.51, 45 % of the
    k̂ and 91 %.
    """
    return float(record.get("share_above_half", 0.0)) > SMALL_ERRORS


def likelihood_table(record: dict[str, Any]) -> str:
    """Return the table of a :meth:`LogLikelihood.record` for a terminal."""
    (first, value), *others = likelihood_rows(record)
    width = max(cell_len(label) for label, _ in others)
    lines = [f"  {label}{' ' * (width - cell_len(label))}  {text}" for label, text in others]
    return "\n".join([f"{first} = {value}", *lines])


def likelihood_rows(record: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the table of a :meth:`LogLikelihood.record`: labels, and numbers with their errors."""
    number = _numbers(record)
    mean = f"{number['mean']:.3f} ± {number['standard_error']:.3f} nats (mean over data ± standard error)"
    if record["data"] == 1:
        # One datum has no spread over data.
        mean = f"{number['mean']:.3f} nats (one datum)"
    rows = [
        (record["quantity"], mean),
        ("Monte Carlo part of the error", f"± {number['monte_carlo_error']:.4f} nats"),
    ]
    if "bits_per_dimension" in record:
        rows.append(("bits per dimension", f"{number['bits_per_dimension']:.4f}"))
    rows += [
        ("data", f"{record['data']}"),
        ("particles per datum, K", _draws(record)),
        ("median effective sample size", f"{number['median_ess']:.1f}"),
    ]
    if math.isnan(number["threshold"]):
        rows.append(("Pareto k̂", "needs K ≥ 25"))
    else:
        rows.append((f"data with k̂ above {number['threshold']:.2f}", f"{100 * number['share_above_threshold']:.1f} %"))
        rows.append(("settled", _settled(record)))
        if "unfit" in record:
            rows.append(("no proposal was fitted", record["unfit"]))
        if "tolerance" in record:
            tolerance, reached = record["tolerance"]
            rows.append((f"error at most {tolerance} nats", f"{reached} of {record['data']} data"))
        if _has_small_errors(record):
            rows.append(("error bars", f"too small: k̂ above 0.50 for {100 * number['share_above_half']:.1f} % of data"))
        if "guide" in record:
            rows.append(("from the guide alone", _guide_alone(record)))
        worst = ", ".join(f"{i} ({float(shape):.2f})" for i, shape in record["worst"])
        rows.append(("largest k̂: datum (k̂)", worst or "none, every datum's weights are equal"))
    for particles, mean, error in record["curve"]:
        rows.append((f"L_{particles} ± Monte Carlo error", f"{float(mean):.3f} ± {float(error):.4f} nats"))
    return rows


def _guide_alone(record: dict[str, Any]) -> str:
    """Return what as many draws of the guide say."""
    guide = record["guide"]
    share = f"{100 * float(guide['share_above_threshold']):.1f} % of data not settled"
    below = float(record["mean"]) - float(guide["mean"])
    return f"{float(guide['mean']):.3f} ± {float(guide['monte_carlo_error']):.4f} nats, {below:.3f} lower; {share}"


def _draws(record: dict[str, Any]) -> str:
    """Return K, or how many draws the data had within it."""
    few = f"at most; mean {record['mean_draws']:.0f}" if "mean_draws" in record else ""
    return f"{record['num_particles']} {few}".strip()


def _settled(record: dict[str, Any]) -> str:
    """Return how many data are settled by which proposal, and which are not."""
    counts, others = record["settled"]
    by = ", ".join(f"{kind} {count:,}".replace(",", " ") for kind, count in counts)
    text = f"{record['data'] - others:,} of {record['data']:,} ({by})".replace(",", " ").replace("  ", ", ")
    if others:
        listed = record["not_settled"]
        more = ", …" if others > len(listed) else ""
        text += f"; not settled: {others}, data {', '.join(map(str, listed))}{more}"
    return text


def _way_to_settle(record: dict[str, Any]) -> str:
    """Return what to try first for data that are not settled: fitted proposals, unless they were tried."""
    tried = {kind for kind, _ in record.get("settled", ((), 0))[0]} | ({"fitted"} if "unfit" in record else set())
    raised = "aise the number of particles"
    return f"Draw from fitted proposals (`proposal='auto'`), r{raised}" if tried <= {"guide", "prior"} else f"R{raised}"


def likelihood_notes(record: dict[str, Any]) -> list[str]:
    """Return warnings for the reader of a :meth:`LogLikelihood.record`, in sentences."""
    number, notes = _numbers(record), []
    if number["median_ess"] < FEW_EFFECTIVE < record["num_particles"]:
        notes.append(
            f"Fewer than {FEW_EFFECTIVE} of {record['num_particles']} draws carry the weight of a typical datum. Raise "
            "the number of particles, or train the guide further: the guide misses part of the posterior, and the "
            "estimate is too low by more than its error."
        )
    if number["share_above_threshold"] > 0:
        notes.append(
            f"Pareto k̂ is above {number['threshold']:.2f} for {100 * number['share_above_threshold']:.1f} % of the "
            "data. Do not trust their estimates and errors; both tend to be too small. "
            f"{_way_to_settle(record)}, or anneal these data (`pv.annealed_log_likelihood`)."
        )
    elif _has_small_errors(record):
        notes.append(
            f"Pareto k̂ is above 0.50 for {100 * number['share_above_half']:.1f} % of the data: the weights hardly have "
            "a finite variance, and 95 % intervals cover less. Raise the number of particles, or widen or train the "
            "guide."
        )
    if beside := record.get("beside"):
        notes.append(
            f"This is {record['quantity']}: {beside}. Do not compare it with a log p(x); a joint density depends on "
            "the unit of each site in it."
        )
    return notes


def _numbers(record: dict[str, Any]) -> dict[str, float]:
    """Return a record's numbers as floats, also those that are not finite."""
    return {
        name: float(value)
        for name, value in record.items()
        if name not in ("quantity", "beside", "unfit") and not isinstance(value, (list, dict))
    }


def _fit_for_json(value: Any) -> Any:
    """Put strings for numbers that JSON lacks."""
    if isinstance(value, dict):
        return {name: _fit_for_json(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_fit_for_json(entry) for entry in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
