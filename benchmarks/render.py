"""Write the documents' tables and docs/results.md from the saved JSON results. No figure is typed by hand.

python -m benchmarks.render
"""

from __future__ import annotations

import json
import re
from typing import Any

from benchmarks import published
from benchmarks.harness.common import RESULTS, ROOT
from benchmarks.harness.side_by_side import table
from benchmarks.harness.tables import provenance
from benchmarks.house.english import BANNED, STARTS
from benchmarks.speed import likelihood
from pyro_vae.report.markdown import markdown_table
from pyro_vae.runtime.files import read_json, write_text

DOCUMENTS = (
    ROOT / "README.md",
    ROOT / "benchmarks" / "README.md",
    ROOT / "docs" / "settled.md",
    ROOT / "docs" / "reliability.md",
)

INTRODUCTION = """# Published figures, run again

Each section is one module of [benchmarks/published](../benchmarks/published). Run it with
`python -m benchmarks.published NAME`, then `python -m benchmarks.render` to write its table. The last section is from
`python -m benchmarks.speed.likelihood`. Log-likelihoods are in nats per datum. If a schedule is shorter than the
published one, the section says so.
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
                thousands(row["parameters"]),
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


def training_step(record: dict[str, Any]) -> str:
    """Return a table of step times for each case, and of the memory of long runs."""
    results, parts = record["results"], []
    for case, rows in results["cases"].items():
        parts.append(f"### {case}\n\n{table(rows, 'captured, compiled', 'step')}")
    if "long_run" in results:
        header = ["784–400–20", "steps", "resident MiB", "growth", "peak MiB"]
        cells = [
            [
                name,
                " → ".join(map(str, row["steps"])),
                " → ".join(map(str, row["resident_mib"])),
                f"{100 * row['growth']:.2f} %",
                str(row["peak_mib"]),
            ]
            for name, row in results["long_run"].items()
        ]
        parts.append(f"### Long runs\n\n{markdown_table(header, cells)}")
    parts.append(f"Batches of {results['batch']}, {results['threads']} threads. {provenance(record)}")
    return "\n\n".join(parts)


def epoch(record: dict[str, Any]) -> str:
    """Return a table of epoch times for each case."""
    results = record["results"]
    parts = [
        f"### {case}\n\n{table(rows, 'fit, captured, compiled', 'epoch', 's')}"
        for case, rows in results["cases"].items()
    ]
    parts.append(
        f"{thousands(results['data'])} data in batches of {results['batch']}, {results['threads']} threads. "
        f"{provenance(record)}"
    )
    return "\n\n".join(parts)


def scaling(record: dict[str, Any]) -> str:
    """Return the tables of an epoch and of an evaluation by number of processes."""
    results = record["results"]
    parts = [f"### {case.title()}\n\n{table(rows, '1 process', case, 's')}" for case, rows in results["cases"].items()]
    parts.append(
        f"784–400–20; an epoch of {thousands(results['data'])} data, log-likelihoods of "
        f"{thousands(results['evaluated'])} with K = {results['num_particles']}. The ratio is that of "
        f"throughputs, a row's over one process's. {provenance(record)}"
    )
    return "\n\n".join(parts)


def growth(record: dict[str, Any]) -> str:
    """Return the table of step times by size, with slopes."""
    header = ["axis", "median ms by size", "slope", "slope of the last two"]
    rows = [
        [
            f"{axis}, per {row['work']}",
            ", ".join(f"{size}: {value:.2f}" for size, value in row["median_ms"].items()),
            f"{row['slope']:.2f}",
            f"{row['last_slope']:.2f}",
        ]
        for axis, row in record["results"]["axes"].items()
    ]
    return f"{markdown_table(header, rows)}\n\n{provenance(record)}"


def house(record: dict[str, Any]) -> str:
    """Return the table of a checkout's structure, a column for each."""
    rows = record["results"]["rows"]
    most = [next(iter(row["most_imported"].items())) for row in rows.values()]
    lines = {
        "Python files, folders": [f"{row['files']}, {len(row['files_per_folder'])}" for row in rows.values()],
        "most files in one folder": [row["most_files_in_a_folder"] for row in rows.values()],
        "modules that import a module, mean": [row["mean_imported_by"] for row in rows.values()],
        "most imported module": [f"`{name.partition('.')[2]}`, by {count}" for name, count in most],
        "names imported beyond `__all__`": [len(row["beyond_all"]) for row in rows.values()],
        "site dictionaries read outside `pair/`": [row["site_reads"] for row in rows.values()],
        "repeated blocks of 6 lines or more": [len(row["copies"]) for row in rows.values()],
        "words per docstring sentence, median, 90 %": [
            f"{row['english']['median']:.0f}, {row['english']['percentile_90']:.0f}" for row in rows.values()
        ],
        **{
            f"“{phrase}” in 10 000 words": [f"{row['english']['per_10_000'][phrase]:.1f}" for row in rows.values()]
            for phrase in BANNED
        },
        f"sentences that begin with {', '.join(STARTS)}": [row["english"]["starts"] for row in rows.values()],
    }
    header = ["", *(f"{name}, {row['commit']}" for name, row in rows.items())]
    return markdown_table(header, [[name, *map(str, cells)] for name, cells in lines.items()])


