"""Write the documents' tables and docs/results.md from the results kept as JSON: no figure is typed by hand.

python benchmarks/render.py
"""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

import likelihood
import reproductions

from pyro_vae.checkpoint import write_text
from pyro_vae.report import markdown_table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = (ROOT / "README.md", ROOT / "benchmarks" / "README.md")

INTRODUCTION = """# Published figures, run again

Each section is one script in [benchmarks/reproductions](../benchmarks/reproductions), run by
`python benchmarks/reproduce.py NAME`; its table comes from the results that the script kept, by
`python benchmarks/render.py`. The last sections are by `python benchmarks/likelihood.py`. Log-likelihoods are in nats
per datum. A schedule shorter than the published one says so.
"""


def two_stage_mnist(record: dict[str, Any]) -> str:
    """Return the table of SRVAE's readings beside the one-stage VAE on MNIST."""
    header = ["", "parameters", "estimated", "test −ELBO, nats", "log-likelihood, nats", "bits/dim"]
    rows = []
    for name, row in record["results"]["models"].items():
        bits = row["bits_per_dimension"]
        rows.append(
            [
                name,
                f"{row['parameters']:,}".replace(",", " "),
                row["quantity"],
                f"{row['test_negative_elbo'][-1]:.1f}",
                f"{row['log_likelihood']:.1f} ± {row['standard_error']:.1f} (MC {row['monte_carlo_error']:.2f})",
                "no such thing" if bits is None else f"{bits:.4f}",
            ]
        )
    model = next(iter(record["results"]["models"].values()))
    compared = ("VAE", "SRVAE, discretised")
    times = [f"{record['results']['models'][name]['training_seconds']:.0f} s ({name})" for name in compared]
    return (
        f"{markdown_table(header, rows)}\n\n"
        f"{record['results']['epochs']} epochs each, seed {record['results']['seed']}; the bound on all 10 000 test "
        f"digits, the log-likelihood with K = {model['num_particles']} on the first {model['data']} after a seeded "
        f"shuffle, ± standard error over data (MC: its Monte Carlo part). Training took "
        f"{', '.join(times)}. {provenance(record)}"
    )


def four_loops(record: dict[str, Any]) -> str:
    """Return the table of final losses by training loop and seed."""
    loops = record["results"]["loops"]
    seeds = range(len(next(iter(loops.values()))["final_losses"]))
    header = ["loop", *(f"seed {seed}" for seed in seeds), "distance from the first"]
    rows = [
        [name, *(f"{value:.4f}" for value in row["final_losses"]), f"{row['parameter_distance']:.1e}"]
        for name, row in loops.items()
    ]
    return (
        f"{markdown_table(header, rows)}\n\n"
        f"Test −ELBO (nats per datum, of log p(x, y)) after {record['results']['steps']} steps in float64, and the "
        f"largest relative distance between the trained parameters and those of the first row. {provenance(record)}"
    )


def coverage(record: dict[str, Any]) -> str:
    """Return the table of how often 95 % intervals contain a known log p(x), by width of the guide."""
    header = ["guide's scale / posterior's", "coverage", "mean k̂", "exact k", "k̂ above threshold", "error / spread"]
    rows = [
        [
            f"{row['scale']:.1f}",
            f"{100 * row['coverage']:.1f} % ± {100 * row['coverage_standard_error']:.1f} %",
            f"{row['pareto_k']:.2f}",
            f"{row['exact_k']:.2f}",
            f"{100 * row['share_above_threshold']:.1f} %",
            f"{row['error_over_spread']:.3f} ± {row['error_over_spread_standard_error']:.3f}",
        ]
        for row in record["results"]["rows"]
    ]
    results = record["results"]
    return (
        f"{markdown_table(header, rows)}\n\n"
        f"{results['data']} data, {results['repeats']} estimates each with K = {results['num_particles']}, in "
        f"{results['dtype']}, seed {results['seed']}. Error / spread: the reported standard error over the standard "
        f"deviation of {results['spread_repeats']} repeated estimates, mean over {results['spread_data']} data. "
        f"{provenance(record)}"
    )


def precision(record: dict[str, Any]) -> str:
    """Return the table of what each precision costs in nats and in time."""
    rows = record["results"]["rows"]
    reference = rows["float32"]
    lines = []
    for name, row in rows.items():
        nats = f"{row['test_negative_elbo']:.2f}"
        difference = f"{row['test_negative_elbo'] - reference['test_negative_elbo']:+.2f}"
        ratio = f"{row['median_ms'] / reference['median_ms']:.2f}" if "median_ms" in row else ""
        lines.append([name, nats, difference, ratio])
    results = record["results"]
    return (
        f"{markdown_table(['', 'test −ELBO, nats', 'beside float32', 'step time ÷ float32'], lines)}\n\n"
        f"{results['epochs']} epochs of MNIST, binarised, 784–400–20, batch 128; standard error over the 10 000 test "
        f"digits {reference['standard_error']:.2f}, the same for all rows. The seeds differ in initial values, batches "
        f"and noise. Medians of {results['steps']} captured, compiled steps taken in turns; {results['device']}, "
        f"{results['threads']} threads. {provenance(record)}"
    )


def provenance(record: dict[str, Any]) -> str:
    """Return one sentence on where a record was made."""
    versions, machine = record["versions"], record["machine"]
    return (
        f"{machine['cores']} cores, {machine['processor']}, torch {versions['torch']}, pyro {versions['pyro']}; "
        f"{record['seconds']:.0f} s and {record['peak_memory_mib']} MiB at most for the whole script."
    )


TABLES = {"two_stage_mnist": two_stage_mnist, "four_loops": four_loops, "coverage": coverage, "precision": precision}


def mean_and_spread(values: list[float]) -> str:
    """Return a mean with the standard deviation of what it averages."""
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"


def rendered(text: str) -> str:
    """Return a document with every ``<!-- table: name -->`` block replaced by its table."""
    for name, render in TABLES.items():
        table = render(json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8")))
        block = rf"(<!-- table: {name} -->\n).*?(<!-- end -->)"
        text = re.sub(block, lambda match, table=table: f"{match[1]}{table}\n{match[2]}", text, flags=re.DOTALL)
    return text


def results() -> str:
    """Return docs/results.md: a section for each reproduction, and each machine, whose results are kept."""
    sections = [INTRODUCTION]
    for name in reproductions.names():
        path = RESULTS / f"reproduce_{name}.json"
        if path.exists():
            row = reproductions.row(name)
            sections.append(f"## {row.TITLE}\n\n{row.table(json.loads(path.read_text(encoding='utf-8')))}\n")
    for path in sorted(RESULTS.glob("*/likelihood.json")):
        kind = path.parent.name
        shown = likelihood.table(json.loads(path.read_text(encoding="utf-8")))
        picture = f"![Images × samples per second](../benchmarks/results/{kind}/likelihood.png)"
        sections.append(f"## Log-likelihoods per second, {kind}\n\n{shown}\n\n{picture}\n")
    return "\n".join(sections)


if __name__ == "__main__":
    documents = {path: rendered(path.read_text(encoding="utf-8")) for path in DOCUMENTS}
    for document, text in {**documents, ROOT / "docs" / "results.md": results()}.items():
        write_text(document, text)
        print(f"wrote {document}")
