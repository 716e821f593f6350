"""The files of a run folder that describe the trained pair."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pyro_vae.data import AnyDataSet
from pyro_vae.diagnostics.collapse import collapse_report, noise_modules
from pyro_vae.diagnostics.loss_terms import loss_terms
from pyro_vae.likelihood.estimate import LogLikelihood
from pyro_vae.objectives.closed_form import has_closed_form
from pyro_vae.pair.pair import Pair
from pyro_vae.report.figures import FIGURES, collapse, save_figure
from pyro_vae.report.likelihood_figures import LIKELIHOOD_FIGURES
from pyro_vae.runtime.files import write_json

__all__ = [
    "COLLAPSE",
    "LIKELIHOOD",
    "SCORES",
    "VALUES",
    "forget_likelihood",
    "likelihood_record",
    "record_likelihood",
    "write_collapse",
    "write_figures",
    "write_loss_terms",
    "write_scores",
]

# Numbers in the data for the loss terms, e.g. 512 images of 64 pixels; more would take minutes.
VALUES = 2**15
LIKELIHOOD, COLLAPSE, SCORES = "log_likelihood.json", "collapse.json", "scores.json"


def write_loss_terms(folder: Path, pair: Pair, data: AnyDataSet) -> None:
    """Save the loss terms of some test data in ``loss_terms.json``, for a pair with a closed form."""
    if has_closed_form(pair):
        some = data.test[: max(16, VALUES // data.test[0].numel())]
        write_json(folder / "loss_terms.json", loss_terms(pair, some))


def record_likelihood(folder: Path, ll: LogLikelihood, guide: LogLikelihood | None = None) -> list[Path]:
    """Save a log-likelihood and its figures in a run folder.

    Args:
        folder: the run folder.
        ll: the estimate.
        guide: an estimate of the same data from the guide alone, to compare with.

    Returns:
        The paths of the figures.
    """
    forget_likelihood(folder)
    paths = []
    for name, draw in LIKELIHOOD_FIGURES.items():
        figure = draw(ll, guide)
        if figure is not None:
            paths.append(folder / "figures" / f"{name}.png")
            save_figure(figure, paths[-1])
    # The table last: without it a report shows no figures.
    record = likelihood_record(ll, guide)
    write_json(folder / LIKELIHOOD, record)
    return paths


def likelihood_record(ll: LogLikelihood, guide: LogLikelihood | None = None) -> dict[str, Any]:
    """Return the record of an estimate, with that of the guide alone beside it."""
    record = ll.record()
    if guide is None:
        return record
    names = ("mean", "monte_carlo_error", "share_above_threshold")
    return {**record, "guide": {name: value for name, value in guide.record().items() if name in names}}


def forget_likelihood(folder: Path) -> None:
    """Remove the table and the figures of an earlier evaluation.

    Call it when the parameters have changed, and before a new evaluation is saved.
    """
    for path in (LIKELIHOOD, *(f"figures/{name}.png" for name in LIKELIHOOD_FIGURES)):
        (folder / path).unlink(missing_ok=True)


def write_collapse(folder: Path, pair: Pair, data: AnyDataSet) -> None:
    """Save :func:`~pyro_vae.collapse_report` of test data, and its figure, in a run folder.

    Nothing is saved for a single datum, e.g. a graph: the report needs variances over data.
    """
    if len(data.test) < 2:
        return
    report = collapse_report(pair, data.test[:512], seed=0)
    if (figure := collapse(report)) is not None:
        save_figure(figure, folder / "figures" / "collapse.png")
    record = {**report.record(), "noise_modules": noise_modules(pair, data.test[:2])}
    write_json(folder / COLLAPSE, record)


def write_figures(folder: Path, pair: Pair, data: AnyDataSet, metrics: list[dict[str, Any]]) -> list[Path]:
    """Draw and save the figures of a pair.

    Returns:
        The paths of the figures.
    """
    written = []
    for name, draw in FIGURES.items():
        figure = draw(pair, data, metrics)
        if figure is not None:
            path = folder / "figures" / f"{name}.png"
            save_figure(figure, path)
            written.append(path)
    return written


def write_scores(folder: Path, scores: Mapping[str, float]) -> list[str]:
    """Save the scores of a model in ``scores.json``.

    Returns:
        A line of text for each score.
    """
    write_json(folder / SCORES, scores)
    return [f"{name}: {value:.3f}" for name, value in scores.items()]