def start(record: dict[str, Any]) -> str:
    """Return the table of the time, and of the program runs, before the first step or chunk, by checkout."""
    rows = record["results"]["rows"]
    lines = []
    for case, calls in next(iter(rows.values())).items():
        for call in calls:
            cells = [row[case][call] for row in rows.values()]
            times = [f"{cell['median_ms']:.0f} ({cell['processor_ms']:.0f})" for cell in cells]
            lines.append([f"{case}: `{call}`", *times, *(f"{c['guide_runs']}, {c['model_runs']}" for c in cells)])
    header = ["", *(f"{name}, ms" for name in rows), *(f"{name}, guide and model runs" for name in rows)]
    note = f"{record['results']['threads']} thread, medians of 5; in brackets the processor's time."
    return f"{markdown_table(header, lines)}\n\n{note} {provenance(record)}"


def settled(record: dict[str, Any]) -> str:
    """Return the table of what the guide says and what is settled, a row for each model."""
    header = [
        "model",
        "digits",
        "guide, K = 5000",
        "settled",
        "chosen proposals, K = 1000",
        "settled",
        "understated by",
    ]
    rows = []
    for model in record["results"].values():
        guide, auto, _ = model["rows"]
        cells = [f"{row['mean']:.3f} ± {row['monte_carlo_error']:.3f}" for row in (guide, auto)]
        shares = [f"{100 * row['share_settled']:.1f} %" for row in (guide, auto)]
        title = f"{model['title']}, {auto['quantity']}"
        pairs = [cell for both in zip(cells, shares, strict=True) for cell in both]
        rows.append([title, str(auto["data"]), *pairs, f"{auto['mean'] - guide['mean']:+.2f}"])
    return (
        f"{markdown_table(header, rows)}\n\n"
        "Mean over test digits after a seeded shuffle, in nats, ± its Monte Carlo error, which leaves out the spread "
        "over digits: both columns are of the same ones. An error of data that are not settled is too small. "
        f"{provenance(record)}"
    )


def settled_times(record: dict[str, Any]) -> str:
    """Return the table of times and of few draws, a row for each model."""
    header = ["model", "guide, K = 5000, ms", "chosen, K = 1000, ms", "chosen, K = 100, ms", "K = 100 beside the guide"]
    rows = []
    for model in record["results"].values():
        times = [f"{row['milliseconds_per_datum']:.0f}" for row in model["rows"]]
        guide, _, few = model["rows"]
        rows.append([model["title"], *times, f"{few['mean'] - guide['mean']:+.2f} nats"])
    return f"{markdown_table(header, rows)}\n\nPer digit, one thread, whole calls. {provenance(record)}"


def gold(record: dict[str, Any]) -> str:
    """Return a paragraph on settled numbers beside annealing and bounds."""
    results = record["results"]
    simulated, (annealing, settling) = results["simulated"], results["seconds"]
    # An error that is not known is −1.
    away = [abs(d) / e for d, e in zip(results["difference"], results["errors"], strict=True) if e > 0]
    return (
        f"{results['digits']} static MNIST digits, VAE 784–400–40: {results['mean']:.3f} by chosen proposals "
        f"({results['settled']} settled) in {settling:.1f} s, {results['annealed_mean']:.3f} by annealing from the "
        f"guide and the prior with {results['temperatures']} temperatures in {annealing:.0f} s; the largest distance "
        f"of a digit is {max(away):.1f} errors of both. As many digits drawn from the model: {simulated['mean']:.2f}, "
        f"between {simulated['lower']:.2f} and {simulated['upper']:.2f} in expectation; {simulated['outside']} outside "
        f"their interval. {provenance(record)}"
    )


