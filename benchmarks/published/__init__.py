"""Published figures run again, one module a row. A new module in this folder is a new row.

A row has three names:

* ``TITLE``;
* ``run(scale, data_root)`` trains and evaluates, and returns results that JSON can hold. ``scale`` multiplies epochs;
* ``table(record)`` returns Markdown: a table, the distance from the published figure, the epochs run and published, the
  seeds, and ``tables.provenance(record)``.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any, Protocol

__all__ = ["Row", "names", "row"]

# The order of docs/results.md. Rows that are not listed come last.
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
    """The three names of a row's module."""

    TITLE: str

    def run(self, scale: float, data_root: str | None) -> dict[str, Any]:
        """Train and evaluate; ``scale`` multiplies the epochs."""

    def table(self, record: dict[str, Any]) -> str:
        """Return the saved record as Markdown."""


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
