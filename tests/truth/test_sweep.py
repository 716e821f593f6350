"""The table of the sweep covers every public function, and its cells are those that the functions give."""

from __future__ import annotations

import inspect
import re

import pyro
import pytest
import torch

import pyro_vae as pv
from benchmarks.accuracy.sweep import COLUMNS, END, FUNCTIONS, NO_PAIR, PAGE, START, cell


@pytest.fixture(autouse=True)
def _single_precision() -> None:
    # The sweep sets each pair's type itself.
    torch.set_default_dtype(torch.float32)


def saved() -> dict[tuple[str, str], str]:
    """Return the page's cells by function and column, with each refusal's sentence."""
    text = PAGE.read_text().split(START)[1].split(END)[0].strip()
    head, _, *lines = text.splitlines()
    columns = [name.strip() for name in head.strip("|").split("|")][1:]
    sentences = dict(re.findall(r"^(\d+)\. (.*)\.$", text, re.MULTILINE))
    cells = {}
    for line in lines:
        if not line.startswith("|"):
            continue
        function, *found = (part.strip() for part in line.strip("|").split("|"))
        for column, value in zip(columns, found, strict=True):
            number = re.fullmatch(r"refused \((\d+)\)", value)
            cells[function.strip("`"), column] = f"refused: {sentences[number[1]]}" if number else value
    return cells


def test_the_rows_are_the_public_functions() -> None:
    public = {name for name in pv.__all__ if inspect.isfunction(getattr(pv, name))}
    assert public <= set(FUNCTIONS) | set(NO_PAIR)
    assert not set(FUNCTIONS) & set(NO_PAIR)
    text = PAGE.read_text()
    assert all(f"`{name}`" in text for name in NO_PAIR)
    objectives = {f"objectives.{name}" for name in ("elbo", "iwae", "renyi", "beta_elbo")}
    assert objectives <= set(FUNCTIONS)


def test_every_cell_is_right_or_a_refusal_in_one_sentence() -> None:
    cells = saved()
    assert set(cells) == {(function, column) for function in FUNCTIONS for column in COLUMNS}
    wrong = {where: value for where, value in cells.items() if value != "right" and not value.startswith("refused: ")}
    assert wrong == {}


# A whole sweep takes most of a minute; these are the quick ones.
QUICK = ["log_terms", "site_terms", "objectives.iwae", "analytic_loss", "divergence_split", "em", "latent_means"]


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("function", QUICK)
def test_the_page_says_what_the_functions_do(function: str, column: str) -> None:
    assert cell(function, column) == saved()[function, column]
    assert len(pyro.get_param_store()) == 0


def test_a_wrong_number_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FUNCTIONS, "log_terms", lambda c: (c.exact + 1, c.exact))
    assert cell("log_terms", "mask").startswith("WRONG by 1")
