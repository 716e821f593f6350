"""The Python state that a recorded program may read, or set: attributes of a pair's modules and of the loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from operator import itemgetter
from types import CellType
from typing import Any

import torch
from torch import Tensor

from pyro_vae.capture.tracer import CaptureError
from pyro_vae.objectives.loss import Loss
from pyro_vae.pair.pair import Pair

__all__ = ["name_of", "plain_attributes", "swapped", "unchanged"]

# Whose classes' attributes stay as they are.
LIBRARIES = ("abc", "builtins", "pyro", "pyro_vae", "torch", "torchvision", "typing")


def name_of(loss: Loss) -> str:
    """Return what a loss is called."""
    return getattr(loss, "__name__", type(loss).__name__)


def _owners(pair: Pair, loss: Loss) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, module in pair.named_modules():
        yield f"{type(pair).__name__}{name and '.'}{name}", vars(module)
    if hasattr(loss, "__dict__"):
        yield name_of(loss), vars(loss)


def _classes(pair: Pair) -> list[type]:
    """Return the users' own classes among those of a pair's modules, whose attributes a program may read."""
    found = {cls for module in pair.modules() for cls in type(module).__mro__}
    return [cls for cls in found if cls.__module__.split(".")[0] not in LIBRARIES]


def plain_attributes(pair: Pair, loss: Loss) -> list[tuple[Callable[[Any], Any], Mapping[str, Any], list[str]]]:
    """Return where the numbers, flags and names are that a program may have read, and what reads them together."""
    found: list[tuple[Callable[[Any], Any], Mapping[str, Any], list[str]]] = []
    for held in (*(held for _, held in _owners(pair, loss)), *map(vars, _classes(pair))):
        if names := [name for name, value in held.items() if _is_plain(value)]:
            # Given one name, itemgetter returns no tuple.
            found.append((itemgetter(*names, names[0]), held, [*names, names[0]]))
    return found


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str, torch.dtype))


@contextmanager
def unchanged(pair: Pair, loss: Loss) -> Iterator[list[str]]:
    """Put back every attribute and global that is set inside, and yield a list that then names them."""
    functions = [f for f in (type(pair).model, type(pair).guide, loss) if hasattr(f, "__globals__")]
    modules = {id(f.__globals__): (f"module {f.__module__}", f.__globals__) for f in functions}
    before = [(owner, held, dict(held)) for owner, held in (*_owners(pair, loss), *modules.values())]
    of_classes = [(cls, dict(vars(cls))) for cls in _classes(pair)]
    cells = [(cell, cell.cell_contents) for f in functions for cell in f.__closure__ or () if cell != CellType()]
    changed: list[str] = []
    try:
        yield changed
    finally:
        for owner, held, old in before:
            for name in [
                name for name in old.keys() | held.keys() if _differ(held.get(name, cells), old.get(name, cells))
            ]:
                changed.append(f"'{name}' of {owner}")
                held[name] = old.get(name)
                if name not in old:
                    del held[name]
        for cls, old in of_classes:
            held = vars(cls)
            for name in [n for n in old.keys() | held.keys() if _differ(held.get(n, cells), old.get(n, cells))]:
                changed.append(f"'{name}' of class {cls.__name__}")
                setattr(cls, name, old[name]) if name in old else delattr(cls, name)
        for cell, value in cells:
            if _differ(cell.cell_contents, value):
                changed.append(f"a variable outside {name_of(loss)}")
                cell.cell_contents = value


def _differ(value: Any, previous: Any) -> bool:
    # Recurrent layers keep lists of their weights, anew for each run.
    cached = type(value) is list and type(previous) is list
    return value is not previous and not cached and not (_is_plain(value) and value == previous)


@contextmanager
def swapped(pair: Pair, tensors: dict[int, Tensor]) -> Iterator[None]:
    """Put tensors in the place of parameters and buffers, given by their ids, wherever the pair holds them.

    ``torch.func.functional_call`` goes by name, and leaves a layer that a network holds twice without its parameters.
    """
    places: list[Any] = [held for m in pair.modules() for held in (m._parameters, m._buffers)]
    before = [dict(held) for held in places]
    try:
        for held in places:
            held.update({name: tensors[id(t)] for name, t in held.items() if id(t) in tensors})
        yield
        if [_present(held) for held in places] != [_present(old) for old in before]:
            raise CaptureError("the program adds a parameter or a buffer, which a replay would not: create it before")
    finally:
        for held, old in zip(places, before, strict=True):
            held.clear()
            held.update(old)


def _present(held: dict[str, Any]) -> set[str]:
    return {name for name, tensor in held.items() if tensor is not None}
