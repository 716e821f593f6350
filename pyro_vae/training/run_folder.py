"""The folder of a run: its configuration, its metrics and its checkpoint."""

from __future__ import annotations

import json
import os
import platform
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from pyro_vae._version import __version__
from pyro_vae.pair.pair import Pair
from pyro_vae.runtime.caller import warn_caller
from pyro_vae.runtime.distributed import Processes
from pyro_vae.runtime.files import (
    CHECKSUM,
    FolderLock,
    checksum,
    read_json,
    read_tensors,
    remove_unfinished,
    write_json,
    write_tensors,
    write_text,
    write_whole,
)
from pyro_vae.training.arguments import Identity, Seeds

__all__ = ["RunFolder", "load_parameters", "load_state", "save_parameters", "save_state", "save_tensors"]

# Saving may take this share of a run's time. Epochs in between are held in memory, and saved if the run breaks off.
SHARE_OF_SAVING = 0.05
# The checkpoint before the last one, to go on from if the last is damaged.
PREVIOUS = "previous.pt"


class RunFolder:
    """Save a run, and resume it.

    Only the first process reads and writes files. Each file is replaced as a whole: an interrupt never leaves half of
    one. States are those of :meth:`~pyro_vae.training.trainer.Trainer.state`.

    Args:
        path: the folder; without one nothing is saved.
        processes: the processes of the run.
    """

    def __init__(self, path: Path | None, processes: Processes) -> None:
        self.path, self.processes = path, processes
        # The epoch that the checkpoint holds.
        self.saved = 0
        self._unsaved: dict[str, Any] | None = None
        self._next_save = 0.0
        self._lock: FolderLock | None = None
        # In each file: another run's is told apart.
        self._run = ""

    def seeds(self, seed: int | None) -> Seeds:
        """Return the seeds of the run to resume; a seed that is given must be its seed, which :meth:`open` checks."""
        path = None if self.path is None else self.path / "config.json"
        # The first process alone reads: others may not see its files.
        held = {} if path is None else self.processes.from_first(lambda: _fit_of(path) if path.exists() else {})
        run = held.get("seed", 0) if seed is None else seed
        return Seeds(run, held.get("split_seed", run))

    def open(
        self, state: dict[str, Any], identity: Identity, config: dict[str, Any], *, resume: bool
    ) -> dict[str, Any] | None:
        """Begin a run, or return the state to resume from, the same in every process.

        Args:
            state: the state of a run before its first epoch.
            identity: must be equal to that of the run to resume.
            config: other entries of config.json; "epochs" is one of them.
            resume: whether the folder holds a run to go on with.

        Raises:
            ValueError: for a folder that holds a run already; to resume: for a folder without one, other settings, a
                damaged checkpoint, parameters of other shapes, fewer epochs than are done; for a folder in which
                another process trains.
        """
        if self.path is None:
            if resume:
                raise ValueError("resume needs run_dir, the folder of the run to continue")
            return None
        if resume:
            return self.processes.from_first(lambda: self._resume(state, identity, config))
        return self.processes.from_first(lambda: self._begin(state, identity, config))

    def close(self) -> None:
        """Leave the folder to other processes."""
        if self._lock is not None:
            self._lock.release()

    def save(self, state: Callable[[], dict[str, Any]]) -> None:
        """Save an epoch's state; shortly after the last save, hold a copy of it instead."""
        if self.path is None or not self.processes.is_first:
            return
        if time.perf_counter() >= self._next_save:
            self._write(state())
        else:
            self._unsaved = tree_map_only(Tensor, torch.clone, state())

    def flush(self) -> None:
        """Save the state that is held in memory, if any."""
        if self._unsaved is not None:
            self._write(self._unsaved)

    def save_best(self, pair: Pair) -> None:
        """Save the parameters that training ends with."""
        if self.path is not None and self.processes.is_first:
            save_parameters(pair, self.path / "checkpoint" / "pair.safetensors", self._run)

    def save_failed_batch(self, rows: list[Tensor], epoch: int) -> str:
        """Save a batch whose loss is not finite, and the last epoch; return their place as a part of a sentence."""
        if self.path is None:
            return ""
        path = self.path / "non_finite_batch.pt"
        if self.processes.is_first:
            save_state({"batch": rows}, path)
        self.flush()
        return f"; the batch is in {path}, the checkpoint is that of epoch {epoch}"

    def how_to_resume(self, epoch: int) -> str:
        """Say where a run was interrupted after ``epoch`` epochs, and how to resume it."""
        if self.path is None:
            return f"interrupted in epoch {epoch + 1}"
        begun, held = (
            (f"epoch {self.saved + 1}", f"epoch {self.saved}")
            if self.processes.is_first
            else (f"epoch {epoch + 1}", "its last checkpoint")
        )
        return (
            f"interrupted in {begun}; {self.path} holds {held}: continue it by the same "
            "call with resume=True (the same command with --resume)"
        )

    def _begin(self, state: dict[str, Any], identity: Identity, config: dict[str, Any]) -> None:
        assert self.path is not None
        self._refuse_a_run()
        try:
            json.dumps(config)
        except (TypeError, ValueError) as error:
            raise ValueError(f"config holds a value that config.json cannot hold: {error}") from error
        there = [path for path in (self.path, *self.path.parents) if path.exists()]
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = FolderLock(self.path)
        before = set(self.path.rglob("*"))
        self._run = secrets.token_hex(8)
        try:
            # Another process may have begun one meanwhile.
            self._refuse_a_run()
            # The checkpoint first: a folder with a config.json counts as a run.
            self._write(state)
            self._write_config({}, state["model"], identity, config)
        except Exception:
            self.close()
            _remove(set(self.path.rglob("*")) - before)
            _remove({path for path in (self.path, *self.path.parents) if path not in there})
            self._unsaved = None
            raise

    def _refuse_a_run(self) -> None:
        assert self.path is not None
        if (self.path / "config.json").exists():
            raise ValueError(
                f"{self.path} already holds a run: choose another folder, or continue it (resume, --resume)"
            )

    def _resume(self, state: dict[str, Any], identity: Identity, config: dict[str, Any]) -> dict[str, Any]:
        assert self.path is not None
        before = read_json(self.path / "config.json")
        self._check_same(before, state["model"], identity, config)
        self._lock = FolderLock(self.path)
        remove_unfinished(self.path)
        self._run = before.get("run", "")
        saved = self._last_state(state)
        if config["epochs"] < saved["epoch"]:
            raise ValueError(f"{self.path} holds a run of {saved['epoch']} epochs: ask for as many at least (--epochs)")
        _check_shapes(state["pair"], saved["pair"], state["model"], self.path)
        self._write_config(before, state["model"], identity, config)
        # An interrupt may have left metrics.jsonl an epoch behind the checkpoint.
        self._write(saved)
        return saved

    def _last_state(self, state: dict[str, Any]) -> dict[str, Any]:
        """Return the last state that is not damaged."""
        assert self.path is not None
        path = self.path / "checkpoint" / "state.pt"
        previous = path.with_name(PREVIOUS)
        try:
            return self._checked(load_state(path, state["model"]), state, path)
        except ValueError as error:
            if not previous.exists():
                raise
            try:
                saved = self._checked(load_state(previous, state["model"]), state, previous)
            except ValueError:
                raise error from None
            warn_caller(f"{error}; the run goes on from the checkpoint before, of epoch {saved['epoch']}")
            return saved

    def _checked(self, saved: dict[str, Any], state: dict[str, Any], path: Path) -> dict[str, Any]:
        """Return a saved state of this run, if it has the parts of one before the first epoch and a record an epoch."""
        if lacking := sorted(state.keys() - saved.keys()):
            raise ValueError(f"{path} is damaged, or of another version: it has no {', '.join(lacking)}")
        epoch, metrics = saved["epoch"], saved["metrics"]
        if not isinstance(epoch, int) or not isinstance(metrics, list) or epoch != len(metrics):
            raise ValueError(f"{path} is damaged: its number of epochs is {epoch!r}, and not that of its records")
        _check_run(saved.get("run"), self._run, path)
        return saved

    def _write_config(self, before: dict[str, Any], model: str, identity: Identity, config: dict[str, Any]) -> None:
        assert self.path is not None
        versions = {"pyro_vae": __version__, "torch": torch.__version__, "pyro": pyro.__version__}
        versions["python"] = platform.python_version()
        entries = {**before, "run": self._run, "pair": model, "fit": identity.as_json(), "versions": versions, **config}
        write_json(self.path / "config.json", entries)

    def _check_same(self, before: dict[str, Any], model: str, identity: Identity, config: dict[str, Any]) -> None:
        assert self.path is not None
        # Through JSON and back, like the saved ones.
        now, config = json.loads(json.dumps(identity.as_json())), json.loads(json.dumps(config))
        held = _fit_of(self.path / "config.json")
        # Numbers are shown; the descriptions of data and optimiser are too long.
        changed = [
            k if isinstance(value, str) else f"{k} ({held.get(k)}, now {value})"
            for k, value in now.items()
            if held.get(k) != value
        ]
        changed += [k for k, value in config.items() if k != "epochs" and before.get(k, value) != value]
        if before.get("pair") != model:
            raise ValueError(f"{self.path} holds a run of {before.get('pair')}, not of {model}")
        if changed:
            raise ValueError(f"{self.path} was begun with other settings: {', '.join(changed)}; only epochs may change")

    def _write(self, state: dict[str, Any]) -> None:
        """Write the checkpoint and the records of the epochs so far."""
        assert self.path is not None
        start = time.perf_counter()
        if self._lock is not None and not self._lock.is_held():
            self._unsaved = None
            raise ValueError(f"{self.path} was removed or replaced while its run was training: nothing more is saved")
        # An interrupt between the files leaves the rest to flush().
        self._unsaved = state
        path = self.path / "checkpoint" / "state.pt"
        if self.saved:
            _keep(path, path.with_name(PREVIOUS))
        save_state({**state, "run": self._run}, path)
        self.saved = state["epoch"]
        save_tensors(state["pair"], state["model"], self.path / "checkpoint" / "pair.safetensors", self._run)
        write_text(self.path / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in state["metrics"]))
        self._unsaved = None
        end = time.perf_counter()
        self._next_save = end + (end - start) * (1 / SHARE_OF_SAVING - 1)


