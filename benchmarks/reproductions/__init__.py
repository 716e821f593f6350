"""Published figures run again: one module per row, found by being here.

A row has a ``TITLE``; ``run(scale, data_root)``, which returns results that JSON can hold, ``scale`` multiplying the
epochs of the row's own schedule; and ``table(record)``, which returns them as markdown: a table, the published figure
and the distance from it, the epochs run against those published, the seeds, and ``render.provenance(record)``.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any, Protocol

__all__ = ["Row", "names", "row"]

# The order of docs/results.md, by what is reproduced; a row that is not here comes after these.
ORDER = (
    "static_mnist_vae",
    "iwae",
    "vamp_prior",
    "flows",
    "ladder",
    "denoising",
    "gaussian_mixture",
    "categorical",
    "beta_vae",
    "vgae",
)


class Row(Protocol):
    """What a module of this folder exposes."""

    TITLE: str

    def run(self, scale: float, data_root: str | None) -> dict[str, Any]:
        """Train and evaluate; ``scale`` multiplies the epochs."""

    def table(self, record: dict[str, Any]) -> str:
        """Return the kept record as markdown."""


def names() -> list[str]:
    """Return the rows by name, in the order in which they are shown."""
    found = [module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")]
    return sorted(found, key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name))


def row(name: str) -> Any:
    """Return a row's module.

    Raises:
        ValueError: for a name that no row has.
    """
    if name not in names():
        raise ValueError(f"no row is named {name!r}; there are {', '.join(names())}")
    return importlib.import_module(f"{__name__}.{name}")
