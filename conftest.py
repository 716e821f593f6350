"""Every test and every docstring's example starts from a seed and leaves nothing in Pyro's store."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pyro
import pytest


@pytest.fixture(autouse=True)
def _seeded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    pyro.set_rng_seed(0)
    # What asks for fresh entropy gets other numbers each time, but the same ones in every run of the suite.
    monkeypatch.setattr("pyro_vae.runtime.random_state.secrets.randbits", random.Random(0).getrandbits)
    yield
    assert len(pyro.get_param_store()) == 0, "parameters were left in Pyro's global store"
