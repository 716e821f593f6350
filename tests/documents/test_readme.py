"""The documents' tables are rendered from the saved results, and README's library example runs as printed."""

from __future__ import annotations

import inspect
import json
import re
from itertools import pairwise
from pathlib import Path

import pytest

from benchmarks import published, render

ROOT = Path(__file__).resolve().parents[2]


def test_tables_are_rendered_from_the_saved_results() -> None:
    documents = [path.read_text(encoding="utf-8") for path in render.DOCUMENTS]
    assert all(any(f"<!-- table: {name} -->" in document for document in documents) for name in render.TABLES)
    assert [render.rendered(document) for document in documents] == documents
    assert render.results() == (ROOT / "docs" / "results.md").read_text(encoding="utf-8")


def test_every_reproduction_can_be_run_by_its_name() -> None:
    files = (ROOT / "benchmarks" / "published").glob("[!_]*.py")
    assert sorted(published.names()) == sorted(path.stem for path in files)
    for name in published.names():
        row = published.row(name)
        assert row.TITLE
        assert list(inspect.signature(row.run).parameters) == ["scale", "data_root"]
        assert list(inspect.signature(row.table).parameters) == ["record"]
    with pytest.raises(ValueError, match="no row is named 'nvae'; there are"):
        published.row("nvae")
    saved = {path.stem for path in (ROOT / "benchmarks" / "results").glob("reproduce_*.json")}
    assert saved <= {f"reproduce_{name}" for name in published.names()}


def test_mnist_figures_are_what_readme_says_of_them() -> None:
    record = json.loads((ROOT / "benchmarks" / "results" / "two_stage_mnist.json").read_text(encoding="utf-8"))
    models = record["results"]["models"]
    for row in models.values():
        bounds = row["test_negative_elbo"]
        assert len(bounds) == 10
        assert all(later < earlier for earlier, later in pairwise(bounds[:5]))
    pair = models["VAE"], models["SRVAE, discretised"]
    # Equal parameter counts, to the width of one hidden unit.
    assert abs(pair[0]["parameters"] / pair[1]["parameters"] - 1) < 0.005
    assert sum(row["training_seconds"] for row in pair) < 8 * 60
    assert record["peak_memory_mib"] < 2560


def test_loops_over_one_elbo_end_in_one_place() -> None:
    record = json.loads((ROOT / "benchmarks" / "results" / "four_loops.json").read_text(encoding="utf-8"))
    loops = list(record["results"]["loops"].values())
    # Rounding alone: 330 steps of float64, whose differences Adam's division amplifies.
    assert all(row["parameter_distance"] < 1e-8 for row in loops[:3])
    assert all(len(row["final_losses"]) == 5 for row in loops)


def test_intervals_cover_what_they_promise_where_the_guide_is_near_the_posterior() -> None:
    record = json.loads((ROOT / "benchmarks" / "results" / "coverage.json").read_text(encoding="utf-8"))["results"]
    rows = {row["scale"]: row for row in record["rows"]}
    assert record["data"] == 500
    assert record["num_particles"] == 1000
    for scale in (0.9, 1.1):
        assert 0.92 < rows[scale]["coverage"] < 0.98
        error = rows[scale]["error_over_spread_standard_error"]
        assert abs(rows[scale]["error_over_spread"] - 1) < 4 * error < 0.06
    # A narrower guide misses what its weights do not see, and k̂ rises with it.
    falling = [rows[scale] for scale in (0.9, 0.8, 0.7, 0.6)]
    for wider, narrower in pairwise(falling):
        assert narrower["coverage"] < wider["coverage"]
        assert narrower["pareto_k"] > wider["pareto_k"]


def test_every_linked_file_exists() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    targets = re.findall(r"\]\((?!http)([^)#]+)\)", readme)
    assert targets
    assert all((ROOT / target).exists() for target in targets)


def test_library_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert len(blocks) == 2
    monkeypatch.chdir(tmp_path)
    for block in blocks:
        # Small: fits to the whole test set would take a minute.
        small = re.sub(r"num_particles=\d+", "num_particles=20", re.sub(r"epochs=\d+", "epochs=1", block))
        exec(compile(small, "README.md", "exec"), {})
    assert (tmp_path / "runs" / "readme" / "metrics.jsonl").exists()
