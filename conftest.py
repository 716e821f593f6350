"""Every test and every docstring's example starts from a seed and leaves nothing in Pyro's store."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pyro
import pytest
import torch

# The tensors here are small: a second thread costs more than it gives. The variable is for processes that tests start.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def _seeded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    pyro.set_rng_seed(0)
    # Calls for fresh entropy return different numbers, but the same sequence in every run of this test.
    monkeypatch.setattr("pyro_vae.runtime.random_state.secrets.randbits", random.Random(0).getrandbits)
    yield
    assert len(pyro.get_param_store()) == 0, "parameters were left in Pyro's global store"
