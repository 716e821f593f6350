"""What an estimate of a log-likelihood holds, and how it reads: one table, in a terminal and in a report."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from rich.cells import cell_len
from torch import Tensor

from pyro_vae.likelihood.psis import trust_threshold
from pyro_vae.pair.inspection import inspect
from pyro_vae.pair.pair import Pair

__all__ = ["LogLikelihood", "likelihood_notes", "likelihood_rows", "quantity_of"]

# How many of the worst data a table names.
NAMED = 5
# With so few effective draws the delta method's error is itself of the order of the estimate's bias.
FEW_EFFECTIVE = 10


class LogLikelihood(NamedTuple):
    """An estimated log-likelihood, per datum, in nats.

    ``per_datum`` (B,) is L_K = log (1/K) Σ_k w_k, in expectation at most the ``quantity`` it estimates;
    ``standard_error`` (B,) its Monte Carlo error by the delta method, NaN for K = 1; ``ess`` (B,) the effective sample
    size (Σ w)² / Σ w². ``quantity`` says what was estimated: "log p(x)", "lower bound on log p(x)" where the guide
    fixes a discrete site to a point mass, or a joint density such as "log p(x, y)" where it fixes a continuous one.

    ``pareto_k`` (B,) is the shape k̂ of the weights' tail: the error is not to be trusted above ``threshold``. It is −∞
    for weights that are equal up to rounding, and NaN for K < 25. ``smoothed`` (B,) is L_K with the tail
    Pareto-smoothed. ``curve`` (J, B) holds L_1, L_2, L_4, … up to the largest power of two within K, each the mean over
    disjoint blocks of the same draws, so that its later entries rest on fewer blocks; ``curve_standard_error`` (J, B)
    are their Monte Carlo errors, from the spread of the blocks, at the last entry by the delta method.
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

    @property
    def mean(self) -> float:
        """The data's mean log-likelihood."""
        return float(self.per_datum.mean())

    @property
    def mean_standard_error(self) -> float:
        """The mean's standard error as an estimate for the population that the data are a sample of; NaN for one."""
        if len(self.per_datum) < 2:
            return math.nan
        return float(self.per_datum.std() / math.sqrt(len(self.per_datum)))

    @property
    def mean_monte_carlo_error(self) -> float:
        """The part of the mean's error that more particles would remove."""
        return float((self.standard_error**2).sum().sqrt() / len(self.per_datum))

    @property
    def threshold(self) -> float:
        """The k̂ above which a datum's estimate is not to be trusted, min(1 − 1/log10 K, 0.7); NaN for K < 25."""
        return trust_threshold(self.num_particles)

    @property
    def share_above_threshold(self) -> float:
        """The share of data whose k̂ is above the threshold; NaN for K < 25."""
        if math.isnan(self.threshold):
            return math.nan
        return float((self.pareto_k > self.threshold).double().mean())

    @property
    def worst(self) -> Tensor:
        """The data by index, (B,), from the largest k̂ to the smallest."""
        return self.pareto_k.argsort(descending=True, stable=True)

    @property
    def has_bits(self) -> bool:
        """Whether bits per dimension mean something: a mass on discrete data, of x alone."""
        return self.discrete and self.quantity.endswith("log p(x)")

    @property
    def bits_per_dimension(self) -> float:
        """−log p(x) / (D log 2), for a probability mass on discrete data; see ``has_bits``.

        Raises:
            ValueError: for a density, whose value depends on the data's unit, and for a joint density.
        """
        if not self.quantity.endswith("log p(x)"):
            raise ValueError(f"bits per dimension are of p(x) alone; this is {self.quantity}")
        if not self.discrete:
            raise ValueError(
                "bits per dimension need a probability mass: use a discretised likelihood on the data's own levels"
            )
        return -self.mean / (self.num_dimensions * math.log(2))

    @property
    def curve_particles(self) -> list[int]:
        """The numbers of particles along ``curve``: 1, 2, 4, …."""
        return [1 << j for j in range(len(self.curve))]

    def record(self) -> dict[str, Any]:
        """Return what is to be reported of the set as numbers, lists and strings, fit for JSON.

        A number that is not finite is a string: "nan", "inf" or "-inf".
        """
        spread = (self.curve_standard_error**2).sum(1).sqrt() / len(self.per_datum)
        # Equal weights, k̂ = −∞, are no one's worst, and without k̂ there is none.
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
            "worst": worst,
            "curve": [list(row) for row in curve],
        }
        if self.has_bits:
            record["bits_per_dimension"] = self.bits_per_dimension
        return _fit_for_json(record)

    def __repr__(self) -> str:
        rows = likelihood_rows(self.record())
        (first, value), *others = rows
        width = max(cell_len(label) for label, _ in others)
        lines = [f"  {label}{' ' * (width - cell_len(label))}  {text}" for label, text in others]
        return "\n".join([f"{first} = {value}", *lines])


