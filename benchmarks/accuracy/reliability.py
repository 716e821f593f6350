"""Kill, damage and starve training and evaluation, and count what came of it.

    python -m benchmarks.accuracy.reliability

* **Kills**: ``train`` and ``evaluate`` of the command line end by a signal after a random time, and are
  resumed until they end. Parameters and log-likelihoods must be those of unbroken runs, bit for bit.
* **Damage**: a file of a run folder is cut, flipped in one bit, swapped for another run's, or rewritten in another
  dtype or with NaN. Its readers must refuse it in one sentence that names it, go on from the checkpoint before, or give
  the same numbers as before.
* **Full disks**: no file may grow beyond a random size. A run must end in one sentence, and go on once there is room.
"""

from __future__ import annotations

import copy
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import tyro
from torch import Tensor

import pyro_vae as pv
from benchmarks.harness.common import RESULTS, ROOT, save
from pyro_vae.training import run_folder
from pyro_vae.training.run_folder import PREVIOUS, load_parameters

TRAIN = ("train", "vae", "--data", "digits", "--epochs", "12", "--capture", "false", "--run-dir", "run")
EVALUATE = ("evaluate", "run", "--num-particles", "300", "--proposal", "guide")
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
EPOCHS = 4


@dataclass(frozen=True)
class Options:
    """Break runs."""

    kills: int = 100
    """Processes to kill."""
    damages: int = 500
    """Files to damage."""
    disks: int = 30
    """Sizes at which a disk is full."""
    seed: int = 0
    """Of times, places and sizes."""
    results: Path = RESULTS
    """Folder for the results. Give another one for a trial, or the saved figures are replaced."""


def main(options: Options) -> None:
    """Break, count and save."""
    torch.set_num_threads(1)
    # A process in the background of a shell ignores it, and its children would.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Each epoch is saved: there is a checkpoint before the last.
    run_folder.SHARE_OF_SAVING = 1.0
    started, chance = time.perf_counter(), random.Random(options.seed)
    results: dict[str, Any] = {"seed": options.seed}
    with tempfile.TemporaryDirectory() as folder:
        for name, run, count in (
            ("damages", damaged, options.damages),
            ("disks", full_disks, options.disks),
            ("kills", killed, options.kills),
        ):
            place = Path(folder) / name
            place.mkdir()
            results[name] = {"count": count, **run(count, chance, place)}
            print(json.dumps({name: results[name]}, indent=1), flush=True)
            save("reliability", results, started, options.results)


# Kills


def killed(count: int, chance: random.Random, folder: Path) -> dict[str, Any]:
    """Kill runs of train and of evaluate until so many were killed; compare what they left with unbroken runs."""
    whole = folder / "whole"
    whole.mkdir()
    seconds = [_timed(TRAIN, whole), _timed(EVALUATE, whole)]
    expected = _left(whole)
    ended: Counter[str] = Counter()
    runs, equal, resumed = 0, 0, 0
    while sum(ended.values()) < count:
        place = folder / f"{runs}"
        place.mkdir()
        runs += 1
        for command, usual in zip((TRAIN, EVALUATE), seconds, strict=True):
            for _ in range(3):
                how = chance.choice(SIGNALS)
                # Importing takes most of a short run: half of the kills fall into what comes after.
                code = _killed_after(_resumable(command, place), place, chance.uniform(0.35, 1.0) * usual, how)
                if code == 0:
                    break
                ended[how.name] += 1
                resumed += (place / "run" / "config.json").exists()
            else:
                _run(_resumable(command, place), place)
        equal += _left(place) == expected
        shutil.rmtree(place)
    return {"by": dict(ended), "with_a_run_to_resume": resumed, "runs": runs, "equal_to_unbroken": equal}


def _resumable(command: tuple[str, ...], place: Path) -> tuple[str, ...]:
    begun = command is TRAIN and (place / "run" / "config.json").exists()
    return (*command, "--resume") if begun else command


