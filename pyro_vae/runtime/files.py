"""Files that are replaced as a whole, and JSON files."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["read_json", "read_json_lines", "write_text", "write_whole"]


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file through a temporary one beside it: an interrupt leaves the old file.

    Args:
        path: the file.
        write: writes the content to a path that it is given.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{secrets.token_hex(4)}.{path.name}")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file; an interrupt leaves the old one."""

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    write_whole(path, write)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: for an absent file, and for one without a JSON object.
    """
    return _object(_text(path), str(path))


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
