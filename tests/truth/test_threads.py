"""Calls from several threads wait for each other: the bits of calls in sequence, and a process as it was."""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor

import pyro_vae as pv
from pyro_vae.models import LinearGaussianVAE

THREADS, CALLS = 4, 16
# Functions of the package that run no program: they read a distribution, a result or a number.
WITHOUT_PAIR = {"advance", "convex_kl_bound", "monte_carlo_kl", "variational_kl_bound"}


@pytest.fixture(autouse=True)
def _quick_switches() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def numbers(kind: int, pair: Any, x: Tensor) -> Tensor:
    """Return the seeded numbers of one of four functions."""
    if kind == 0:
        return pv.log_likelihood(pair, x, num_particles=5, seed=3, progress=False).per_datum
    if kind == 1:
        return pv.generate(pair, 6, seed=5).x
    if kind == 2:
        return pv.posterior(pair, x, num_particles=30, seed=7).log_weights
    trained = copy.deepcopy(pair)
    pv.fit(trained, x, epochs=2, batch_size=4, seed=1, progress=False)
    return torch.cat([p.detach().flatten() for p in trained.parameters()])


def test_numbers_are_those_of_calls_in_sequence() -> None:
    pairs = [LinearGaussianVAE(3, 1) for _ in range(2)]
    data = [pv.generate(pair, 8, seed=1).x for pair in pairs]
    alone = {(kind, i): numbers(kind, pairs[i], data[i]) for kind in range(4) for i in range(2)}

    def call(i: int) -> bool:
        kind, which = i % 4, i // 4 % 2
        return torch.equal(numbers(kind, pairs[which], data[which]), alone[kind, which])

    state = torch.get_rng_state()
    with ThreadPoolExecutor(THREADS) as pool:
        assert all(pool.map(call, range(CALLS)))
    assert not _PYRO_STACK
    assert torch.equal(torch.get_rng_state(), state)
    assert all(numbers(*of).equal(expected) for of, expected in _again(alone, pairs, data))


def _again(alone: dict[tuple[int, int], Tensor], pairs: list[Any], data: list[Tensor]) -> Iterator[Any]:
    return (((kind, pairs[i], data[i]), expected) for (kind, i), expected in alone.items())


def test_a_call_that_fails_lets_the_next_one_begin() -> None:
    pair = LinearGaussianVAE(3, 1)

    def call(i: int) -> bool:
        if i % 2:
            with pytest.raises(ValueError, match="NaN"):
                pv.log_likelihood(pair, torch.full((2, 3), torch.nan), num_particles=2, progress=False)
            return True
        return bool(pv.log_likelihood(pair, torch.zeros(2, 3), num_particles=2, seed=0, progress=False).mean < 0)

    with ThreadPoolExecutor(THREADS) as pool:
        assert all(pool.map(call, range(12)))
    assert not _PYRO_STACK


def public() -> Iterator[tuple[str, Callable[..., Any]]]:
    named = {name: getattr(pv, name) for name in pv.__all__} | {"check_pair": pv.testing.check_pair}
    return ((name, each) for name, each in named.items() if inspect.isfunction(each) and name not in WITHOUT_PAIR)


@pytest.mark.parametrize(("name", "function"), list(public()))
def test_every_public_function_that_runs_a_pair_waits(name: str, function: Any) -> None:
    assert function.__wrapped__.__name__ == name
