"""Damage is noticed, a full disk costs no file, and files have the user's own mode."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.accuracy.reliability import room
from pyro_vae.runtime.files import (
    checksum,
    read_tensors,
    remove_unfinished,
    write_tensors,
    write_text,
    write_whole,
)
from pyro_vae.training.run_folder import load_state, save_state

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([True, False]), "c": torch.tensor(2.5)}
METADATA = {"format": "pyro_vae", "model": "VAE"}


def test_tensors_come_back(tmp_path: Path) -> None:
    write_tensors(tmp_path / "t", TENSORS, METADATA)
    tensors, metadata = read_tensors(tmp_path / "t")
    assert metadata == METADATA
    assert checksum(tensors) == checksum(TENSORS)


def flipped(path: Path, whole: bytes, place: int, bit: int) -> None:
    path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << bit)]) + whole[place + 1 :])


def test_no_flipped_bit_changes_tensors_unnoticed(tmp_path: Path) -> None:
    path = tmp_path / "t"
    write_tensors(path, TENSORS, METADATA)
    whole, refused = path.read_bytes(), 0
    for place in range(len(whole)):
        flipped(path, whole, place, place % 8)
        try:
            tensors, _ = read_tensors(path)
        except ValueError as error:
            assert str(path) in str(error)  # noqa: PT017 (some flips do no harm)
            refused += 1
        else:
            # What is left are the names of entries that nobody reads.
            assert checksum(tensors) == checksum(TENSORS)
    # All of the numbers' own bytes, and nearly all of the header's.
    assert refused > 0.9 * len(whole)


STATE = {"model": "VAE", "epoch": 3, "metrics": [{"loss": 0.1}] * 3, "pair": {"w": torch.randn(5)}, "best": None}


def test_no_flipped_bit_changes_a_state_unnoticed(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    save_state(STATE, path)
    whole = path.read_bytes()
    expected = checksum(load_state(path, "VAE"))
    refused = 0
    for place in range(0, len(whole), 3):
        flipped(path, whole, place, place % 8)
        try:
            state = load_state(path, "VAE")
        except ValueError as error:
            assert str(path) in str(error)  # noqa: PT017 (padding holds nothing)
            refused += 1
        else:
            assert {name: checksum(state[name]) for name in STATE} == {name: checksum(STATE[name]) for name in STATE}
    assert expected == checksum(STATE)
    assert refused > 0


MIB = torch.zeros(2**18, dtype=torch.float32)
WRITERS: dict[str, Any] = {
    "tensors": lambda path: write_tensors(path, {"a": MIB}, {}),
    "state": lambda path: save_state({"a": MIB}, path),
    "text": lambda path: write_text(path, "x" * 2**20),
    "bytes": lambda path: write_whole(path, lambda file: file.write(bytes(2**20))),
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("size", [0, 100, 4096, 2**19])
def test_a_full_disk_is_one_sentence_and_costs_no_file(name: str, size: int, tmp_path: Path) -> None:
    path = tmp_path / "file"
    with room(size), pytest.raises(OSError, match="the disk is full: nothing was written") as raised:
        WRITERS[name](path)
    assert raised.value.__suppress_context__
    assert list(tmp_path.iterdir()) == []
    path.write_text("before")
    with room(size), pytest.raises(OSError, match="the disk is full: what it held before is intact"):
        WRITERS[name](path)
    assert [each.name for each in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "before"


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
@pytest.mark.parametrize("name", WRITERS)
def test_files_have_the_users_mode(name: str, mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        WRITERS[name](tmp_path / "file")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o666 & ~mask


def test_unfinished_files_are_removed_and_others_left(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    left = [tmp_path / "config.json", tmp_path / ".hidden", tmp_path / ".gitignore", tmp_path / ".0123456g.txt"]
    gone = [tmp_path / ".0123abcd.report.md", tmp_path / "checkpoint" / ".deadbeef.state.pt"]
    for path in (*left, *gone):
        path.write_text("")
    remove_unfinished(tmp_path)
    assert all(path.exists() for path in left)
    assert not any(path.exists() for path in gone)