def _fit_of(path: Path) -> dict[str, Any]:
    """Return the settings of a run's config.json."""
    held = read_json(path).get("fit", {})
    if not isinstance(held, dict) or not all(isinstance(held.get(n, 0), int) for n in ("seed", "split_seed")):
        raise ValueError(f"{path} is damaged: it holds no settings of fit")
    return held


def _remove(paths: set[Path]) -> None:
    """Remove files and empty folders, the innermost first."""
    for path in sorted(paths, key=lambda path: len(path.parts), reverse=True):
        with suppress(OSError):
            path.rmdir() if path.is_dir() else path.unlink()


def save_parameters(pair: Pair, path: Path, run: str = "") -> None:
    """Write a pair's parameters and buffers as safetensors that name the model, and the run they are of."""
    save_tensors(pair.state_dict(), type(pair).__name__, path, run)


def save_tensors(values: dict[str, Tensor], model: str, path: Path, run: str = "") -> None:
    """Write a state dictionary as safetensors that name the model, and the run they are of.

    Tensors that share memory, e.g. tied weights, are written once under each name: the format knows no sharing.
    """
    tensors: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in values.items():
        tensors[name] = tensor.detach().cpu().contiguous()
        if (place := tensors[name].untyped_storage().data_ptr()) in storages:
            tensors[name] = tensors[name].clone()
        storages.add(place)
    write_tensors(path, tensors, {"format": "pyro_vae", "model": model, "run": run})


