"""Every test computes in float64, with Pyro's validation on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch

import pyro_vae as pv


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    pyro.enable_validation(True)
    yield
    torch.set_default_dtype(before)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Return the folder of real data sets, $PYRO_VAE_DATA or the one beside the checkout; skip where there is none."""
    root = Path(os.environ.get("PYRO_VAE_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    if not (root / "MNIST").is_dir():
        pytest.skip("needs the real data sets: set PYRO_VAE_DATA to their folder")
    return root


@pytest.fixture
def few_digits(monkeypatch: pytest.MonkeyPatch) -> pv.data.DataSet:
    """Put a few digits in the place of every data set."""
    digits = pv.data.load("digits")
    few = digits._replace(train=digits.train[:256], test=digits.test[:32], test_labels=digits.test_labels[:32])
    monkeypatch.setattr(pv.data, "load", lambda *_, **__: few)
    return few


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Treat the CPU as a device whose numbers are not read back at every step, and which makes graphs."""
    devices: dict[str, Any] = {}
    monkeypatch.setattr("pyro_vae.training.step.READ_LATER", {"cpu"})
    monkeypatch.setattr("pyro_vae.capture.cuda_graph.DEVICES", devices)
    return devices
