"""The page of formulas names functions that exist and tests that hold them."""

from __future__ import annotations

import ast
import pkgutil
import re
from pathlib import Path

import pytest

from pyro_vae.cli import recipes

TESTS = Path(__file__).parents[1]
PAGE = (TESTS.parent / "docs" / "mathematics.md").read_text(encoding="utf-8")
FAMILY = PAGE[PAGE.index("## 10. ") : PAGE.index("## References")]
NAMES = {
    node.name
    for file in TESTS.rglob("test_*.py")
    for node in ast.parse(file.read_text(encoding="utf-8")).body
    if isinstance(node, ast.FunctionDef)
}
ROWS = [
    [cell.strip() for cell in line.strip("|").split(" | ")]
    for line in FAMILY.splitlines()
    if line.startswith("| ") and not line.startswith("| formula")
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[-1].strip("`"))
def test_every_formula_of_the_family_has_its_code_and_its_test(row: list[str]) -> None:
    _, code, held = row
    names = re.findall(r"`([\w.]+)`", code)
    assert names
    assert all(callable(pkgutil.resolve_name(f"pyro_vae.{name}")) for name in names)
    assert held.strip("`") in NAMES


def test_every_model_of_the_command_line_has_its_formulas() -> None:
    pairs = {type_.__name__.removesuffix("Recipe") for type_ in recipes.RECIPES.values()}
    missing = [name for name in pairs if f"`models.{name}" not in PAGE]
    assert not missing