def load_parameters(pair: Pair, path: Path) -> None:
    """Load a file of :func:`save_parameters` into a pair of the same model.

    Raises:
        ValueError: for an absent, damaged or foreign file, and for one of another model or other shapes. The pair is
            then unchanged.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist: this run has no checkpoint yet")
    try:
        tensors, metadata = read_tensors(path)
    except ValueError as error:
        beside = path.with_name("state.pt")
        mend = "; the run's last epoch is in state.pt: resume the run (--resume), which writes this file again"
        raise ValueError(f"{error}{mend if beside.is_file() else ''}") from error
    if metadata.get("format") != "pyro_vae":
        raise ValueError(f"{path} was not written by pyro_vae")
    if metadata.get("model") != type(pair).__name__:
        raise ValueError(f"{path} is a checkpoint of {metadata.get('model')}, not of {type(pair).__name__}")
    if metadata.get("run"):
        # A file that was copied out of its folder is nobody's mistake.
        config = path.parent.parent / "config.json"
        _check_run(metadata["run"], read_json(config).get("run") if config.is_file() else None, path)
    _check_shapes(pair.state_dict(), tensors, type(pair).__name__, path)
    pair.load_state_dict(tensors)


def _check_run(run: str | None, folders: str | None, path: Path) -> None:
    """Refuse a file of another run than its folder's; files of older versions name none."""
    if run and folders and run != folders:
        raise ValueError(f"{path} is of another run than this folder: put its own file back, or begin a new run")


