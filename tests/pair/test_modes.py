"""A pair runs in a mode, from a seed, and is left as it was."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.pair.modes import chunks, drawing, evaluation, in_mode, rehearsal


def mixed_pair() -> pv.models.VAE:
    """Return a pair in training mode with one module in evaluation mode and batch normalisation."""
    encoder = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
    pair = pv.models.VAE((4,), pv.StandardNormal(2), encoder=encoder)
    encoder[0].eval()
    return pair


def flags(pair: pv.Pair) -> list[bool]:
    return [module.training for module in pair.modules()]


@pytest.mark.parametrize("training", [True, False])
def test_flags_are_restored_one_by_one_also_after_an_error(training: bool) -> None:
    pair, seen = mixed_pair(), []
    before = flags(pair)

    def fail() -> None:
        with in_mode(pair, training=training):
            seen.extend(flags(pair))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    # A layer in evaluation mode inside a pair in training mode was put there on purpose, and stays.
    assert seen == (before if training else [False] * len(before))
    assert flags(pair) == before


def test_a_seed_decides_the_draws_and_the_callers_state_stays() -> None:
    pair = mixed_pair()
    state, drawn = torch.get_rng_state(), []
    for mode in (drawing, rehearsal):
        for seed in (1, 1, 2):
            with mode(pair, seed):
                drawn.append(torch.randn(3))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[1], drawn[2])
    assert torch.equal(drawn[0], drawn[3])


def test_draws_are_ordinary_tensors_without_a_gradient() -> None:
    pair, x = mixed_pair(), torch.randn(3, 4)
    with evaluation(pair):
        assert pv.log_terms(pair, x).log_lik.is_inference()
    for mode in (drawing, rehearsal):
        with mode(pair, 0):
            log_lik = pv.log_terms(pair, x).log_lik
        assert not log_lik.is_inference()
        assert not log_lik.requires_grad


class Counts(nn.Module):
    """Assign one buffer, and change another in place, at every call in training mode."""

    seen: Tensor
    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()), persistent=False)
        self.register_buffer("total", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen = self.seen + 1
            self.total += len(x)
        return x


def test_a_rehearsal_restores_every_buffer() -> None:
    counts = Counts()
    pair = pv.models.VAE((4,), pv.StandardNormal(2), encoder=nn.Sequential(counts, nn.Linear(4, 4)))
    tensors = counts.seen, counts.total
    with rehearsal(pair, 0):
        pv.log_terms(pair, torch.randn(3, 4))
        assert (float(counts.seen), float(counts.total)) == (1, 3)
    assert counts.seen is tensors[0]
    assert counts.total is tensors[1]
    assert (float(counts.seen), float(counts.total)) == (0, 0)


@pytest.mark.parametrize("size", [1, 2, 5, 9])
def test_chunks_hold_every_row_once_with_its_condition(size: int) -> None:
    x, index = torch.randn(5, 2), torch.arange(5)
    parts = list(chunks((x, index), size))
    assert all(len(part[0]) == len(part[1]) <= size for part in parts)
    assert torch.equal(torch.cat([part[0] for part in parts]), x)
    assert torch.equal(torch.cat([part[1] for part in parts]), index)
