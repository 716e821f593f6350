"""Count words and sentences in the package's docstrings."""

from __future__ import annotations

import ast
import re
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile

from benchmarks.house.modules import Module

__all__ = ["BANNED", "STARTS", "English", "english", "sentences"]

# Phrases whose rate is limited, and words that begin no sentence.
BANNED = ("what", "own", "so that")
STARTS = ("What", "How", "Where", "That")
# Fragments count as words but not as sentences: those of one or two words, and those that begin in lower case.
SHORTEST = 3
# An entry of Args, Attributes or Raises: a name, maybe several, and a colon.
ENTRY = re.compile(r"^\s*[\w*`. ,/|\[\]]{1,60}:\s+(?=\S)")
HEADING = re.compile(r"^\s*(Args|Attributes|Returns|Raises|Yields|Reference|References|Example|Examples|Note):\s*$")
END = re.compile(r"(?<!et al\.)(?<!e\.g\.)(?<!i\.e\.)(?<!eq\.)(?<=[.!?])\s+(?=[A-Z`(\"*])")


@dataclass(frozen=True)
class English:
    """The docstrings in numbers.

    Attributes:
        words: number of words.
        median: words in a sentence, median.
        percentile_90: words in a sentence, 90th percentile.
        per_10_000: of each banned phrase, its number in 10 000 words.
        starts: the sentences that begin with a banned word.
    """

    words: int
    median: float
    percentile_90: float
    per_10_000: dict[str, float]
    starts: list[str]


def english(found: dict[str, Module]) -> English:
    """Count over all docstrings of the modules, without doctests, headings and references."""
    every = [(module, sentence) for module in found.values() for sentence in sentences(module)]
    lengths = [len(_words(sentence)) for _, sentence in every if not sentence[0].islower()]
    lengths = [length for length in lengths if length >= SHORTEST]
    words = sum(len(_words(sentence)) for _, sentence in every)
    text = " ".join(sentence.lower() for _, sentence in every)
    rates = {phrase: round(10_000 * len(re.findall(rf"\b{phrase}\b", text)) / words, 1) for phrase in BANNED}
    begins = re.compile(rf"({'|'.join(STARTS)})\b")
    starts = [f"{module.path.as_posix()}: {sentence}" for module, sentence in every if begins.match(sentence)]
    return English(words, statistics.median(lengths), statistics.quantiles(lengths, n=10)[-1], rates, starts)


def sentences(module: Module) -> Iterator[str]:
    """Yield the sentences of every docstring, those of attributes included."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            for paragraph in _paragraphs(node.value.value):
                yield from (part for part in END.split(paragraph) if _words(part))


def _paragraphs(docstring: str) -> Iterator[str]:
    """Yield paragraphs and entries, each on one line, without doctests, headings and references."""
    lines = iter(docstring.expandtabs().splitlines())
    current: list[str] = []
    for line in lines:
        stripped = line.strip()
        heading, entry = HEADING.match(line), ENTRY.match(line)
        if stripped.startswith(">>>"):
            list(takewhile(str.strip, lines))
        elif heading and heading[1].startswith("Reference"):
            list(takewhile(lambda _: True, lines))
        elif stripped and not heading and not entry and not stripped.startswith(("* ", "- ")):
            current.append(stripped)
            continue
        if current:
            yield " ".join(current)
        current = [line[entry.end() :].strip()] if entry else [stripped] if stripped.startswith(("* ", "- ")) else []
    if current:
        yield " ".join(current)


def _words(sentence: str) -> list[str]:
    return re.findall(r"[^\W\d_][\w’'\-]*", sentence)
