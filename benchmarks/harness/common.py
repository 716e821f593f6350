"""Save results with the versions, machine, time and memory behind them; train and evaluate in run folders."""

from __future__ import annotations

import json
import os
import platform
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import torch
from matplotlib.figure import Figure

import pyro_vae as pv
from pyro_vae.report.figures import save_figure
from pyro_vae.runtime.files import read_json, write_text

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
RUNS = ROOT / "runs" / "reproduce"
# Recorded and compiled: the same steps in less time.
FAST: dict[str, Any] = {"capture": True, "compiled": True}
# Run folders and evaluations of earlier launches that this one took up: its time then lacks theirs.
TAKEN_UP: list[Path] = []
# K and the number of test data: all of them with few draws, as most papers do, and fewer data with more draws.
EVALUATIONS: dict[str, tuple[int, int | None]] = {"all": (200, None), "some": (5000, 1000)}


def save(name: str, results: dict[str, Any], started: float, folder: Path = RESULTS) -> Path:
    """Write a benchmark's results to ``<folder>/<name>.json`` with what is needed to repeat them."""
    record = {
        "results": results,
        "seconds": round(time.perf_counter() - started, 1),
        "resumed": bool(TAKEN_UP),
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
    path = folder / f"{name}.json"
    write_text(path, json.dumps(record, indent=2) + "\n")
    return path


def save_timings(
    name: str, results: dict[str, Any], started: float, figure: Figure, threads: int, folder: Path
) -> None:
    """Write timings and their figure to the folder of this kind of machine, and say where."""
    folder = folder / machine_kind(threads)
    path = save(name, results, started, folder)
    save_figure(figure, folder / f"{name}.png")
    print(f"saved in {path}")


def machine_kind(threads: int) -> str:
    """Return the name of the folder for results that depend on the machine: the GPU's name, or "cpu-2-cores"."""
    if torch.cuda.is_available():
        return f"cuda-{torch.cuda.get_device_name().lower().replace(' ', '-')}"
    return f"cpu-{threads}-cores"


def trained(pair: pv.Pair, data: pv.data.DataSet, name: str, **settings: Any) -> tuple[float, float]:
    """Train in the run folder ``name``, or go on there; return the seconds spent and the validation loss left."""
    folder = RUNS / name
    # One that ended before its first epoch left nothing to go on from.
    resume = (folder / "checkpoint" / "pair.safetensors").exists()
    TAKEN_UP.extend([folder] if resume else [])
    validation = data.validation if data.validation is not None else data.test
    run = pv.fit(pair, data.train, validation=validation, run_dir=folder, resume=resume, **{**FAST, **settings})
    losses = [record["validation_loss"] for record in run.metrics]
    # Epochs before an interruption are timed too. With patience, the best epoch's parameters are left.
    return sum(record["seconds"] for record in run.metrics), min(losses) if "patience" in settings else losses[-1]


def lowered(
    epochs: int, shares: tuple[float, ...], factor: float
) -> Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]:
    """Return what makes a schedule that multiplies the rate by a factor after each of these shares of the epochs."""
    milestones = [round(share * epochs) for share in shares]
    return lambda optimizer: torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, factor)


def evaluated(pair: pv.Pair, data: pv.data.DataSet, name: str, some: int | None = None) -> dict[str, Any]:
    """Return test log-likelihoods in nats, kept in the run folder ``name`` and read from there the next time.

    ``some`` is the number of test data with more draws, where it is to be another one.
    """
    asked = EVALUATIONS if some is None else {**EVALUATIONS, "some": (EVALUATIONS["some"][0], some)}
    return {key: _likelihood(pair, data.test, RUNS / name / f"{key}.json", *of) for key, of in asked.items()}


def _likelihood(pair: pv.Pair, x: torch.Tensor, path: Path, num_particles: int, size: int | None) -> dict[str, Any]:
    if path.exists():
        TAKEN_UP.append(path)
        return read_json(path)
    rows = x if size is None else pv.data.subset_after_shuffle(x, size)
    started = time.perf_counter()
    # Published figures are of the guide's draws.
    ll = pv.log_likelihood(pair, rows, num_particles=num_particles, seed=0, proposal="guide")
    record = {
        "data": len(rows),
        "num_particles": num_particles,
        "mean": ll.mean,
        "standard_error": ll.mean_standard_error,
        "monte_carlo_error": ll.mean_monte_carlo_error,
        "median_ess": float(ll.ess.median()),
        "share_above_threshold": ll.share_above_threshold,
        "seconds": time.perf_counter() - started,
    }
    write_text(path, json.dumps(record, indent=2))
    return record


def negative_elbo(pair: pv.Pair, x: torch.Tensor, num_particles: int = 1) -> float:
    """Return −ELBO of data in nats, as the pair is evaluated, with a fixed seed."""
    torch.manual_seed(0)
    with torch.no_grad():
        parts = [pv.log_terms(pair.eval(), rows, num_particles=num_particles).log_weights for rows in x.split(250)]
    return -float(torch.cat([part.mean(0) for part in parts]).double().mean())
