"""What a run folder shows: tables, figures and ``report.md``, all made from what the run left."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyro_vae.analytic import HasClosedForm, analytic_loss
from pyro_vae.checkpoint import read_json, write_text
from pyro_vae.data import DataSet
from pyro_vae.diagnostics import collapse_report, noise_modules
from pyro_vae.distributions import GaussianMixture
from pyro_vae.divergences import monte_carlo_kl, variational_kl_bound
from pyro_vae.estimates import LogLikelihood, likelihood_notes, likelihood_rows
from pyro_vae.figures import FIGURES, LIKELIHOOD_FIGURES, collapse, save_figure
from pyro_vae.pair import Pair, device_of, evaluation, site_terms, to_pair
from pyro_vae.randomness import own_random_state

__all__ = [
    "loss_terms",
    "markdown_table",
    "record_likelihood",
    "write_figures",
    "write_loss_terms",
    "write_report",
    "write_scores",
]

# A standard error from 20 repetitions is itself known to a sixth.
REPETITIONS = 20
# Numbers in the data whose loss is taken apart, such as 512 images of 64 pixels: a report is to cost seconds.
VALUES = 2**15
PARTICLES = 20
LIKELIHOOD, COLLAPSE, SCORES = "log_likelihood.json", "collapse.json", "scores.json"


def loss_terms(pair: Pair, *batch: Tensor, seed: int = 0) -> dict[str, dict[str, tuple[float, float]]]:
    """Hold each term of −ELBO by sampling, as ``Trace_ELBO`` does, against the closed form.

    Args:
        pair: a pair with a closed form.
        batch: ``x`` and the pair's conditions.
        seed: of the draws; the two columns have draws of their own.

    Returns:
        By column, by site and "total", (mean over data, its Monte Carlo standard error), in nats. With a mixture prior
        there are columns for the unbiased, the variational and the convex divergence.
    """

    def sampled() -> dict[str, Tensor]:
        terms = site_terms(pair, *batch, num_particles=PARTICLES)
        return {name: (term.log_guide - term.log_model).mean() for name, term in terms.items()}

    def closed(**divergence: Any) -> Callable[[], dict[str, Tensor]]:
        def terms() -> dict[str, Tensor]:
            loss = analytic_loss(pair, *batch, num_particles=PARTICLES, **divergence)
            return {name: value.mean() for name, value in loss._asdict().items()}

        return terms

    columns: dict[str, Callable[[], dict[str, Tensor]]] = {"Trace_ELBO": sampled}
    prior = getattr(pair, "prior", None)
    if prior is not None and isinstance(prior(), GaussianMixture):
        columns["closed, Monte Carlo"] = closed(mixture_kl=monte_carlo_kl)
        columns["closed, variational"] = closed(mixture_kl=variational_kl_bound)
        columns["closed, convex"] = closed()
    else:
        columns["closed form"] = closed()
    batch = to_pair(pair, batch)
    with evaluation(pair), own_random_state(seed, device_of(pair)):
        return {name: _repeated(column) for name, column in columns.items()}


def _repeated(terms: Callable[[], dict[str, Tensor]]) -> dict[str, tuple[float, float]]:
    rows = [terms() for _ in range(REPETITIONS)]
    values = {name: torch.stack([row[name] for row in rows]).double() for name in rows[0]}
    values["total"] = torch.stack(list(values.values())).sum(0)
    return {name: (float(v.mean()), float(v.std() / math.sqrt(REPETITIONS))) for name, v in values.items()}


def write_loss_terms(folder: Path, pair: Pair, data: DataSet) -> None:
    """Keep :func:`loss_terms` of the test data in the run folder, where the pair has a closed form."""
    if isinstance(pair, HasClosedForm):
        some = data.test[: max(16, VALUES // data.test[0].numel())]
        write_text(folder / "loss_terms.json", json.dumps(loss_terms(pair, some), indent=2) + "\n")


def record_likelihood(folder: Path, ll: LogLikelihood) -> list[Path]:
    """Keep a log-likelihood in the run folder, draw its figures and return their paths."""
    forget_likelihood(folder)
    paths = []
    for name, draw in LIKELIHOOD_FIGURES.items():
        figure = draw(ll)
        if figure is not None:
            paths.append(folder / "figures" / f"{name}.png")
            save_figure(figure, paths[-1])
    # The table last: a report shows the figures only where there is one.
    write_text(folder / LIKELIHOOD, json.dumps(ll.record(), indent=2, allow_nan=False) + "\n")
    return paths


def forget_likelihood(folder: Path) -> None:
    """Remove what an earlier evaluation left for the report: it was of other parameters, or is about to be replaced."""
    for path in (LIKELIHOOD, *(f"figures/{name}.png" for name in LIKELIHOOD_FIGURES)):
        (folder / path).unlink(missing_ok=True)


def write_collapse(folder: Path, pair: Pair, data: DataSet) -> None:
    """Keep :func:`~pyro_vae.collapse_report` of test data in the run folder, with its figure.

    It takes variances over data, which a single graph has none of: then nothing is kept.
    """
    if len(data.test) < 2:
        return
    report = collapse_report(pair, data.test[:512], seed=0)
    if (figure := collapse(report)) is not None:
        save_figure(figure, folder / "figures" / "collapse.png")
    record = {**report.record(), "noise_modules": noise_modules(pair, data.test[:2])}
    write_text(folder / COLLAPSE, json.dumps(record, indent=2) + "\n")


def write_figures(folder: Path, pair: Pair, data: DataSet, metrics: list[dict[str, Any]]) -> list[Path]:
    """Draw every figure that suits the pair and return their paths."""
    written = []
    for name, draw in FIGURES.items():
        figure = draw(pair, data, metrics)
        if figure is not None:
            path = folder / "figures" / f"{name}.png"
            save_figure(figure, path)
            written.append(path)
    return written


def write_scores(folder: Path, scores: Mapping[str, float]) -> list[str]:
    """Keep what a model is scored by besides its likelihood, and return it line by line."""
    write_text(folder / SCORES, json.dumps(dict(scores), indent=2) + "\n")
    return [f"{name}: {value:.3f}" for name, value in scores.items()]


CAPTIONS = {
    "loss": "Training loss, validation −ELBO where there are validation data, each site's share of −ELBO, by epoch.",
    "reconstructions": "Test data above, E[x | z] for one draw of the guide below.",
    "samples": "Means of p(x | …) for latents drawn from the prior; with a mixture prior one row per component.",
    "super_resolution": "For each low-resolution y: draws of x, their mean, their pixel-wise spread, and the truth.",
    "latent_map": "Latents of test data or of a graph's nodes: means of eight draws of the guide, on their leading two "
    "principal axes.",
}

COLLAPSE_CAPTIONS = {
    "collapse": "KL of each unit, or, where it has no closed form, the variance of its posterior mean over data; and "
    "what share of the data each component answers for.",
    "scales": "The learned γ over epochs, and the β they amount to: the ELBO with noise γ is, up to a factor and a "
    "constant, that with unit noise and β = γ².",
}
LIKELIHOOD_CAPTIONS = {
    "likelihood_curve": "L_K against K, the mean over data, from the same draws; bars are its Monte Carlo error.",
    "pareto_k": "Pareto k̂ of each datum's weights, from the smallest to the largest, and the threshold above which an "
    "estimate is not to be trusted.",
    "likelihood_histogram": "The estimate over data.",
}


def write_report(folder: Path) -> Path:
    """Write ``report.md`` from the files that a run folder holds, and return its path.

    Raises:
        ValueError: when the folder holds no run.
    """
    config = read_json(folder / "config.json")
    parts = [
        f"# {config.get('model', config.get('pair', 'a pair'))} on {config.get('data', 'data')}",
        _summary(folder, config),
    ]
    if (folder / LIKELIHOOD).exists():
        parts += ["## Log-likelihood of test data", *_likelihood_section(folder)]
    if (folder / SCORES).exists():
        rows = [[name, f"{value:.4f}"] for name, value in read_json(folder / SCORES).items()]
        parts += ["## Scores", markdown_table(["", ""], rows)]
    if (folder / "loss_terms.json").exists():
        parts += ["## −ELBO term by term, by sampling and in closed form", _terms_section(folder)]
    if (folder / COLLAPSE).exists():
        parts += ["## What the latents carry", *_collapse_section(folder)]
    for name, caption in CAPTIONS.items():
        if pictures := _pictures(folder, {name: caption}):
            parts += [f"## {name.replace('_', ' ').capitalize()}", *pictures]
    parts += ["## Configuration", f"```json\n{json.dumps(config, indent=2)}\n```"]
    write_text(folder / "report.md", "\n\n".join(parts) + "\n")
    return folder / "report.md"


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table, its first column left and the others right.

    >>> print(markdown_table(["term", "nats"], [["x", "1.0"]]))
    | term | nats |
    |:--|--:|
    | x | 1.0 |
    """
    rule = "|:--|" + "--:|" * (len(header) - 1)
    return "\n".join(["| " + " | ".join(header) + " |", rule, *("| " + " | ".join(row) + " |" for row in rows)])


