"""The page of formulas names public functions that exist and tests that hold them."""

from __future__ import annotations

import ast
import inspect
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import pyro_vae as pv

TESTS = Path(__file__).parents[1]
PAGE = (TESTS.parent / "docs" / "mathematics.md").read_text(encoding="utf-8")
TEST_NAMES = {
    node.name
    for file in TESTS.rglob("test_*.py")
    for node in ast.parse(file.read_text(encoding="utf-8")).body
    if isinstance(node, ast.FunctionDef)
}


def rows(column: str) -> Iterator[str]:
    """Yield the cells of a column, over all of the page's tables that have it."""
    header: list[str] = []
    for line in PAGE.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if not line.startswith("|"):
            header = []
        elif not header:
            header = cells
        elif column in header and not line.startswith("|--"):
            yield cells[header.index(column)]


def names(cell: str) -> list[str]:
    """Return the names between a cell's backticks: whole ones, and those of what is called."""
    return [name for code in re.findall(r"`([^`]+)`", cell) for name in re.findall(r"([A-Za-z_][\w.]*)(?=\(|$)", code)]


def is_public(name: str) -> bool:
    """Return whether a dotted name is reached from ``pyro_vae`` by what its modules list, or is torch's or Pyro's."""
    if name.startswith(("torch.", "pyro.")):
        return callable(pkgutil.resolve_name(name))
    owner: Any = pv
    for part in name.split("."):
        found = getattr(owner, part, None)
        if inspect.ismodule(owner) and not inspect.ismodule(found) and part not in owner.__all__:
            return False
        if found is None:
            # A dataclass has no attribute for a field without a default.
            return part in getattr(owner, "__annotations__", {})
        owner = found
    return True


HELD_BY = list(rows("held by"))
IN_CODE = sorted({name for cell in rows("in code") for name in names(cell)})


def test_the_page_has_its_tables() -> None:
    assert len(IN_CODE) > 80
    assert len(HELD_BY) > 30


@pytest.mark.parametrize("name", IN_CODE)
def test_every_name_in_code_is_a_public_object(name: str) -> None:
    assert is_public(name)


@pytest.mark.parametrize("cell", HELD_BY, ids=lambda cell: cell.strip("`"))
def test_every_formula_of_the_family_is_held_by_a_test(cell: str) -> None:
    assert cell.strip("`") in TEST_NAMES


def test_every_published_pair_has_its_formulas() -> None:
    found = {name: getattr(pv.models, name) for name in pv.models.__all__}
    pairs = [name for name, value in found.items() if issubclass(value, pv.Pair)]
    assert [name for name in pairs if f"`models.{name}" not in PAGE] == []
