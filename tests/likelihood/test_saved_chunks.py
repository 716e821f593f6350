"""An evaluation that stopped goes on to the same bits, and nothing of another one is ever taken for its own."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

import pyro_vae as pv
from tests.support.off_guides import WrongScale

# The estimator itself, from the pair's own guide.
log_likelihood = partial(pv.log_likelihood, proposal="guide")

SETTINGS: dict[str, Any] = {"num_particles": 30, "seed": 3}


@pytest.fixture(autouse=True)
def _short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut 60 data into three chunks."""
    monkeypatch.setattr("pyro_vae.likelihood.importance.CHUNK", 23)


class Counted(WrongScale):
    """Counts the runs of its model."""

    runs = 0

    def model(self, x: Tensor) -> None:
        type(self).runs += 1
        super().model(x)


def stop_after(chunks: int) -> Callable[[int, int], None]:
    calls = iter(range(chunks - 1))

    def progress(done: int, total: int) -> None:
        if next(calls, None) is None:
            raise KeyboardInterrupt

    return progress


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


def assert_equal(first: pv.LogLikelihood, second: pv.LogLikelihood) -> None:
    for name, field in first._asdict().items():
        other = getattr(second, name)
        same = torch.equal(field, other) if isinstance(field, Tensor) else field == other
        assert same, name


@pytest.mark.parametrize("estimate", [log_likelihood, pv.naive_log_likelihood])
@pytest.mark.parametrize("stop", [1, 2])
def test_an_interrupted_evaluation_goes_on_to_the_bits_of_an_unbroken_one(
    estimate: Any, stop: int, tmp_path: Path
) -> None:
    pair, x = Counted(1.4), torch.randn(60, 3)
    unbroken = estimate(pair, x, **SETTINGS)
    with pytest.raises(KeyboardInterrupt) as interrupt:
        estimate(pair, x, **SETTINGS, run_dir=tmp_path, progress=stop_after(stop))
    assert len(files(tmp_path)) == stop
    assert f"{tmp_path}" in interrupt.value.__notes__[0]
    assert "goes on from there" in interrupt.value.__notes__[0]
    seen: list[tuple[int, int]] = []
    continued = estimate(pair, x, **SETTINGS, run_dir=tmp_path, progress=lambda *done: seen.append(done))
    assert_equal(continued, unbroken)
    assert len(files(tmp_path)) == len(seen) > stop
    assert seen[-1] == (60, 60)
    # Saved chunks are not drawn again: the last call only inspects the data and measures a block.
    Counted.runs = 0
    assert_equal(estimate(pair, x, **SETTINGS, run_dir=tmp_path), unbroken)
    again, Counted.runs = Counted.runs, 0
    estimate(pair, x, **SETTINGS)
    assert Counted.runs == again + 60


def test_chunks_are_resumed_with_another_budget(tmp_path: Path) -> None:
    pair, x = Counted(1.4), torch.randn(60, 3)
    whole = log_likelihood(pair, x, **SETTINGS, run_dir=tmp_path)
    before = {path: path.read_bytes() for path in files(tmp_path)}
    assert_equal(log_likelihood(pair, x, **SETTINGS, memory=200_000, run_dir=tmp_path), whole)
    assert {path: path.read_bytes() for path in files(tmp_path)} == before


def test_chunks_of_version_one_are_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair, x = WrongScale(1.4), torch.randn(20, 3)
    with monkeypatch.context() as patched:
        patched.setattr("pyro_vae.likelihood.saved_chunks.FORMAT", "pyro_vae log-likelihood chunk")
        log_likelihood(pair, x, **SETTINGS, run_dir=tmp_path)
    log_likelihood(pair, x, **SETTINGS, run_dir=tmp_path)
    assert len(files(tmp_path)) == len({path.parent for path in files(tmp_path)}) == 2


def test_nothing_of_another_evaluation_is_used(tmp_path: Path) -> None:
    pair, x = WrongScale(1.4), torch.randn(30, 3)
    log_likelihood(pair, x, **SETTINGS, run_dir=tmp_path)
    trained, attribute = copy.deepcopy(pair), copy.deepcopy(pair)
    with torch.no_grad():
        trained.bias += 1e-15
    # The same parameters, another program.
    attribute.factor = 1.3
    others: list[tuple[Any, Any, Tensor, dict[str, Any]]] = [
        (log_likelihood, trained, x, {}),
        (log_likelihood, attribute, x, {}),
        (log_likelihood, pair, x.clone().index_fill_(0, torch.tensor([29]), 0.5), {}),
        (log_likelihood, pair, x[:29], {}),
        (log_likelihood, pair, x, {"num_particles": 31}),
        (log_likelihood, pair, x, {"seed": 4}),
        (pv.naive_log_likelihood, pair, x, {}),
    ]
    for estimate, other, data, changed in others:
        settings = SETTINGS | changed
        before = len(files(tmp_path))
        assert_equal(estimate(other, data, **settings, run_dir=tmp_path), estimate(other, data, **settings))
        assert len(files(tmp_path)) > before


def test_damaged_and_foreign_files_are_named(tmp_path: Path) -> None:
    pair, x = WrongScale(1.4), torch.randn(60, 3)
    whole = log_likelihood(pair, x, **SETTINGS, run_dir=tmp_path / "run")
    first, second, *_ = files(tmp_path / "run")
    log_likelihood(pair, x, **(SETTINGS | {"seed": 4}), run_dir=tmp_path / "other")
    kept = second.read_bytes()

    def refused(message: str) -> None:
        with pytest.raises(ValueError, match=message) as error:
            log_likelihood(pair, x, **SETTINGS, run_dir=tmp_path / "run")
        assert str(second) in str(error.value)
        assert "delete it" in str(error.value)

    second.write_bytes(kept[:-8])
    refused("is damaged")
    second.write_bytes(b"")
    refused("is damaged")
    shutil.copy(files(tmp_path / "other")[1], second)
    refused("was not written by this evaluation")
    safetensors.torch.save_file({"log_mean": torch.zeros(3)}, second)
    refused("was not written by this evaluation")
    # Of this evaluation, but of other data.
    shutil.copy(first, second)
    refused("holds other data than")
    second.unlink()
    assert_equal(log_likelihood(pair, x, **SETTINGS, run_dir=tmp_path / "run"), whole)
    assert second.exists()


def test_chunks_without_a_seed_could_not_be_continued(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pass seed=0"):
        log_likelihood(WrongScale(1.4), torch.randn(4, 3), run_dir=tmp_path)


def test_an_interrupt_without_a_folder_says_how_far_it_came() -> None:
    with pytest.raises(KeyboardInterrupt) as interrupt:
        log_likelihood(WrongScale(1.4), torch.randn(60, 3), **SETTINGS, progress=stop_after(1))
    assert "of 60 data evaluated" in interrupt.value.__notes__[0]
    assert "keeps" not in interrupt.value.__notes__[0]
