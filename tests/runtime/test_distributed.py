"""Several processes take the steps of one, refuse together, and end together with a valid checkpoint."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import pyro_vae as pv
from pyro_vae.cli.runs import load_run
from pyro_vae.likelihood.shared import shared_log_likelihood
from pyro_vae.runtime.distributed import Processes
from pyro_vae.training.run_folder import load_state
from tests.support.processes_case import TRAJECTORIES, trajectory

# Far more than a start takes; only processes that hang meet it.
PATIENCE = 120
TRAIN = ("-m", "pyro_vae", "train", "vae", "--data", "digits", "--latent", "2", "--run-dir", "run")


def environment(**variables: str) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[2])} | variables


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder that two processes of ``processes_case.py`` under torchrun leave."""
    folder = tmp_path_factory.mktemp("processes")
    torchrun = (sys.executable, "-W", "error", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    done = subprocess.run(
        [*torchrun, str(Path(__file__).parents[1] / "support" / "processes_case.py"), str(folder)],
        env=environment(PYTHONWARNINGS="error"),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    (folder / "printed.txt").write_text(done.stdout + done.stderr)
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, Any]]:
    """Return what each of the two processes found."""
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", TRAJECTORIES)
def test_two_processes_are_one_with_twice_the_batch(name: str, found: list[dict[str, Any]]) -> None:
    one = trajectory(**TRAJECTORIES[name])
    for own in found:
        # Twenty steps of sums over a few data in another order; the aim is 1e-8.
        torch.testing.assert_close(own[name]["losses"], one["losses"], rtol=1e-12, atol=0)
        torch.testing.assert_close(own[name]["state"], one["state"], rtol=1e-12, atol=0)
    # Weight decay would shrink it if it had a gradient, be it of zero.
    assert torch.equal(one["state"]["idle"], torch.ones(2))
    assert torch.equal(found[0][name]["state"]["idle"], torch.ones(2))


def test_a_resumed_run_equals_an_unbroken_one_in_every_process(found: list[dict[str, Any]]) -> None:
    states = [own["resumed"][part] for own in found for part in ("unbroken", "resumed")]
    for name, value in states[0].items():
        assert all(torch.equal(value, state[name]) for state in states[1:]), name


def test_what_one_process_knows_all_of_them_say(found: list[dict[str, Any]]) -> None:
    first, second = (own["refusals"] for own in found)
    assert first == second
    assert "processes were given different data" in first["data"]
    assert "already holds a run" in first["folder"]
    assert first["batch"] == "batch_size is 32 in 2 processes; there are 32 training data"
    # The overflowing datum lies in the batch of one process only.
    assert "the loss is not finite in epoch 1, at z, x; the batch is in" in first["finite"]


def test_evaluation_is_shared_and_put_together_in_order(found: list[dict[str, Any]]) -> None:
    for own in found:
        result = own["likelihoods"]
        torch.testing.assert_close(result["estimate"], result["exact"], rtol=1e-10, atol=1e-10)
        assert result["curve"].shape == (3, 9)


def test_shares_are_the_batch() -> None:
    rows = torch.randperm(11)
    shares = [Processes(rank, 4).share(rows) for rank in range(4)]
    assert torch.equal(torch.cat(shares), rows)
    assert [len(share) for share in shares] == [3, 3, 3, 2]


def test_one_process_is_left_alone() -> None:
    alone = Processes()
    assert alone.seed(7, epoch=3) == 7
    assert alone.gather("x") == ["x"]
    assert len({Processes(rank, 3).seed(7, epoch) for rank in range(3) for epoch in range(5)}) == 15


def test_more_processes_than_data_are_refused() -> None:
    with pytest.raises(ValueError, match="there are 2 data for 3 processes"):
        shared_log_likelihood(Processes(0, 3), pv.log_likelihood, torch.zeros(2, 4), seed=0)


def test_the_command_line_prints_and_writes_once(folder: Path, found: list[dict[str, Any]]) -> None:
    # Sampling is not shared out, and says so.
    assert [own["commands"] for own in found] == [[0, 0, 2], [0, 0, 2]]
    printed = (folder / "printed.txt").read_text()
    assert printed.count("report:") == 2
    assert printed.count("particles per datum, K         2") == 1
    assert "Warning" not in printed
    assert len((folder / "run" / "metrics.jsonl").read_text().splitlines()) == 1
    assert '"data": 21' in (folder / "run" / "log_likelihood.json").read_text()


def launch(*arguments: str, folder: Path) -> list[subprocess.Popen[str]]:
    """Start two processes as torchrun does, without its habit of ending one when the other has failed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    started = []
    for rank in ("0", "1"):
        own = environment(RANK=rank, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        with (folder / f"{rank}.txt").open("w") as output:
            started.append(
                subprocess.Popen(
                    [sys.executable, *arguments], cwd=folder, env=own, stdout=output, stderr=output, text=True
                )
            )
    return started


def test_a_killed_process_ends_the_run_with_a_valid_checkpoint(tmp_path: Path) -> None:
    started = launch(*TRAIN, "--epochs", "100000", folder=tmp_path)
    metrics, end = tmp_path / "run" / "metrics.jsonl", time.monotonic() + PATIENCE
    try:
        while time.monotonic() < end and not (metrics.exists() and len(metrics.read_text().splitlines()) >= 2):
            assert all(process.poll() is None for process in started), (tmp_path / "0.txt").read_text()
            time.sleep(0.05)
        started[1].send_signal(signal.SIGKILL)
        assert started[0].wait(PATIENCE) == 1
    finally:
        for process in started:
            process.kill()
            process.wait()
    said = (tmp_path / "0.txt").read_text()
    assert "Traceback" not in said
    assert "another process of this run has ended or cannot be reached" in said
    done = len(metrics.read_text().splitlines())
    assert f"run holds epoch {done}: continue it by the same call" in said
    assert load_state(tmp_path / "run" / "checkpoint" / "state.pt", "VAE")["epoch"] == done
    pair, _ = load_run(tmp_path / "run")
    assert all(parameter.isfinite().all() for parameter in pair.parameters())
