"""Follow the resident memory of one process as it trains the 784–400–20 VAE; print it as one line of JSON."""

from __future__ import annotations

import json
import resource
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

from benchmarks.harness import steps

PAGE = resource.getpagesize()
EARLY = 2000


@dataclass(frozen=True)
class Options:
    """Train and look at the memory."""

    kind: Literal["captured, compiled", "captured", "eager"]
    """Which step to take."""
    steps: int = 20000
    """Steps in all."""
    threads: int = 2
    """Threads of torch."""


def main(options: Options) -> None:
    """Take the steps; memory is read after 2 000 of them, or half, and after all."""
    torch.set_num_threads(options.threads)
    pair = steps.vae(400, 20)
    step = steps.eager(pair) if options.kind == "eager" else steps.captured(pair, "compiled" in options.kind)
    batches = [torch.rand(steps.BATCH, steps.PIXELS, device=steps.DEVICE).gt(0.7).float() for _ in range(16)]
    early = min(EARLY, options.steps // 2)
    marks = {}
    start = time.perf_counter()
    for i in range(1, options.steps + 1):
        step(batches[i % len(batches)])
        if i in (early, options.steps):
            if steps.DEVICE.type == "cuda":
                torch.cuda.synchronize()
            marks[i] = (resident(), time.perf_counter() - start)
    (_, (first, seconds)), (_, (last, all_seconds)) = marks.items()
    record = {
        "steps": [early, options.steps],
        "resident_mib": [round(first), round(last)],
        "growth": round(last / first - 1, 4),
        "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "ms_per_step": round(1000 * (all_seconds - seconds) / (options.steps - early), 3),
    }
    print(json.dumps(record))


def resident() -> float:
    """Return the process's resident memory in MiB (Linux)."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * PAGE / 2**20


if __name__ == "__main__":
    main(tyro.cli(Options))