def _command(command: tuple[str, ...]) -> list[str]:
    return [sys.executable, "-m", "pyro_vae", *command]


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def _run(command: tuple[str, ...], place: Path) -> None:
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    done = subprocess.run(_command(command), cwd=place, check=False, env=_environment(), **quiet)  # type: ignore[call-overload]
    if done.returncode:
        raise RuntimeError(f"{command} ended with {done.returncode}: {done.stderr.decode()}")


def _timed(command: tuple[str, ...], place: Path) -> float:
    start = time.perf_counter()
    _run(command, place)
    return time.perf_counter() - start


def _killed_after(command: tuple[str, ...], place: Path, seconds: float, how: signal.Signals) -> int:
    """Return the exit status of a command that gets a signal after some seconds, unless it has ended."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(_command(command), cwd=place, env=_environment(), **quiet) as process:  # type: ignore[call-overload]
        try:
            return int(process.wait(seconds))
        except subprocess.TimeoutExpired:
            process.send_signal(how)
            return int(process.wait())


def _left(place: Path) -> tuple[Any, ...]:
    """Return the parameters' bytes and the log-likelihood of a run."""
    tensors = safetensors.torch.load_file(place / "run" / "checkpoint" / "pair.safetensors")
    record = json.loads((place / "run" / "log_likelihood.json").read_text(encoding="utf-8"))
    return (*(tensors[name].numpy().tobytes() for name in sorted(tensors)), record["mean"], record["curve"])


# Damage


class Folder:
    """A finished run and evaluation of a small pair, and what their readers give."""

    def __init__(self, path: Path, seed: int) -> None:
        self.path, self.seed = path, seed
        torch.manual_seed(seed)
        self.start = pv.models.LinearGaussianVAE(4, 2)
        self.x = torch.randn(64, 4)
        pair = copy.deepcopy(self.start)
        self._fit(pair, EPOCHS)
        self._likelihood(pair)
        self.pair = pair

    def _fit(self, pair: pv.Pair, epochs: int, resume: bool = False) -> None:
        pv.fit(
            pair,
            self.x,
            epochs=epochs,
            batch_size=16,
            seed=self.seed,
            progress=False,
            run_dir=self.path,
            resume=resume,
        )

    def _likelihood(self, pair: pv.Pair) -> Tensor:
        settings: dict[str, Any] = {"num_particles": 30, "seed": self.seed, "proposal": "guide", "progress": False}
        return pv.log_likelihood(pair, self.x, run_dir=self.path, **settings).per_datum

    def resumed(self) -> list[Tensor]:
        """Return the parameters after two more epochs."""
        pair = copy.deepcopy(self.start)
        self._fit(pair, EPOCHS + 2, resume=True)
        return [value.clone() for value in pair.state_dict().values()]

    def loaded(self) -> list[Tensor]:
        """Return the parameters of the checkpoint."""
        pair = copy.deepcopy(self.start)
        load_parameters(pair, self.path / "checkpoint" / "pair.safetensors")
        return [value.clone() for value in pair.state_dict().values()]

    def likelihood(self) -> list[Tensor]:
        """Return the log-likelihoods, from saved chunks."""
        return [self._likelihood(self.pair)]


READERS: dict[str, Callable[[Folder], list[Tensor]]] = {
    "checkpoint/state.pt": Folder.resumed,
    "config.json": Folder.resumed,
    "metrics.jsonl": Folder.resumed,
    "checkpoint/pair.safetensors": Folder.loaded,
    "log_likelihood/*/*.safetensors": Folder.likelihood,
}


def _cut(path: Path, other: Path, chance: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: chance.randrange(len(content))])