def _check_shapes(own: dict[str, Tensor], theirs: dict[str, Tensor], model: str, path: Path) -> None:
    """Refuse parameters and buffers whose names or shapes are not the pair's."""
    shapes, others = ({name: tensor.shape for name, tensor in state.items()} for state in (own, theirs))
    if wrong := sorted(name for name in shapes | others if shapes.get(name) != others.get(name)):
        raise ValueError(f"{path} holds a {model} of other shapes or parts: {', '.join(wrong[:5])}")
    if wrong := sorted(name for name in own if _kind(own[name]) != _kind(theirs[name])):
        name = wrong[0]
        raise ValueError(f"{path} holds {name} in {theirs[name].dtype}, which is no {own[name].dtype}")


def _kind(tensor: Tensor) -> torch.dtype | str:
    """Return "real" for float32 and float64, which a run may convert, and any other dtype as it is."""
    return "real" if tensor.dtype in (torch.float32, torch.float64) else tensor.dtype


def _keep(path: Path, other: Path) -> None:
    """Give a file that is about to be replaced another name too, where the file system can."""
    temporary = other.with_name(f".{secrets.token_hex(4)}.{other.name}")
    with suppress(OSError):
        os.link(path, temporary)
        temporary.replace(other)


def save_state(state: dict[str, Any], path: Path) -> None:
    """Write a state: tensors, numbers and strings only."""
    held = {"format": "pyro_vae", **state, CHECKSUM: checksum(state)}
    write_whole(path, lambda file: torch.save(held, file))


def load_state(path: Path, model: str) -> dict[str, Any]:
    """Read a file of :func:`save_state`, without unpickling code.

    Raises:
        ValueError: for an absent, damaged or foreign file, and for one of another model.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist: there is nothing to resume")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a different error for each kind of damage
        raise ValueError(f"{path} is damaged, or no checkpoint ({type(error).__name__})") from error
    if not isinstance(state, dict) or state.get("format") != "pyro_vae":
        raise ValueError(f"{path} was not written by pyro_vae")
    if state.get("model") != model:
        raise ValueError(f"{path} is a checkpoint of {state.get('model')}, not of {model}")
    del state["format"]
    expected = state.pop(CHECKSUM, None)
    if expected is not None and expected != checksum(state):
        raise ValueError(f"{path} is damaged: its content differs from its checksum")
    return state
