"""What a run folder shows: tables, figures and ``report.md``, all made from what the run left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pyro_vae.likelihood.estimate import likelihood_notes, likelihood_rows
from pyro_vae.report.files import COLLAPSE, LIKELIHOOD, SCORES
from pyro_vae.runtime.files import read_json, write_text

__all__ = ["markdown_table", "write_report"]

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
