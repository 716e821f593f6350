"""Install the peers into a throw-away environment and run their scripts there. The package does not depend on them.

A peer's script takes its sizes as arguments, prints one JSON line when it is ready, and then answers every line that it
reads with the seconds of a turn, as a JSON list.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[3]
NAMES = {"numpyro": "NumPyro, jitted epoch", "pythae": "pythae's trainer"}
SCRIPTS = {
    "step": {"numpyro": "numpyro_step", "pythae": "pythae_trainer"},
    "epoch": {"numpyro": "numpyro_epoch", "pythae": "pythae_trainer"},
}
INSTALL_SECONDS = 600
READY_SECONDS = 300


@contextmanager
def installed() -> Iterator[dict[str, tuple[Path, str | None]]]:
    """Install every peer into one environment; yield its Python and why a peer is absent, None where it is not."""
    with _environment() as python:
        yield {name: (python, _install(python, name)) for name in NAMES}


@contextmanager
def _environment() -> Iterator[Path]:
    """Yield the Python of a fresh virtual environment that sees this one's packages, torch above all."""
    with TemporaryDirectory(prefix="peers-") as folder:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True, timeout=INSTALL_SECONDS)
        python = Path(folder) / "bin" / "python"
        where = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
        site = subprocess.run(where, check=True, capture_output=True, text=True).stdout.strip()
        (Path(site) / "parent.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
        yield python


def _install(python: Path, package: str) -> str | None:
    """Install a peer; return why that was not possible, None where it was."""
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", package]
    if package == "numpyro" and torch.version.cuda and torch.cuda.is_available():
        # JAX brings CUDA with it, to be of the version that torch's driver takes.
        command.append(f"jax[cuda{torch.version.cuda.split('.')[0]}]")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_SECONDS)
    except subprocess.TimeoutExpired:
        return f"absent: not installed within {INSTALL_SECONDS} s"
    return None if done.returncode == 0 else f"absent: {_last_line(done.stderr)}"


def environment(threads: int | str) -> dict[str, str]:
    """Return the variables of a script's process: this project importable from any folder, and so many threads."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)}


@contextmanager
def running(starts: dict[str, Callable[[], Peer]]) -> Iterator[tuple[dict[str, Peer], dict[str, str]]]:
    """Start scripts one after the other; yield those that run, and why the others do not. All end afterwards."""
    started: dict[str, Peer] = {}
    absent: dict[str, str] = {}
    try:
        for name, start in starts.items():
            try:
                started[name] = start()
            except RuntimeError as error:
                absent[name] = str(error)
        yield started, absent
    finally:
        for peer in started.values():
            peer.close()


def starts(
    peers: dict[str, tuple[Path, str | None]], work: str, *sizes: int, threads: int
) -> dict[str, Callable[[], Peer]]:
    """Return what starts each installed peer's script for ``work``, "step" or "epoch", by the peer's label."""

    def start(name: str, python: Path, reason: str | None) -> Peer:
        if reason is not None:
            raise RuntimeError(reason)
        peer = Peer(python, f"{__package__}.{SCRIPTS[work][name]}", *sizes, threads=threads)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if peer.said["device"] != device:
            peer.close()
            raise RuntimeError(f"absent: runs on {peer.said['device']}, the other rows on {device}")
        return peer

    return {NAMES[name]: partial(start, name, *how) for name, how in peers.items()}


class Peer:
    """A running script."""

    def __init__(self, python: Path, module: str, *arguments: object, threads: int) -> None:
        # Its warnings go to a file: a pipe that no one reads would fill up and stop it.
        self.errors = TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115
        command = [str(python), "-m", module, *map(str, (*arguments, threads))]
        # Drawing tqdm's bars would add to a step.
        settings = environment(threads) | {"TQDM_DISABLE": "1"}
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.errors}
        with _cores(threads):
            self.process = subprocess.Popen(command, env=settings, text=True, **pipes)
        try:
            self.said = self._answer()
        except RuntimeError:
            self.close()
            raise

    def __call__(self) -> list[float]:
        """Let it take a turn, and return the seconds of that."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self):
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait(READY_SECONDS)
            self.errors.seek(0)
            raise RuntimeError(_last_line(self.errors.read()))
        return json.loads(line)

    def close(self) -> None:
        """End it."""
        self.process.kill()
        # Waits, and closes its pipes.
        self.process.communicate()
        self.errors.close()


@contextmanager
def _cores(threads: int) -> Iterator[None]:
    """Give what is started inside as many cores as threads: JAX starts one thread for each core that it sees."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:threads])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no reason given"])[-1]