def _summary(folder: Path, config: dict[str, Any]) -> str:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    if not lines:
        return "No epoch has been completed."
    last = json.loads(lines[-1])
    seconds = sum(json.loads(line)["seconds"] for line in lines)
    weight = "" if last["beta"] is None else f", β = {last['beta']:g}"
    text = f"{len(lines)} epochs in {seconds:.1f} s{weight}; "
    text += f"training loss ({config['fit']['loss']}) {last['loss']:.3f} nats per datum"
    if last["validation_loss"] is not None:
        text += f", validation −ELBO {last['validation_loss']:.3f}"
    if config["fit"].get("patience") is not None:
        best = min(map(json.loads, lines), key=lambda record: float(record["validation_loss"]))
        text += f"; kept is epoch {best['epoch']}, the best on validation data, {best['validation_loss']:.3f}"
    scales = ", ".join(f"{name} {value:.4g}" for name, value in last["monitor"].items())
    return f"{text}." + (f" Learned scales: {scales}." if scales else "")


def _likelihood_section(folder: Path) -> list[str]:
    record = read_json(folder / LIKELIHOOD)
    try:
        rows = [list(row) for row in likelihood_rows(record)]
        notes = likelihood_notes(record)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / LIKELIHOOD} is damaged, or of another version: evaluate the run again") from error
    parts = [markdown_table(["estimated by importance sampling from the guide", ""], rows), *notes]
    return parts + _pictures(folder, LIKELIHOOD_CAPTIONS)


