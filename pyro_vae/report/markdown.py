"""``report.md``: a run folder's tables and figures, laid out by the template beside this file."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from pyro_vae.likelihood.estimate import likelihood_notes, likelihood_rows
from pyro_vae.report.files import COLLAPSE, LIKELIHOOD, SCORES
from pyro_vae.runtime.files import read_json, read_json_lines, write_text

__all__ = ["markdown_table", "write_report"]

Record = dict[str, Any]


def write_report(folder: Path) -> Path:
    """Write ``report.md`` from the files of a run folder.

    Returns:
        The report's path.

    Raises:
        ValueError: for a folder without a run, and for damaged files.
    """
    config = read_json(folder / "config.json")
    if not isinstance(config.get("fit"), dict) or "loss" not in config["fit"]:
        raise ValueError(f"{folder / 'config.json'} is damaged, or of another version: it holds no settings of fit")
    metrics = _metrics(folder / "metrics.jsonl")
    stopped_early = metrics and config["fit"].get("patience") is not None
    text = _template().render(
        config=config,
        configuration=json.dumps(config, indent=2),
        metrics=metrics,
        best=min(metrics, key=lambda record: float(record["validation_loss"])) if stopped_early else None,
        likelihood=_likelihood(folder / LIKELIHOOD),
        scores=_scores(folder / SCORES),
        loss_terms=_loss_terms(folder / "loss_terms.json"),
        collapse=_collapse(folder / COLLAPSE, metrics),
        figures={path.stem for path in (folder / "figures").glob("*.png")},
    )
    # Sections that are left out leave blank lines behind.
    write_text(folder / "report.md", re.sub(r"\n{3,}", "\n\n", text).strip() + "\n")
    return folder / "report.md"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table, its first column left-aligned and the others right-aligned.

    >>> print(markdown_table(["term", "nats"], [["log p(x | z)", "1.0"]]))
    | term | nats |
    |:--|--:|
    | log p(x \\| z) | 1.0 |
    """
    # A bare | would end the cell.
    lines = ["| " + " | ".join(re.sub(r"(?<!\\)\|", r"\|", cell) for cell in row) + " |" for row in (header, *rows)]
    return "\n".join([lines[0], "|:--|" + "--:|" * (len(header) - 1), *lines[1:]])


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pyro_vae.report"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # Markdown needs no HTML entities.
        autoescape=False,
    )
    environment.globals["table"] = markdown_table
    return environment.get_template("report.md.jinja")


def _read(path: Path) -> Record | None:
    return read_json(path) if path.exists() else None


def _metrics(path: Path) -> list[Record]:
    records = read_json_lines(path)
    for i, record in enumerate(records, 1):
        if missing := {"epoch", "seconds", "loss", "validation_loss", "beta", "monitor"} - set(record):
            raise ValueError(f"line {i} of {path} is damaged, or of another version: it has no {min(missing)}")
    return records


def _scores(path: Path) -> list[list[str]]:
    try:
        return [[name, f"{value:.4f}"] for name, value in (_read(path) or {}).items()]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged, or of another version: train the run again") from error


def _likelihood(path: Path) -> Record | None:
    if (record := _read(path)) is None:
        return None
    try:
        return {"rows": likelihood_rows(record), "notes": likelihood_notes(record)}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged, or of another version: evaluate the run again") from error


def _loss_terms(path: Path) -> Record | None:
    if (columns := _read(path)) is None:
        return None
    try:
        rows = [
            [name, *(f"{values[name][0]:.4f} ± {values[name][1]:.4f}" for values in columns.values())]
            for name in next(iter(columns.values()))
        ]
    except (KeyError, IndexError, StopIteration, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged, or of another version: train the run again") from error
    return {"columns": list(columns), "rows": rows}


def _collapse(path: Path, metrics: list[Record]) -> Record | None:
    if (record := _read(path)) is None:
        return None
    try:
        return {
            "rows": [_site_row(name, site) for name, site in record["sites"].items()],
            "sentences": record["sentences"],
            "noise": [_noise(site, name, metrics) for site, name in record["noise_modules"].items() if metrics],
        }
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged, or of another version: train the run again") from error


def _site_row(name: str, site: Record) -> list[str]:
    active = "" if site["active"] is None else f"{sum(site['active'])} of {len(site['active'])}"
    used = "" if site["usage"] is None else f"{site['perplexity']:.1f} of {len(site['usage'])}"
    return [name, f"{site['kl']:.3f} ± {site['kl_standard_error']:.3f}", active, used]


def _noise(site: str, module: str, metrics: list[Record]) -> Record:
    """Return γ of a data site at the first and the last epoch, and the equivalent β of unit noise."""
    ends = (metrics[0], metrics[-1])
    scales = [record["monitor"][module] for record in ends]
    weighs = ends[-1]["beta"] is not None
    betas = [record["beta"] * scale**2 for record, scale in zip(ends, scales, strict=True)] if weighs else []
    return {"site": site, "epochs": [record["epoch"] for record in ends], "scales": scales, "betas": betas}
