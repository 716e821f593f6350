"""Find blocks of code that repeat an earlier one."""

from __future__ import annotations

import ast
import re

from benchmarks.house.modules import Module

__all__ = ["LEAST", "copies"]

LEAST = 6


def copies(found: dict[str, Module], least: int = LEAST) -> list[tuple[str, str, int]]:
    """Return the repeated blocks: place, place of the earlier block, number of lines.

    Lines are compared without indentation. Blank lines, comments, docstrings, imports and lines of brackets do not
    count. Each block is as long as it can be, and has at least ``least`` lines.
    """
    seen: dict[tuple[str, ...], tuple[str, int]] = {}
    blocks = []
    for module in found.values():
        lines = _lines(module)
        texts = [text for _, text in lines]
        path = module.path.as_posix()
        origin: tuple[str, int] | None = None
        for start in range(len(lines) - least + 1):
            window = tuple(texts[start : start + least])
            earlier = seen.setdefault(window, (path, start))
            if earlier == (path, start):
                origin = None
            elif origin is not None and earlier == (origin[0], origin[1] + 1):
                place, source, length = blocks[-1]
                blocks[-1] = (place, source, length + 1)
                origin = earlier
            else:
                source = _lines_of(found, earlier[0])[earlier[1]][0]
                blocks.append((f"{path}:{lines[start][0]}", f"{earlier[0]}:{source}", least))
                origin = earlier
    return blocks


def _lines_of(found: dict[str, Module], path: str) -> list[tuple[int, str]]:
    return _lines(next(module for module in found.values() if module.path.as_posix() == path))


def _lines(module: Module) -> list[tuple[int, str]]:
    """Return the lines that count, with their numbers."""
    left_out: set[int] = set()
    for node in ast.walk(module.tree):
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if is_text or isinstance(node, ast.Import | ast.ImportFrom):
            left_out.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines = enumerate(module.text.splitlines(), 1)
    kept = ((number, line.strip()) for number, line in lines if number not in left_out)
    return [(number, line) for number, line in kept if re.search(r"\w", line) and not line.startswith("#")]
