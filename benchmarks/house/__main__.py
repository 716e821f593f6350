"""Measure the structure of a checkout and save it as one row of a table.

    python -m benchmarks.house
    python -m benchmarks.house --root ../before --row before

The second line measures another checkout, e.g. a ``git worktree`` of an older commit. Rows are saved in
``benchmarks/results/house.json``, next to the rows that are there. Then run ``python -m benchmarks.render``.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import time
from collections import Counter
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import tyro

from benchmarks.harness.common import RESULTS, ROOT, save
from benchmarks.house.copies import copies
from benchmarks.house.english import english
from benchmarks.house.modules import PACKAGE, beyond_all, files_per_folder, imported_by, imports, modules
from benchmarks.house.sites import site_reads
from pyro_vae.runtime.files import read_json

SHOWN = 10


@dataclass(frozen=True)
class Options:
    """Measure one checkout."""

    root: Path = ROOT
    """Root of the checkout."""
    row: str = "after"
    """Name of the row. A row of this name is replaced."""
    results: Path = RESULTS
    """Folder for the results. Give another one for a trial, or the saved figures are replaced."""


def main(options: Options) -> None:
    """Measure, print and save."""
    started = time.perf_counter()
    row = measured(options.root)
    print(json.dumps(row, indent=2, ensure_ascii=False))
    saved = options.results / "house.json"
    rows = read_json(saved)["results"]["rows"] if saved.exists() else {}
    print(f"saved in {save('house', {'rows': rows | {options.row: row}}, started, options.results)}")


def measured(root: Path) -> dict[str, Any]:
    """Return a checkout's structure in numbers."""
    found = modules(root)
    folders, users, lines = files_per_folder(found), imported_by(found), imports(found)
    reads, repeated, prose = site_reads(found), copies(found), english(found)
    return {
        "commit": _commit(root),
        "files": len(found),
        "files_per_folder": folders,
        "most_files_in_a_folder": max(folders.values()),
        "imports_between_modules": len({(line.importer, line.imported) for line in lines}),
        "mean_imported_by": round(statistics.mean(users.values()), 2),
        "most_imported": dict(islice(users.items(), SHOWN)),
        "beyond_all": sorted({f"{line.imported}.{line.name}" for line in beyond_all(found)}),
        "site_reads": len(reads),
        "site_reads_by_file": dict(Counter(read.partition(":")[0] for read in reads).most_common()),
        "copies": [{"at": at, "of": of, "lines": length} for at, of, length in repeated],
        "english": asdict(prose) | {"starts": len(prose.starts)},
    }


def _commit(root: Path) -> str:
    """Return the last commit of the package's source, with "+" if files have changed since; "unknown" outside git."""
    last, changes = (
        subprocess.run(["git", "-C", root, *command, "--", PACKAGE], capture_output=True, text=True, check=False).stdout
        for command in (["log", "-1", "--format=%h", "--abbrev=7"], ["status", "--porcelain"])
    )
    return f"{last.strip()}{'+' if changes else ''}" or "unknown"


if __name__ == "__main__":
    main(tyro.cli(Options))
