"""What a run folder shows: tables, figures and ``report.md``, all made from what the run left."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyro_vae.analytic import HasClosedForm, analytic_loss
from pyro_vae.checkpoint import read_json, write_text
from pyro_vae.data import DataSet
from pyro_vae.distributions import GaussianMixture
from pyro_vae.divergences import monte_carlo_kl, variational_kl_bound
from pyro_vae.evaluate import LogLikelihood
from pyro_vae.figures import FIGURES, save_figure
from pyro_vae.pair import Pair, device_of, evaluation, site_terms, to_pair
from pyro_vae.randomness import own_random_state

__all__ = ["loss_terms", "markdown_table", "record_likelihood", "write_figures", "write_loss_terms", "write_report"]

# A standard error from 50 repetitions is itself known to a tenth.
REPETITIONS = 50
PARTICLES = 20
# With so few effective draws the delta method's error is itself of the order of the estimate's bias.
FEW_EFFECTIVE = 10


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
        write_text(folder / "loss_terms.json", json.dumps(loss_terms(pair, data.test[:512]), indent=2) + "\n")


def record_likelihood(folder: Path, ll: LogLikelihood) -> None:
    """Keep a log-likelihood in the run folder."""
    record: dict[str, Any] = {
        "quantity": ll.quantity,
        "mean": ll.mean,
        "standard_error": ll.mean_standard_error,
        "monte_carlo_error": ll.mean_monte_carlo_error,
        "num_particles": ll.num_particles,
        "data": len(ll.per_datum),
        "median_ess": float(ll.ess.median()),
    }
    if ll.has_bits:
        record["bits_per_dimension"] = ll.bits_per_dimension
    write_text(folder / "log_likelihood.json", json.dumps(record, indent=2) + "\n")


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


CAPTIONS = {
    "loss": "Training and validation −ELBO, each site's share of it, and the learned scales, over epochs.",
    "reconstructions": "Test data above, E[x | z] for one draw of the guide below.",
    "samples": "Means of p(x | …) for latents drawn from the prior; with a mixture prior one row per component.",
    "super_resolution": "For each low-resolution y: draws of x, their mean, their pixel-wise spread, and the truth.",
    "latent_map": "Test data's latents, means of eight draws of the guide, on their two leading principal axes.",
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
    if (folder / "log_likelihood.json").exists():
        parts += ["## Log-likelihood of test data", _likelihood_section(read_json(folder / "log_likelihood.json"))]
    if (folder / "loss_terms.json").exists():
        parts += ["## −ELBO term by term, by sampling and in closed form", _terms_section(folder)]
    for name, caption in CAPTIONS.items():
        if (folder / "figures" / f"{name}.png").exists():
            parts += [f"## {name.replace('_', ' ').capitalize()}", caption, f"![{name}](figures/{name}.png)"]
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
    text = f"{len(lines)} epochs in {seconds:.1f} s, β = {config['fit']['beta']}; "
    text += f"training −ELBO {last['loss']:.3f} nats per datum"
    if last["validation_loss"] is not None:
        text += f", validation −ELBO {last['validation_loss']:.3f}"
    if config["fit"].get("patience") is not None:
        best = min(map(json.loads, lines), key=lambda record: float(record["validation_loss"]))
        text += f"; kept is epoch {best['epoch']}, the best on validation data, {best['validation_loss']:.3f}"
    scales = ", ".join(f"{name} {value:.4g}" for name, value in last["monitor"].items())
    return f"{text}." + (f" Learned scales: {scales}." if scales else "")


def _likelihood_section(record: dict[str, Any]) -> str:
    rows = [
        ["estimated", record["quantity"]],
        ["mean over data ± standard error (nats)", f"{record['mean']:.3f} ± {record['standard_error']:.3f}"],
        ["Monte Carlo part of the error (nats)", f"{record['monte_carlo_error']:.4f}"],
        ["data, particles per datum", f"{record['data']}, {record['num_particles']}"],
        ["median effective sample size", f"{record['median_ess']:.1f}"],
    ]
    if "bits_per_dimension" in record:
        rows.append(["bits per dimension", f"{record['bits_per_dimension']:.4f}"])
    table = markdown_table(["", "importance sampling from the guide"], rows)
    if record["median_ess"] < FEW_EFFECTIVE:
        table += (
            f"\n\nFewer than {FEW_EFFECTIVE} of {record['num_particles']} draws carry the weight of a typical "
            "datum: the guide misses part of the posterior, and the estimate lies below the truth by more than its "
            "error tells. Raise the number of particles, or train the guide further."
        )
    if record["quantity"].startswith("log p(x, "):
        table += (
            "\n\nThe guide fixes a continuous site to a point mass, so this is a joint log-density: it depends on that "
            "site's unit and does not compare with a log p(x)."
        )
    return table


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
