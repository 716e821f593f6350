"""What every benchmark keeps beside its figures: versions, machine, time and memory."""

from __future__ import annotations

import json
import os
import platform
import resource
import time
from pathlib import Path
from typing import Any

import pyro
import torch

import pyro_vae as pv
from pyro_vae.checkpoint import write_text

RESULTS = Path(__file__).parent / "results"


def keep(name: str, results: dict[str, Any], started: float) -> Path:
    """Write a benchmark's results to ``results/<name>.json`` with what is needed to repeat them."""
    record = {
        "results": results,
        "seconds": round(time.perf_counter() - started, 1),
        # Linux counts in KiB.
        "peak_memory_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "machine": {"cores": os.cpu_count(), "processor": platform.machine(), "system": platform.system()},
        "versions": {
            "pyro_vae": pv.__version__,
            "pyro": pyro.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }
    path = RESULTS / f"{name}.json"
    write_text(path, json.dumps(record, indent=2) + "\n")
    return path
