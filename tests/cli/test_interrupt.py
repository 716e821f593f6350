"""Ctrl-C while training: the exit status and the message say so, and the run continues where it stopped."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import pyro_vae as pv
from pyro_vae.cli.runs import load_run
from pyro_vae.training import run_folder, trainer
from pyro_vae.training.run_folder import load_state

TRAIN = (sys.executable, "-m", "pyro_vae", "train", "vae", "--data", "digits", "--run-dir", "run")
# Far more than a start or an epoch takes; only a run that hangs meets it.
PATIENCE = 300


@contextmanager
def interruptible() -> Iterator[None]:
    """Let children hear SIGINT: they ignore it where this process was started in the background and does."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def records(folder: Path) -> int:
    metrics = folder / "metrics.jsonl"
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0


def test_a_real_interrupt_is_resumed(tmp_path: Path) -> None:
    folder, printed = tmp_path / "run", tmp_path / "printed.txt"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with printed.open("w") as output, interruptible():
        process = subprocess.Popen(
            [*TRAIN, "--epochs", "100000"], cwd=tmp_path, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        end = time.monotonic() + PATIENCE
        while records(folder) < 2 and process.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        assert process.poll() is None, printed.read_text()
        assert records(folder) >= 2, f"no two epochs in {PATIENCE} s: {printed.read_text()}"
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == 130, printed.read_text()
    finally:
        process.kill()
        process.wait()
    done = records(folder)
    assert re.search(r"run holds epoch \d+: continue it .*--resume", printed.read_text())
    assert "Traceback" not in printed.read_text()
    # An interrupt between the files of one epoch leaves the state, written first, one epoch ahead of the record.
    assert load_state(folder / "checkpoint" / "state.pt", "VAE")["epoch"] in (done, done + 1)
    pair, _ = load_run(folder)
    assert all(parameter.isfinite().all() for parameter in pair.parameters())
    resumed = subprocess.run(
        [*TRAIN, "--resume", "--epochs", str(done + 1)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE,
    )
    assert resumed.returncode == 0, resumed.stderr
    assert records(folder) == done + 1


def interrupted_fit(folder: Path) -> str:
    """Train until the interrupt that a test has laid, and return what it says."""
    pair, x = pv.models.LinearGaussianVAE(3, 1), torch.randn(32, 3)
    with pytest.raises(KeyboardInterrupt) as interrupt:
        pv.fit(pair, x, epochs=9, batch_size=32, run_dir=folder, progress=False)
    return " ".join(getattr(interrupt.value, "__notes__", []))


def after(calls: int, function: Any) -> Any:
    """Return the function, interrupted at its call number ``calls`` + 1."""
    left = iter(range(calls))

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return function(*args, **kwargs)

    return wrapped


@pytest.mark.parametrize(
    ("module", "where"),
    [(run_folder, "save_state"), (run_folder, "save_tensors"), (run_folder, "write_text"), (trainer, "site_terms")],
    ids=["save_state", "save_tensors", "write_text", "site_terms"],
)
def test_the_message_names_the_epoch_that_the_folder_holds(
    module: ModuleType, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Every epoch is written, so that the fifth call is in a later one, while it is being followed or saved.
    monkeypatch.setattr(run_folder, "SHARE_OF_SAVING", 1.0)
    monkeypatch.setattr(module, where, after(4, getattr(module, where)))
    message = interrupted_fit(tmp_path / "run")
    held = load_state(tmp_path / "run" / "checkpoint" / "state.pt", "LinearGaussianVAE")["epoch"]
    assert f"run holds epoch {held}:" in message
    assert "--resume" in message


def test_an_interrupt_between_two_epochs_says_how_to_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rich.progress.Progress.update", after(2, lambda *_, **__: None))
    message = interrupted_fit(tmp_path / "run")
    assert "run holds epoch 3:" in message
    assert "--resume" in message
