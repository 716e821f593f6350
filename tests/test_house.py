"""The package's structure and English keep to their limits, and the counters behind them count."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from benchmarks.house.copies import copies
from benchmarks.house.english import english, sentences
from benchmarks.house.modules import Module, beyond_all, files_per_folder, imported_by, modules
from benchmarks.house.sites import site_reads

PACKAGE = modules(Path(__file__).resolve().parents[1])
# One published pair, or one model's options, a file: these two grow with the family.
GROWING = {"pyro_vae/models", "pyro_vae/cli/recipes"}


def test_only_the_room_of_pairs_reads_site_dictionaries() -> None:
    assert site_reads(PACKAGE) == []


def test_every_imported_name_is_in_its_modules_all() -> None:
    assert [str(line) for line in beyond_all(PACKAGE)] == []


def test_folders_stay_small() -> None:
    counts = files_per_folder(PACKAGE)
    assert [name for name, count in counts.items() if count > 11 and name not in GROWING] == []


def test_no_block_of_code_is_repeated_twice() -> None:
    assert max(Counter(of for _, of, _ in copies(PACKAGE)).values(), default=0) <= 1


def test_docstrings_are_in_short_sentences() -> None:
    found = english(PACKAGE)
    assert found.median <= 12
    assert found.percentile_90 <= 22


@pytest.mark.parametrize("phrase", ["what", "own", "so that"])
def test_docstrings_leave_out_words_that_say_little(phrase: str) -> None:
    assert english(PACKAGE).per_10_000[phrase] <= 5


def test_no_docstrings_sentence_begins_with_a_question_word() -> None:
    assert english(PACKAGE).starts == []


def package(root: Path, **files: str) -> dict[str, Module]:
    """Return the modules of a package with these files; "__" in a name stands for a folder."""
    for name, text in files.items():
        path = root / "pyro_vae" / f"{name.replace('__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return modules(root)


def test_reads_are_counted_outside_the_room_alone(tmp_path: Path) -> None:
    read = 'def f(trace, site):\n    return trace.nodes["z"]["fn"], site["mask"], site.get("infer")\n'
    found = package(tmp_path, pair__trace=read, training__fit=read, graph='x["row"], self.nodes, module.graph.nodes\n')
    expected = ["['fn']", ".get('infer')", ".nodes", "['mask']"]
    reads = site_reads(found)
    assert len(reads) == 4
    assert all(any(read.endswith(end) for read in reads) for end in expected[:2])
    assert {read.partition(":")[0] for read in reads} == {"pyro_vae/training/fit.py"}


def test_imports_are_resolved_and_held_against_all(tmp_path: Path) -> None:
    found = package(
        tmp_path,
        pair__pair='__all__ = ["Pair"]\nclass Pair: ...\ndef bare(): ...\n',
        one="from pyro_vae.pair.pair import Pair, bare\n",
        two="from pyro_vae.pair import pair\n",
        pair__three="from .pair import Pair\n",
    )
    assert [str(line) for line in beyond_all(found)] == ["pyro_vae.one imports bare from pyro_vae.pair.pair"]
    assert imported_by(found)["pyro_vae.pair.pair"] == 3


@pytest.mark.parametrize(("lines", "blocks"), [(5, []), (6, [6]), (9, [9])])
def test_a_repeated_block_is_found_once_and_whole(lines: int, blocks: list[int], tmp_path: Path) -> None:
    body = "".join(f"    a{i} = f({i})\n" for i in range(lines))
    found = package(
        tmp_path, one=f"def g():\n{body}", two=f"def h(x):\n    # Indented the same.\n{body}\n    return x\n"
    )
    assert [length for _, _, length in copies(found)] == blocks


def test_sentences_are_those_that_a_reader_sees(tmp_path: Path) -> None:
    docstring = '''"""Return log p(x), e.g. of a batch. It is in nats.

    >>> print("What is not prose")
    What is not prose

    Args:
        x: the data. That is (B, *event).

    Reference:
        Somebody (2014).
    """'''
    found = package(tmp_path, one=docstring)
    assert list(sentences(found["pyro_vae.one"])) == [
        "Return log p(x), e.g. of a batch.",
        "It is in nats.",
        "the data.",
        "That is (B, *event).",
    ]
    assert [start.partition(": ")[2] for start in english(found).starts] == ["That is (B, *event)."]
