"""Files written whole or not at all, and read without executing anything in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from pyro_vae.pair.pair import Pair
from pyro_vae.runtime.files import write_whole

__all__ = ["load_parameters", "load_state", "restore", "save_parameters", "save_state"]


def save_parameters(pair: Pair, path: Path, values: dict[str, Tensor] | None = None) -> None:
    """Write a pair's parameters and buffers, or other values of them, as safetensors that name the model."""
    values = pair.state_dict() if values is None else values
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in values.items()}
    metadata = {"format": "pyro_vae", "model": type(pair).__name__}
    write_whole(path, lambda temporary: safetensors.torch.save_file(tensors, temporary, metadata))


def load_parameters(pair: Pair, path: Path) -> None:
    """Load what :func:`save_parameters` wrote into a pair of the same model.

    Raises:
        ValueError: for an absent, damaged or foreign file, one of another model, one of other shapes; the pair is
            then unchanged.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist: this run has no checkpoint yet")
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no iterator of its own)
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged, or no safetensors file: {error}") from error
    if metadata.get("format") != "pyro_vae":
        raise ValueError(f"{path} was not written by pyro_vae")
    if metadata.get("model") != type(pair).__name__:
        raise ValueError(f"{path} is a checkpoint of {metadata.get('model')}, not of {type(pair).__name__}")
    restore(pair, tensors, path)


def restore(pair: Pair, tensors: dict[str, Tensor], path: Path) -> None:
    """Put parameters and buffers into a pair, all or none.

    Raises:
        ValueError: when names or shapes are not the pair's.
    """
    own = pair.state_dict()
    shapes, theirs = ({name: tensor.shape for name, tensor in state.items()} for state in (own, tensors))
    if wrong := sorted(name for name in shapes | theirs if shapes.get(name) != theirs.get(name)):
        raise ValueError(f"{path} holds a {type(pair).__name__} of other shapes or parts: {', '.join(wrong[:5])}")
    pair.load_state_dict(tensors)


def save_state(state: dict[str, Any], path: Path) -> None:
    """Write everything a resumed run needs: tensors, numbers and strings only."""
    write_whole(path, lambda temporary: torch.save({"format": "pyro_vae", **state}, temporary))


def load_state(path: Path, model: str) -> dict[str, Any]:
    """Read what :func:`save_state` wrote, without unpickling code.

    Raises:
        ValueError: for an absent, damaged or foreign file, and for one of another model.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist: there is nothing to resume")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for many kinds of damage
        raise ValueError(f"{path} is damaged, or no checkpoint ({type(error).__name__})") from error
    if not isinstance(state, dict) or state.get("format") != "pyro_vae":
        raise ValueError(f"{path} was not written by pyro_vae")
    if state.get("model") != model:
        raise ValueError(f"{path} is a checkpoint of {state.get('model')}, not of {model}")
    return state