def reliability(record: dict[str, Any]) -> str:
    """Return what came of damaged files, full disks and kills."""
    results = record["results"]
    outcomes = results["damages"]["outcomes"]
    kinds = list(dict.fromkeys(kind for counts in outcomes.values() for kind in counts))
    rows = [[f"`{name}`", *(str(counts.get(kind, 0)) for kind in kinds)] for name, counts in outcomes.items()]
    disks = ", ".join(f"{kind}: {count}" for kind, count in results["disks"]["outcomes"].items())
    kills = results["kills"]
    signals = ", ".join(f"{name} {count}" for name, count in sorted(kills["by"].items()))
    return (
        f"{markdown_table(['damaged file', *kinds], rows)}\n\n"
        f"{results['damages']['count']} damaged files, cut, flipped in a bit, swapped, cast or filled with NaN; "
        f"accepted silently or leaked: {len(results['damages']['silent_or_leaked'])}. {results['disks']['count']} "
        f"disks that are full at a random size: {disks}. Kills: {signals}, {kills['with_a_run_to_resume']} of them "
        f"with a run to resume; {kills['equal_to_unbroken']} of {kills['runs']} runs of `train` and `evaluate` ended "
        f"in the bits of an unbroken one. Seed {results['seed']}. {provenance(record)}"
    )


def thousands(count: int) -> str:
    """Return a number in groups of three digits."""
    return f"{count:,}".replace(",", " ")


TABLES = {
    "two_stage_mnist": two_stage_mnist,
    "four_loops": four_loops,
    "coverage": coverage,
    "precision": precision,
    "house": house,
    "start": start,
    "settled": settled,
    "settled_times": settled_times,
    "gold": gold,
    "reliability": reliability,
}
# Tables that share a file of results.
FILES = {"settled_times": "settled"}
# Timings, saved by kind of machine and shown in benchmarks/README.md.
TIMINGS = {
    "training_step": ("One training step", training_step),
    "epoch": ("One epoch", epoch),
    "scaling": ("Several processes", scaling),
    "growth": ("Growth of the cost of captured training", growth),
}


def timings() -> str:
    """Return a section for each kind of machine and benchmark that has results."""
    sections = []
    for folder in sorted(path for path in RESULTS.iterdir() if path.is_dir()):
        for name, (title, render) in TIMINGS.items():
            path = folder / f"{name}.json"
            if path.exists():
                table = render(json.loads(path.read_text(encoding="utf-8")))
                picture = f"![{title}](results/{folder.name}/{name}.png)"
                sections.append(f"## {title}, {folder.name}\n\n{picture}\n\n{table}")
    return "\n\n".join(sections) or "No timings are saved yet."


def rendered(text: str) -> str:
    """Return a document with every ``<!-- table: name -->`` block replaced by its table."""
    tables = {name: render(read_json(RESULTS / f"{FILES.get(name, name)}.json")) for name, render in TABLES.items()}
    for name, shown in {**tables, "timings": timings()}.items():
        block = rf"(<!-- table: {name} -->\n).*?(<!-- end -->)"
        text = re.sub(block, lambda match, shown=shown: f"{match[1]}{shown}\n{match[2]}", text, flags=re.DOTALL)
    return text


def results() -> str:
    """Return docs/results.md: a section for each reproduction, and each machine, that has results."""
    sections = [INTRODUCTION]
    for name in published.names():
        path = RESULTS / f"reproduce_{name}.json"
        if path.exists():
            row = published.row(name)
            sections.append(f"## {row.TITLE}\n\n{row.table(json.loads(path.read_text(encoding='utf-8')))}\n")
    for path in sorted(RESULTS.glob("*/likelihood.json")):
        kind = path.parent.name
        shown = likelihood.table(json.loads(path.read_text(encoding="utf-8")))
        picture = f"![Images × samples per second](../benchmarks/results/{kind}/likelihood.png)"
        sections.append(f"## Log-likelihoods per second, {kind}\n\n{shown}\n\n{picture}\n")
    return "\n".join(sections if len(sections) > 1 else [*sections, "No results are saved yet.\n"])


if __name__ == "__main__":
    documents = {path: rendered(path.read_text(encoding="utf-8")) for path in DOCUMENTS}
    for document, text in {**documents, ROOT / "docs" / "results.md": results()}.items():
        write_text(document, text)
        print(f"wrote {document}")
