"""Python state that a program may read or set: attributes, globals, closure variables; parameters and buffers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from operator import itemgetter
from types import CellType
from typing import Any

import torch
from torch import Tensor

from pyro_vae.capture.tracer import CaptureError
from pyro_vae.pair.pair import Pair

__all__ = ["PairState", "Snapshot", "name_of", "plain_attributes", "swapped"]

# The attributes of these packages' classes do not change.
LIBRARIES = ("abc", "builtins", "pyro", "pyro_vae", "torch", "torchvision", "typing")
_ABSENT = object()


def name_of(function: object) -> str:
    """Return the name of a loss: of a function, or of an object's class."""
    return getattr(function, "__name__", type(function).__name__)


class PairState:
    """The parameters and buffers of a pair, in a fixed order.

    Buffers are looked up at each call of :meth:`tensors`: a module may assign a new one between two steps.

    Args:
        pair: the pair; later it may neither gain nor lose a parameter or buffer.
    """

    def __init__(self, pair: Pair) -> None:
        self.pair = pair
        self.parameters = list(pair.parameters())
        self.parameters_count = len(self.parameters)
        self._buffers = [(m._buffers, n) for m in pair.modules() for n, b in m._buffers.items() if b is not None]

    def tensors(self) -> list[Tensor]:
        """Return the parameters, then the buffers as they are now."""
        buffers: list[Any] = [held[name] for held, name in self._buffers]
        return [*self.parameters, *buffers]


def plain_attributes(pair: Pair, function: object) -> list[tuple[Callable[[Any], Any], Mapping[str, Any], list[str]]]:
    """Return the numbers, flags and names that a program may read.

    Args:
        pair: the attributes of its modules, and of its users' own classes.
        function: the attributes of a loss.

    Returns:
        For each object: a function that reads the values from its namespace, the namespace, and the names.
    """
    found: list[tuple[Callable[[Any], Any], Mapping[str, Any], list[str]]] = []
    for held in (*(held for _, held in _owners(pair, function)), *map(vars, _classes(pair))):
        if names := [name for name, value in held.items() if _is_plain(value)]:
            # Given one name, itemgetter returns no tuple.
            found.append((itemgetter(*names, names[0]), held, [*names, names[0]]))
    return found


@dataclass(frozen=True)
class _Place:
    """Somewhere that names have values: before, now, and how to set or delete one."""

    owner: str
    before: dict[str, Any]
    now: Callable[[], Mapping[str, Any]]
    set: Callable[[str, Any], object]
    delete: Callable[[str], object]

    def changed(self) -> list[str]:
        now = self.now()
        names = [*self.before, *(name for name in now if name not in self.before)]
        return [name for name in names if _differ(now.get(name, _ABSENT), self.before.get(name, _ABSENT))]

    def restore(self) -> None:
        for name in self.changed():
            if name in self.before:
                self.set(name, self.before[name])
            else:
                self.delete(name)


class Snapshot:
    """Remember the attributes, globals and closure variables that a pair's programs and a loss may set.

    Args:
        pair: the pair.
        function: the loss, or another function of the program.

    >>> from pyro_vae.models import LinearGaussianVAE
    >>> pair = LinearGaussianVAE(3, 1)
    >>> snapshot = Snapshot(pair, len)
    >>> pair.calls = 1
    >>> snapshot.diff()
    ["'calls' of LinearGaussianVAE"]
    >>> snapshot.restore()
    >>> hasattr(pair, "calls"), snapshot.diff()
    (False, [])
    """

    def __init__(self, pair: Pair, function: Callable[..., Any]) -> None:
        functions = [f for f in (type(pair).model, type(pair).guide, function) if hasattr(f, "__globals__")]
        modules = {id(f.__globals__): (f"module {f.__module__}", f.__globals__) for f in functions}
        self._places = [_of_namespace(owner, held) for owner, held in (*_owners(pair, function), *modules.values())]
        self._places += [_of_class(cls) for cls in _classes(pair)]
        cells = [cell for f in functions for cell in f.__closure__ or () if cell != CellType()]
        self._cells = [_of_cell(cell) for cell in cells]
        self._outside = f"a variable outside {name_of(function)}"

    def diff(self) -> list[str]:
        """Return descriptions of everything that has changed since."""
        changed = [f"'{name}' of {place.owner}" for place in self._places for name in place.changed()]
        return changed + [self._outside for place in self._cells if place.changed()]

    def restore(self) -> None:
        """Put the old values back."""
        for place in (*self._places, *self._cells):
            place.restore()


def _of_namespace(owner: str, held: dict[str, Any]) -> _Place:
    return _Place(owner, dict(held), lambda: held, held.__setitem__, held.__delitem__)


def _of_class(cls: type) -> _Place:
    def put(name: str, value: Any) -> None:
        setattr(cls, name, value)

    return _Place(f"class {cls.__name__}", dict(vars(cls)), lambda: vars(cls), put, lambda name: delattr(cls, name))


def _of_cell(cell: CellType) -> _Place:
    def put(name: str, value: Any) -> None:
        cell.cell_contents = value

    def now() -> dict[str, Any]:
        return {"contents": cell.cell_contents}

    return _Place("", now(), now, put, lambda name: None)


def _owners(pair: Pair, function: object) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, module in pair.named_modules():
        yield f"{type(pair).__name__}{name and '.'}{name}", vars(module)
    if hasattr(function, "__dict__"):
        yield name_of(function), vars(function)


def _classes(pair: Pair) -> list[type]:
    """Return the users' own classes of a pair's modules, whose attributes a program may read."""
    found = {cls for module in pair.modules() for cls in type(module).__mro__}
    return [cls for cls in found if cls.__module__.split(".")[0] not in LIBRARIES]


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str, torch.dtype))


def _differ(value: Any, previous: Any) -> bool:
    # Recurrent layers make new lists of their weights at each run.
    cached = type(value) is list and type(previous) is list
    return value is not previous and not cached and not (_is_plain(value) and value == previous)


@contextmanager
def swapped(pair: Pair, tensors: dict[int, Tensor]) -> Iterator[None]:
    """Run a pair with other tensors in the places of its parameters and buffers.

    ``torch.func.functional_call`` goes by name; a layer that a network holds twice would lose its parameters.

    Args:
        pair: the pair.
        tensors: the new tensors, by the ids of the old ones.

    Raises:
        CaptureError: if the program adds a parameter or a buffer.
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
