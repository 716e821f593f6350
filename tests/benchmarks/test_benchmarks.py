"""The harness of the benchmarks: turns, summaries, slopes, scripts that answer, and where an epoch ends."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import pyro_vae as pv
from benchmarks import render
from benchmarks.harness import side_by_side
from benchmarks.harness.peers import launch
from benchmarks.speed import fit_epochs, growth, scaling, scaling_run


def test_rows_take_turns_and_three_rounds_at_least() -> None:
    order: list[str] = []

    def turn(name: str) -> Any:
        return lambda: [order.append(name), float(len(order))][1:]

    taken = side_by_side.by_turns({"a": turn("a"), "b": turn("b")}, rounds=5, seconds=-1.0)
    assert order == ["a", "b"] * 3
    assert taken == {"a": [1.0, 3.0, 5.0], "b": [2.0, 4.0, 6.0]}


def test_a_row_is_compared_by_medians() -> None:
    taken = {"ours": [0.001, 0.002, 0.009], "theirs": [0.008, 0.004, 0.001]}
    rows = side_by_side.summaries(taken, "ours", {"ours": 1.5}, {"other": "absent: no network"})
    assert [rows[name]["median_ms"] for name in taken] == [2.0, 4.0]
    assert [rows[name]["ours_over_it"] for name in taken] == [1.0, 0.5]
    assert rows["theirs"]["quartiles_ms"] == [1.0, 8.0]
    table = side_by_side.table(rows, "ours", "epoch", "s").splitlines()
    assert table[0] == "| epoch | median s | quartiles | ours ÷ it | first epoch, s |"
    assert "| ours | 0.002 | 0.001–0.009 | 1.00 | 1.5 |" in table
    assert any(line.startswith("| other | absent: no network |") for line in table)
    # A row that could not be timed has no bar.
    (axes, _) = side_by_side.bars({"case": rows}, "ours", "epoch").axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["theirs", "ours"]


@pytest.mark.parametrize("power", [0.0, 1.0, 1.5])
def test_slopes_are_the_powers_of_a_power_law(power: float) -> None:
    seconds = {size: [0.1 * size**power] * 3 for size in (1, 4, 32)}
    found = growth.grown(seconds)
    # As many digits as are saved.
    assert (found["slope"], found["last_slope"]) == (power, power)


SCRIPT = """
import sys
from benchmarks.harness.peers.turns import turns
for number in turns({"device": "cpu", "sizes": sys.argv[1:]}, 0.0):
    if len(sys.argv) > 2:
        raise ValueError("two sizes are too many")
"""


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the name of a module that answers turns, as a peer's script does."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "answers_turns.py").write_text(SCRIPT)
    return "answers_turns"


def test_a_script_answers_each_turn_with_its_seconds(script: str) -> None:
    with launch.running({"peer": lambda: launch.Peer(Path(sys.executable), script, threads=1)}) as (running, absent):
        peer = running["peer"]
        assert peer.said["sizes"] == ["1"]
        assert peer.said["first_seconds"] > 0
        assert all(0 <= seconds < 60 for _ in range(3) for seconds in peer())
    assert absent == {}
    assert peer.process.returncode is not None


def test_a_script_that_ends_says_why(script: str) -> None:
    starts = {"peer": lambda: launch.Peer(Path(sys.executable), script, 7, threads=1)}
    with launch.running(starts) as (running, _), pytest.raises(RuntimeError, match="two sizes are too many"):
        running["peer"]()
    missing = {"peer": lambda: launch.Peer(Path(sys.executable), "no_such_script", threads=1)}
    with launch.running(missing) as (running, absent):
        assert running == {}
        assert "No module named" in absent["peer"]


def test_an_epoch_is_all_that_fit_does_between_two_of_them() -> None:
    def epochs() -> Iterator[None]:
        while True:
            asked.append(len(asked))
            yield

    asked: list[int] = []
    pair = pv.models.LinearGaussianVAE(3, 1)
    pair.between = fit_epochs.Between(epochs())
    pair.clock = scaling_run.Clock()
    run = pv.fit(pair, torch.randn(64, 3), epochs=4, batch_size=32, progress=False)
    assert asked == [0, 1, 2, 3]
    ends = [record["monitor"]["clock"] for record in run.metrics]
    for record, (before, after) in zip(run.metrics[1:], pairwise(ends), strict=True):
        assert after - before > record["seconds"]


def test_processes_share_a_batch_or_have_one_each() -> None:
    rows = scaling.rows([1, 2, 4])
    assert rows[scaling.ONE] == (1, 1, 128)
    assert all(count * batch == 128 for name, (count, _, batch) in rows.items() if "together" in name)
    assert sum("together" in name for name in rows) == sum("each" in name for name in rows) == 2
    assert scaling.rows([1]) == {scaling.ONE: (1, 1, 128)}


def record(**results: Any) -> dict[str, Any]:
    versions, machine = {"torch": "1", "pyro": "2"}, {"cores": 2, "processor": "x86_64"}
    return {"results": results, "versions": versions, "machine": machine, "seconds": 1.0, "peak_memory_mib": 1}


@pytest.mark.parametrize(("name", "ours"), [("epoch", "fit, captured, compiled"), ("scaling", "1 process")])
def test_saved_timings_are_rendered(name: str, ours: str) -> None:
    rows = side_by_side.summaries({ours: [1.0] * 3, "another": [4.0] * 3}, ours, {}, {})
    saved = record(cases={"one": rows}, data=60000, batch=128, threads=2, evaluated=2000, num_particles=100)
    text = getattr(render, name)(saved)
    assert "| another | 4.000 | 4.000–4.000 | 0.25 |" in text
    assert "60 000 data" in text


def test_growth_is_rendered_with_its_slopes() -> None:
    axis = {"work": "epoch", **growth.grown({10: [0.001] * 3, 100: [0.01] * 3})}
    text = render.growth(record(axes={"data": axis}))
    assert "| data, per epoch | 10: 1.00, 100: 10.00 | 1.00 | 1.00 |" in text
