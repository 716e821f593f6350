"""Rows timed by turns in one run: their timings, the summary of these, its table and its bars."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from matplotlib.figure import Figure

from pyro_vae.report.markdown import markdown_table

# Of a row's turn: the seconds of each unit of work that counts.
Turn = Callable[[], list[float]]
Result = TypeVar("Result")
LEAST_ROUNDS = 3


def by_turns(turns: Mapping[str, Callable[[], list[Result]]], rounds: int, seconds: float) -> dict[str, list[Result]]:
    """Return what each row's turns gave; rounds are fewer, but three at least, where the seconds are used up."""
    taken: dict[str, list[Result]] = {name: [] for name in turns}
    deadline = time.perf_counter() + seconds
    for done in range(rounds):
        if done >= LEAST_ROUNDS and time.perf_counter() > deadline:
            break
        for name, turn in turns.items():
            taken[name] += turn()
    return taken


def timed(function: Callable[[], object]) -> float:
    """Return the seconds that a call takes, what it started on a CUDA device included."""
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def timings(step: Callable[[], object], count: int) -> list[float]:
    """Return the seconds of each of some steps after one that is not counted; on CUDA the mean of ten times as many.

    The first of a turn finds the caches full of another row's numbers. Waiting for a device after each step would add
    the time of launching it, which a training run spends while the device works on the steps before.
    """
    timed(step)
    if not torch.cuda.is_available():
        return [timed(step) for _ in range(count)]

    def many() -> None:
        for _ in range(10 * count):
            step()

    return [timed(many) / (10 * count)]


def summaries(
    taken: dict[str, list[float]], ours: str, first: dict[str, float], absent: dict[str, str]
) -> dict[str, dict[str, Any]]:
    """Return each row's median and quartiles in milliseconds, number of timings, and the median of ``ours`` over it.

    Args:
        taken: seconds by row, three of each at least.
        ours: the row that is compared with the others.
        first: seconds of the first unit of work, in which a row may record and compile.
        absent: rows that could not be timed, and why.
    """
    rows: dict[str, dict[str, Any]] = {}
    for name, seconds in taken.items():
        low, median, high = (1000 * q for q in statistics.quantiles(seconds, n=4))
        rows[name] = {
            "median_ms": round(median, 4),
            "quartiles_ms": [round(low, 4), round(high, 4)],
            "timings": len(seconds),
            "ours_over_it": round(1000 * statistics.median(taken[ours]) / median, 3),
        }
        if name in first:
            rows[name]["first_step_seconds"] = first[name]
    return rows | {name: {"absent": reason} for name, reason in absent.items()}


def table(rows: dict[str, dict[str, Any]], ours: str, work: str, unit: str = "ms") -> str:
    """Return the summaries as Markdown, from the fastest row to the slowest, ``work`` being what was timed."""
    header = [work, f"median {unit}", "quartiles", f"{ours} ÷ it", f"first {work}, s"]
    cells = []
    for name, row in sorted(rows.items(), key=lambda item: item[1].get("median_ms", 0.0)):
        if "absent" in row:
            cells.append([name, row["absent"], "", "", ""])
            continue
        median, low, high = (_in(unit, value) for value in (row["median_ms"], *row["quartiles_ms"]))
        ratio, first = f"{row['ours_over_it']:.2f}", str(row.get("first_step_seconds", ""))
        cells.append([name, f"{median:.3f}", f"{low:.3f}–{high:.3f}", ratio, first])
    return markdown_table(header, cells)


def bars(cases: dict[str, Any], ours: str, work: str, unit: str = "ms") -> Figure:
    """Draw each case's medians as bars, with their quartiles; rows whose name begins as that of ``ours`` stand out."""
    columns = 2
    lines = math.ceil(len(cases) / columns)
    figure = Figure(figsize=(5.5 * columns, 3.2 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for ax in axes[len(cases) :]:
        ax.axis("off")
    for ax, (name, rows) in zip(axes, cases.items(), strict=False):
        shown = sorted(((k, v) for k, v in rows.items() if "absent" not in v), key=lambda item: -item[1]["median_ms"])
        medians = [_in(unit, v["median_ms"]) for _, v in shown]
        lows, highs = ([_in(unit, v["quartiles_ms"][i]) for _, v in shown] for i in (0, 1))
        # The median of few timings may be a quartile up to rounding.
        spread = [[max(0.0, m - low) for m, low in zip(medians, lows, strict=True)]]
        spread.append([max(0.0, high - m) for m, high in zip(medians, highs, strict=True)])
        colours = ["tab:orange" if k.startswith(ours.split(",")[0]) else "tab:blue" for k, _ in shown]
        ax.barh([k for k, _ in shown], medians, xerr=spread, color=colours)
        for i, (median, high) in enumerate(zip(medians, highs, strict=True)):
            ax.text(high, i, f"  {median:.2f}", va="center", fontsize=8)
        ax.set_title(name)
        ax.set_xlim(0, 1.25 * max(highs))
        ax.set_xlabel(f"{unit} per {work} (median, quartiles)")
    return figure


def _in(unit: str, milliseconds: float) -> float:
    return milliseconds / {"ms": 1, "s": 1000}[unit]