def _collapse_section(folder: Path) -> list[str]:
    record = read_json(folder / COLLAPSE)
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    try:
        rows = [_carried(name, site) for name, site in record["sites"].items()]
        lines = [*record["sentences"], *_noise_over_time(record["noise_modules"], metrics)]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / COLLAPSE} is damaged, or of another version: train the run again") from error
    header = ["site", "KL ± standard error (nats)", "active units", "components in use"]
    sentences = "\n".join(f"* {line}" for line in lines)
    return [markdown_table(header, rows), sentences, *_pictures(folder, COLLAPSE_CAPTIONS)]


def _carried(name: str, site: dict[str, Any]) -> list[str]:
    active = "" if site["active"] is None else f"{sum(site['active'])} of {len(site['active'])}"
    used = "" if site["usage"] is None else f"{site['perplexity']:.1f} of {len(site['usage'])}"
    return [name, f"{site['kl']:.3f} ± {site['kl_standard_error']:.3f}", active, used]


def _noise_over_time(modules: dict[str, str], metrics: list[dict[str, Any]]) -> list[str]:
    """Say where γ of each data site began and ended, and the β that it amounted to beside training's own."""
    lines = []
    for site, module in modules.items() if metrics else ():
        (first, begun), *_, (last, ended) = [(r["epoch"], r) for r in (metrics[0], metrics[-1])]
        scales = [record["monitor"][module] for record in (begun, ended)]
        line = f"{site}: γ was {scales[0]:.4g} after epoch {first} and {scales[1]:.4g} after epoch {last}"
        if ended["beta"] is not None:
            betas = [record["beta"] * scale**2 for record, scale in zip((begun, ended), scales, strict=True)]
            line += (
                f"; training's β times γ², the β of unit noise that it amounts to, {betas[0]:.3g} and {betas[1]:.3g}"
            )
        lines.append(f"{line}.")
    return lines


def _pictures(folder: Path, captions: dict[str, str]) -> list[str]:
    """Return those of the figures that the folder holds, each under its caption."""
    parts = []
    for name, caption in captions.items():
        if (folder / "figures" / f"{name}.png").exists():
            parts += [caption, f"![{name}](figures/{name}.png)"]
    return parts


def _terms_section(folder: Path) -> str:
    columns = read_json(folder / "loss_terms.json")
    header = ["term (nats per datum)", *columns]
    rows = [
        [name, *(f"{values[name][0]:.4f} ± {values[name][1]:.4f}" for values in columns.values())]
        for name in next(iter(columns.values()))
    ]
    text = (
        "Each term is a site's share of −ELBO: the reconstruction terms −log p at `x` and `y`, the divergences at the "
        "latent sites. Errors are Monte Carlo standard errors; the columns have draws of their own."
    )
    if len(columns) > 2:
        text += (
            " The closed columns differ in the divergence from the mixture prior: estimated without bias, and bounded "
            "from above by the variational and by the convex bound."
        )
    return f"{markdown_table(header, rows)}\n\n{text}"
