"""Peers in an environment of their own, thrown away afterwards: installed here, never dependencies of the package.

A peer's script takes its sizes as arguments, prints one JSON line when it is ready, and then answers every line that it
reads with the seconds of a step, as a JSON list.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

HERE = Path(__file__).parent
NAMES = {"numpyro": "NumPyro, jitted epoch", "pythae": "pythae's trainer"}
INSTALL_SECONDS = 600
READY_SECONDS = 300


@contextmanager
def environment() -> Iterator[Path]:
    """Yield the Python of a fresh virtual environment that sees this one's packages, torch above all."""
    with TemporaryDirectory(prefix="peers-") as folder:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True, timeout=INSTALL_SECONDS)
        python = Path(folder) / "bin" / "python"
        where = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
        own = subprocess.run(where, check=True, capture_output=True, text=True).stdout.strip()
        (Path(own) / "parent.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
        yield python


def install(python: Path, package: str) -> str | None:
    """Install a peer; return why that was not possible, None where it was."""
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", package]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_SECONDS)
    except subprocess.TimeoutExpired:
        return f"absent: not installed within {INSTALL_SECONDS} s"
    return None if done.returncode == 0 else f"absent: {_last_line(done.stderr)}"


class Peer:
    """A peer's running script."""

    def __init__(self, python: Path, name: str, *sizes: int, threads: int) -> None:
        # Its warnings go to a file: a pipe that no one reads would fill up and stop it.
        self.errors = (python.parent / f"{name}.log").open("w+", encoding="utf-8")
        command = [str(python), str(HERE / f"{name}_step.py"), *map(str, (*sizes, threads))]
        # tqdm's bars are no part of a step.
        settings = {**os.environ, "OMP_NUM_THREADS": str(threads), "TQDM_DISABLE": "1"}
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.errors}
        with _cores(threads):
            self.process = subprocess.Popen(command, env=settings, text=True, **pipes)
        try:
            self.version = self._answer()
        except RuntimeError:
            self.close()
            raise

    def __call__(self) -> list[float]:
        """Let it take some steps, and return the seconds of one."""
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
        self.process.wait()
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
