"""Warnings that name the user's line."""

from __future__ import annotations

import sys
import warnings

__all__ = ["warn_caller"]

PACKAGE = __name__.split(".")[0]


def warn_caller(message: str) -> None:
    """Warn at the first line outside the package, however deep the call lies inside it.

    >>> import warnings
    >>> with warnings.catch_warnings(record=True) as caught:
    ...     warnings.simplefilter("always")
    ...     warn_caller("slow")
    >>> str(caught[0].message)
    'slow'
    """
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] == PACKAGE:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