def likelihood_rows(record: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the table of a :meth:`LogLikelihood.record`: what each number is, and the number with its error."""
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
        ("particles per datum, K", f"{record['num_particles']}"),
        ("median effective sample size", f"{number['median_ess']:.1f}"),
    ]
    if math.isnan(number["threshold"]):
        rows.append(("Pareto k̂", "needs K ≥ 25"))
    else:
        rows.append((f"data with k̂ above {number['threshold']:.2f}", f"{100 * number['share_above_threshold']:.1f} %"))
        worst = ", ".join(f"{i} ({float(shape):.2f})" for i, shape in record["worst"])
        rows.append(("largest k̂: datum (k̂)", worst or "none, every datum's weights are equal"))
    for particles, mean, error in record["curve"]:
        rows.append((f"L_{particles} ± Monte Carlo error", f"{float(mean):.3f} ± {float(error):.4f} nats"))
    return rows


def likelihood_notes(record: dict[str, Any]) -> list[str]:
    """Return what a reader of a :meth:`LogLikelihood.record` must know of it, in sentences."""
    number, notes = _numbers(record), []
    if number["median_ess"] < FEW_EFFECTIVE < record["num_particles"]:
        notes.append(
            f"Fewer than {FEW_EFFECTIVE} of {record['num_particles']} draws carry the weight of a typical "
            "datum: the guide misses part of the posterior, and the estimate lies below the truth by more than its "
            "error tells. Raise the number of particles, or train the guide further."
        )
    if number["share_above_threshold"] > 0:
        notes.append(
            f"Pareto k̂ is above {number['threshold']:.2f} for {100 * number['share_above_threshold']:.1f} % of the "
            "data: their weights have so heavy a tail that neither their estimate nor its error is to be trusted; both "
            "are too small more often than too large. Raise the number of particles, widen or train the guide, or "
            "anneal these data (`pv.annealed_log_likelihood`)."
        )
    if record["quantity"].startswith("log p(x, "):
        notes.append(
            "The guide fixes a continuous site to a point mass, so this is a joint log-density: it depends on that "
            "site's unit and does not compare with a log p(x)."
        )
    return notes


def _numbers(record: dict[str, Any]) -> dict[str, float]:
    """Return a record's numbers, those that are not finite among them, as floats."""
    return {name: float(value) for name, value in record.items() if name != "quantity" and not isinstance(value, list)}


def _fit_for_json(value: Any) -> Any:
    """Put strings for what JSON has no number for."""
    if isinstance(value, dict):
        return {name: _fit_for_json(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_fit_for_json(entry) for entry in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def quantity_of(pair: Pair, *batch: Tensor) -> str:
    """Say what the pair's log-weights estimate, from its sites.

    Args:
        pair: any pair.
        batch: a few data and their conditions.

    Returns:
        "log p(x)"; "lower bound on log p(x)" where the guide puts a point mass on a discrete site; the joint density,
        "log p(x, y)", where it puts one on a continuous site ``y``.
    """
    return inspect(pair, batch).quantity
