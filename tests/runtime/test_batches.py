"""Batches are the rows that were asked for, whether the data lie on the device or are streamed to it."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.runtime.batches import Batches

CPU = torch.device("cpu")


@pytest.mark.parametrize("streamed", [False, True])
def test_batches_are_rows(streamed: bool) -> None:
    x, condition = torch.randn(10, 2, 3), torch.arange(10)
    parts = [torch.tensor([7, 0, 3]), torch.tensor([], dtype=torch.long), torch.tensor([9])]
    batches = Batches((x, condition), CPU, streamed=streamed)
    assert len(batches) == 10
    for _ in range(2):
        given = list(batches(parts))
        assert [[len(tensor) for tensor in batch] for batch in given] == [[3, 3], [0, 0], [1, 1]]
        for part, (some_x, some_condition) in zip(parts, given, strict=True):
            assert torch.equal(some_x, x[part])
            assert torch.equal(some_condition, part)


def test_a_file_too_large_for_memory_may_be_mapped(tmp_path: Path) -> None:
    x = torch.from_file(str(tmp_path / "x.bin"), shared=True, size=40, dtype=torch.float64).view(10, 4)
    x.copy_(torch.randn(10, 4))
    batches = Batches((x,), CPU)
    assert batches.data[0].data_ptr() == x.data_ptr()


def test_an_error_in_the_thread_is_the_callers() -> None:
    with pytest.raises(IndexError):
        list(Batches((torch.zeros(3),), CPU, streamed=True)([torch.tensor([0]), torch.tensor([5])]))


def test_streamed_training_is_the_same_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    def trained() -> list[Tensor]:
        pair = copy.deepcopy(start)
        pv.fit(pair, x, epochs=2, batch_size=16, progress=False, device="cpu")
        return list(pair.parameters())

    x = torch.randn(50, 4)
    start = pv.models.VAE((4,), pv.StandardNormal(2), encoder=nn.Linear(4, 4), decoder=nn.Linear(2, 4))
    resident = trained()
    monkeypatch.setattr("pyro_vae.training.fit.Batches", partial(Batches, streamed=True))
    assert all(torch.equal(a, b) for a, b in zip(resident, trained(), strict=True))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_data_larger_than_the_device_may_hold_are_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    x, device = torch.randn(100, 4), torch.device("cuda")
    assert not Batches((x,), device).streamed
    monkeypatch.setattr("pyro_vae.runtime.batches.SHARE_OF_MEMORY", 0.0)
    batches = Batches((x,), device)
    assert batches.streamed
    assert batches.data[0].device == CPU
    parts = torch.randperm(100).split(7)
    assert all(torch.equal(batch.cpu(), x[part]) for (batch,), part in zip(batches(parts), parts, strict=True))
