"""Files that are replaced as a whole, JSON files, and files of tensors that notice damage."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import re
import secrets
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from torch import Tensor

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "CHECKSUM",
    "FolderLock",
    "checksum",
    "read_json",
    "read_json_lines",
    "read_tensors",
    "remove_unfinished",
    "write_json",
    "write_tensors",
    "write_text",
    "write_whole",
]

# Name of the entry that holds the checksum of the others.
CHECKSUM = "sha256"
_UNFINISHED = re.compile(r"\.[0-9a-f]{8}\..")
# No space, a file that may not grow, a quota.
FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file through a temporary one beside it: an interrupt leaves the old file.

    Args:
        path: the file.
        write: writes the content to memory. Libraries that write to a disk themselves have errors of their own for a
            full one, and file modes of their own.

    Raises:
        OSError: if the disk is full, in one sentence.
    """
    content = io.BytesIO()
    write(content)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{secrets.token_hex(4)}.{path.name}")
    try:
        with temporary.open("wb") as file:
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        if error.errno not in FULL:
            raise
        left = "what it held before is intact" if path.exists() else "nothing was written"
        raise OSError(f"{path} cannot be written, the disk is full: {left}; free some space and go on") from None
    finally:
        temporary.unlink(missing_ok=True)


def remove_unfinished(folder: Path) -> None:
    """Remove the temporary files that a killed :func:`write_whole` left in a folder and in those below."""
    for path in folder.rglob(".*"):
        if _UNFINISHED.match(path.name) and path.is_file():
            with suppress(OSError):
                path.unlink()


class FolderLock:
    """Keep a folder for one process. It ends with its process, however that ends.

    Args:
        folder: an existing folder.

    Raises:
        ValueError: if another process holds the folder.
    """

    NAME = ".lock"

    def __init__(self, folder: Path) -> None:
        self.folder, self._file = folder, None
        if fcntl is None:
            return
        while True:
            file = os.open(folder / self.NAME, os.O_CREAT | os.O_RDWR, 0o666)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(file)
                raise ValueError(
                    f"another process is training in {folder}: let it end, or choose another folder"
                ) from None
            except OSError:
                # Some network file systems know no locks.
                os.close(file)
                return
            self._file = file
            if self.is_held():
                return
            # Its last owner removed the file between the two calls.
            os.close(file)

    def is_held(self) -> bool:
        """Whether the folder is still there, and the one that was locked."""
        if self._file is None:
            return self.folder.is_dir()
        try:
            return os.path.samestat(os.fstat(self._file), (self.folder / self.NAME).stat())
        except OSError:
            return False

    def release(self) -> None:
        """Leave the folder to others."""
        if self._file is not None:
            if self.is_held():
                (self.folder / self.NAME).unlink(missing_ok=True)
            os.close(self._file)
            self._file = None


def checksum(content: Any) -> str:
    """Return the SHA-256 of tensors, numbers and strings in dictionaries and lists, whatever the order of the keys.

    >>> checksum({"a": 1, "b": torch.zeros(2)}) == checksum({"b": torch.zeros(2), "a": 1})
    True
    >>> checksum(torch.zeros(2)) == checksum(torch.zeros(1, 2))
    False
    """
    digest = hashlib.sha256()

    def feed(value: Any) -> None:
        if isinstance(value, Tensor):
            digest.update(repr((value.dtype, tuple(value.shape))).encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        elif isinstance(value, Mapping):
            digest.update(b"{%d" % len(value))
            for key in sorted(value, key=repr):
                digest.update(repr(key).encode())
                feed(value[key])
        elif isinstance(value, (list, tuple)):
            digest.update(b"[%d" % len(value))
            for each in value:
                feed(each)
        else:
            digest.update(repr(value).encode() + b";")

    feed(content)
    return digest.hexdigest()


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write tensors by name as safetensors, with metadata and the checksum of both."""
    held = {**metadata, CHECKSUM: checksum([tensors, metadata])}
    write_whole(path, lambda file: file.write(safetensors.torch.save(tensors, held)))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a safetensors file, whoever wrote it.

    Raises:
        ValueError: for a damaged file, and for one whose content is not what :func:`write_tensors` wrote.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no iterator of its own)
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} is damaged, or no safetensors file: {error}") from error
    expected = metadata.pop(CHECKSUM, None)
    if expected is not None and expected != checksum([tensors, metadata]):
        raise ValueError(f"{path} is damaged: its content differs from its checksum")
    return tensors, metadata


def write_text(path: Path, text: str) -> None:
    """Write a text file; an interrupt leaves the old one."""
    write_whole(path, lambda file: file.write(text.encode()))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object, without its checksum.

    Raises:
        ValueError: for an absent file, for one without a JSON object, and for one that differs from its checksum.
    """
    record = _object(_text(path), str(path))
    expected = record.pop(CHECKSUM, None)
    if expected is not None and expected != checksum(record):
        raise ValueError(f'{path} is damaged, or was changed by hand: to keep a change, remove its "{CHECKSUM}"')
    return record


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Write a JSON object with its checksum, by which :func:`read_json` notices damage.

    Raises:
        ValueError: for a number that is not finite, which JSON lacks.
    """
    held = json.loads(json.dumps(record, allow_nan=False))
    write_text(path, json.dumps({**held, CHECKSUM: checksum(held)}, indent=2) + "\n")


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Read a file of one JSON object per line.

    Raises:
        ValueError: for an absent file, and for a line without a JSON object, with its number.
    """
    return [_object(line, f"line {i} of {path}") for i, line in enumerate(_text(path).splitlines(), 1)]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(
            f"{path} does not exist: {path.parent} is no run folder, or its training never began"
        ) from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def _object(text: str, place: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place} is damaged: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{place} is damaged: it holds no JSON object")
    return value
