"""Pieces of the tables that every benchmark renders."""

from __future__ import annotations

import statistics
from typing import Any


def provenance(record: dict[str, Any]) -> str:
    """Return one sentence on where a record was made."""
    versions, machine = record["versions"], record["machine"]
    what = "last launch, which went on from earlier ones" if record.get("resumed") else "whole script"
    return (
        f"{machine['cores']} cores, {machine['processor']}, torch {versions['torch']}, pyro {versions['pyro']}; "
        f"{record['seconds']:.0f} s and {record['peak_memory_mib']} MiB at most for the {what}."
    )


def spread(values: list[float], digits: int = 2, sign: str = "") -> str:
    """Return a mean ± the standard deviation of what it averages, or the only value there is; ``sign`` "+" shows it."""
    mean = f"{statistics.mean(values):{sign}.{digits}f}"
    return f"{mean} (one run)" if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def with_error(value: float, error: float, digits: int = 2) -> str:
    """Return a value ± its standard error."""
    return f"{value:.{digits}f} ± {error:.{digits}f}"
