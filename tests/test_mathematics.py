"""The page of formulas names functions that exist and tests that hold them."""

from __future__ import annotations

import ast
import pkgutil
import re
from pathlib import Path

import pytest

import pyro_vae as pv

TESTS = Path(__file__).parent
PAGE = (TESTS.parent / "docs" / "mathematics.md").read_text(encoding="utf-8")
FAMILY = PAGE[PAGE.index("## 10. ") : PAGE.index("## References")]
ROWS = [
    [cell.strip() for cell in line.strip("|").split(" | ")]
    for line in FAMILY.splitlines()
    if line.startswith("| ") and not line.startswith("| formula")
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[-1].strip("`").split("::")[-1])
def test_every_formula_of_the_family_has_its_code_and_its_test(row: list[str]) -> None:
    _, code, held = row
    names = re.findall(r"`([\w.]+)`", code)
    assert names
    assert all(callable(pkgutil.resolve_name(f"pyro_vae.{name}")) for name in names)
    file, name = re.fullmatch(r"`([\w/.]+)::(\w+)`", held).groups()  # type: ignore[union-attr]
    nodes = ast.parse((TESTS / file).read_text(encoding="utf-8")).body
    assert name in {node.name for node in nodes if isinstance(node, ast.FunctionDef)}


def test_every_model_of_the_command_line_has_its_formulas() -> None:
    pairs = {type_.__name__.removesuffix("Options") for type_ in pv.models.OPTIONS.values()}
    missing = [name for name in pairs if f"`models.{name}" not in PAGE]
    assert not missing
