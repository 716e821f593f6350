"""Wrong variants of a pair are refused by the functions that would give a number; sound ones are not."""

import pyro
import pytest
import torch

from benchmarks.accuracy.mutations import CALLS, refusal
from benchmarks.accuracy.wrong_pairs import RIGHT, WRONG


@pytest.fixture(autouse=True)
def _single_precision() -> None:
    # The data and networks are those of users: float32. The fixture of all tests restores float64.
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_pair_is_refused(name: str, call: str) -> None:
    before = set(pyro.get_param_store())
    assert refusal(call, WRONG[name]())
    assert set(pyro.get_param_store()) == before


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", RIGHT)
def test_a_sound_pair_is_not(name: str, call: str) -> None:
    assert refusal(call, RIGHT[name]()) == ""


def test_there_are_forty_and_more() -> None:
    assert len(WRONG) >= 40