def _flip(path: Path, other: Path, chance: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(bytes(content))


def _swap(path: Path, other: Path, chance: random.Random) -> None:
    shutil.copy(other, path)


def _cast(path: Path, other: Path, chance: random.Random) -> None:
    dtype = chance.choice([torch.float16, torch.int32, torch.float64])
    _rewrite(path, lambda tensor: tensor.to(dtype))


def _spoil(path: Path, other: Path, chance: random.Random) -> None:
    _rewrite(path, lambda tensor: torch.full_like(tensor, torch.nan) if tensor.is_floating_point() else tensor)


def _rewrite(path: Path, change: Callable[[Tensor], Tensor]) -> None:
    """Change the tensors of a file and leave the rest, its checksum too."""
    if path.suffix == ".pt":
        state = torch.load(path, weights_only=True)
        state["pair"] = {name: change(tensor) for name, tensor in state["pair"].items()}
        torch.save(state, path)
        return
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {name: change(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118 (no iterator of its own)
    safetensors.torch.save_file(tensors, path, metadata)


TEXT, TENSORS = (_cut, _flip, _swap), (_cut, _flip, _swap, _cast, _spoil)


def damaged(count: int, chance: random.Random, folder: Path) -> dict[str, Any]:
    """Damage so many files, one at a time; return what their readers did, by file."""
    first, second = Folder(folder / "first", 0), Folder(folder / "second", 1)
    kept = folder / "kept"
    shutil.copytree(first.path, kept)
    expected = {}
    outcomes: dict[str, Counter[str]] = {name: Counter() for name in READERS}
    silent: list[str] = []
    for name, read in READERS.items():
        expected[name] = read(first)
        _restore(kept, first.path)
    for i in range(count):
        name = list(READERS)[i % len(READERS)]
        path, other = (next(iter(each.path.glob(name))) for each in (first, second))
        how = chance.choice(TENSORS if path.suffix in (".pt", ".safetensors") else TEXT)
        if chance.random() < 0.5:
            (first.path / "checkpoint" / PREVIOUS).unlink(missing_ok=True)
        before = path.read_bytes()
        how(path, other, chance)
        outcome = "undamaged" if path.read_bytes() == before else _outcome(READERS[name], first, expected[name])
        outcomes[name][outcome] += 1
        if outcome in ("accepted silently", "leaked"):
            silent.append(f"{name} {how.__name__}")
        _restore(kept, first.path)
    return {"outcomes": {name: dict(each) for name, each in outcomes.items()}, "silent_or_leaked": silent}


def _restore(kept: Path, path: Path) -> None:
    shutil.rmtree(path)
    shutil.copytree(kept, path)


def _outcome(read: Callable[[Folder], list[Tensor]], folder: Folder, expected: list[Tensor]) -> str:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found = read(folder)
        except ValueError as error:
            return "refused" if "\n" not in str(error) else "leaked"
        except Exception:
            return "leaked"
    same = len(found) == len(expected) and all(map(torch.equal, found, expected))
    if not same:
        return "accepted silently"
    return "went on from the checkpoint before" if caught else "same numbers"


# Full disks


@contextmanager
def room(size: int) -> Iterator[None]:
    """Let no file grow beyond a size, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def full_disks(count: int, chance: random.Random, folder: Path) -> dict[str, Any]:
    """Resume and evaluate on disks that are full at random sizes, then with room; return what came of it."""
    run = Folder(folder / "run", 0)
    kept = folder / "kept"
    shutil.copytree(run.path, kept)
    parameters = run.resumed()
    _restore(kept, run.path)
    largest = max(path.stat().st_size for path in kept.rglob("*") if path.is_file())
    outcomes: Counter[str] = Counter()
    for _ in range(count):
        # Up to twice the largest: some disks have room.
        size = chance.randrange(2 * largest)
        names = {path.relative_to(kept) for path in kept.rglob("*")}
        try:
            with room(size):
                run.resumed()
            outcome = "there was room"
        except OSError as error:
            outcome = "one sentence" if "disk is full" in str(error) and "\n" not in str(error) else "leaked"
        left = {path.relative_to(run.path) for path in run.path.rglob("*")} - names
        outcomes[outcome if left <= {Path("checkpoint") / PREVIOUS} else "left files"] += 1
        if not all(map(torch.equal, run.resumed(), parameters)):
            outcomes["another result once there was room"] += 1
        _restore(kept, run.path)
    return {"largest_file": largest, "outcomes": dict(outcomes)}


if __name__ == "__main__":
    main(tyro.cli(Options))
