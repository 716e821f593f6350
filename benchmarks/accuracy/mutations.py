"""Count the wrong variants of a pair that ``fit`` and ``log_likelihood`` refuse by themselves.

    python -m benchmarks.accuracy.mutations

Each variant differs from a right pair in a few lines, and would train or give a number if nobody looked. The sound
variants must pass.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

import pyro_vae as pv
from benchmarks.accuracy.wrong_pairs import RIGHT, WRONG, data
from benchmarks.harness.common import RESULTS, save
from pyro_vae.pair.pair import Pair

__all__ = ["CALLS", "refusal"]

CALLS: dict[str, Callable[[Pair], object]] = {
    "fit": lambda pair: pv.fit(pair, data(), epochs=1, batch_size=8, progress=False, capture=False),
    "log_likelihood": lambda pair: pv.log_likelihood(pair, data(), num_particles=5, seed=0, progress=False),
}


@dataclass(frozen=True)
class Options:
    """Try every variant."""

    results: Path = RESULTS
    """Folder for the results."""


def refusal(call: str, pair: Pair) -> str:
    """Return the refusal of a pair by one function, empty where it gives a number."""
    try:
        CALLS[call](pair)
    except ValueError as refused:
        return str(refused)
    return ""


def main(options: Options) -> None:
    """Print each refusal and the counts, and save them."""
    started = time.perf_counter()
    torch.set_num_threads(1)
    found = {name: {call: refusal(call, make()) for call in CALLS} for name, make in WRONG.items()}
    sound = {name: {call: refusal(call, make()) for call in CALLS} for name, make in RIGHT.items()}
    for name, refusals in found.items():
        print(f"{name}\n    {refusals['fit'] or 'NOT REFUSED'}")
    counts = {call: sum(bool(refusals[call]) for refusals in found.values()) for call in CALLS}
    passed = sum(not any(refusals.values()) for refusals in sound.values())
    print(", ".join(f"{call} refuses {count} of {len(WRONG)}" for call, count in counts.items()))
    print(f"{passed} of {len(RIGHT)} sound pairs pass")
    rows = {"wrong": len(WRONG), **counts, "sound": len(RIGHT), "passed": passed, "refusals": found}
    save("mutations", rows, started, options.results)


if __name__ == "__main__":
    main(tyro.cli(Options))
