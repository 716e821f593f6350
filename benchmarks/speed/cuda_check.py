"""Check and time the package on a CUDA device, in less than eight minutes.

    python -m benchmarks.speed.cuda_check

Runs each test marked ``cuda``; trains five pairs by eager, recorded and graphed steps, whose losses are to be equal;
times a step beside Pyro's and one written by hand, all with noise of one seed; and estimates log-likelihoods of 10 000
images. One table, and its JSON. On a CPU ``--device cpu --tiny`` tries the script itself.
"""

from __future__ import annotations

import copy
import itertools
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyro
import torch
import tyro
from torch import Tensor

import pyro_vae as pv
from benchmarks.harness import steps
from benchmarks.harness.common import RESULTS, ROOT, machine_kind, save
from benchmarks.harness.side_by_side import by_turns, summaries, table, timings
from pyro_vae.capture import cuda_graph
from pyro_vae.networks.convolutional import ConvDecoder, ConvEncoder
from pyro_vae.report.markdown import markdown_table

# Losses of one seed, float32: sums in another order, over three epochs of steps, stay below this share.
EQUAL = 1e-3
GRAPHED = "captured"
EPOCHS = 4


@dataclass(frozen=True)
class Options:
    """Check a device."""

    device: str = "cuda"
    """Device to check."""
    tiny: bool = False
    """Whether to take few data, to try the script."""
    tests: bool = True
    """Whether to run the tests marked ``cuda``."""
    results: Path = RESULTS
    """Folder for the results. Give another one for a trial, or the saved figures are replaced."""


def main(options: Options) -> None:
    """Check, print and save."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device: this script checks one (--device cpu --tiny tries the script itself)")
    pyro.enable_validation(False)
    started, results = time.perf_counter(), dict[str, Any]()

    def keep(name: str, value: Any) -> None:
        results[name] = value
        print(f"{name}: {value}" if isinstance(value, str) else f"{name}\n{value}", flush=True)
        save("cuda_check", results, started, options.results / machine_kind(torch.get_num_threads()))

    if options.tests:
        keep("tests", tests())
    count = 512 if options.tiny else 20_000
    for name, pair in pairs().items():
        keep(f"fit: {name}", compared(pair, count, options.device))
    rows = step_rows()
    feed = itertools.cycle(steps.batches_of((steps.PIXELS,)))
    first = {name: _once(row, next(feed)) for name, row in rows.items()}
    turns = {name: _turn(row, feed) for name, row in rows.items()}
    keep("step", summaries(by_turns(turns, 10, 60), GRAPHED, first, {}))
    print(table(results["step"], GRAPHED, "step"))
    keep("likelihood", likelihood(500 if options.tiny else 10_000, options.device))
    trained = {name.removeprefix("fit: "): value for name, value in results.items() if name.startswith("fit: ")}
    header = ["pair", *(f"{kind}, ms" for kind in KINDS), "largest relative difference of losses"]
    cells = [
        [name, *(f"{value['step_ms'][kind]:.3f}" for kind in KINDS), f"{value['difference']:.1e}"]
        for name, value in trained.items()
    ]
    print(markdown_table(header, cells))
    print(f"{time.perf_counter() - started:.0f} s")
    unequal = [name for name, value in trained.items() if not value["difference"] <= EQUAL]
    if unequal:
        raise SystemExit(f"losses differ by more than {EQUAL:g}: {', '.join(unequal)}")


def tests() -> str:
    """Return pytest's last line on the tests marked ``cuda``, after the names of those that failed."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider", "tests"]
    done = subprocess.run(command, cwd=ROOT, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines = done.stdout.splitlines()
    failed = [line for line in lines if re.match(r"(FAILED|ERROR|E  )", line)]
    return "\n".join([*failed[:40], *lines[-1:]])


def pairs() -> dict[str, pv.Pair]:
    """Return the pairs to train, by name."""
    x_shape = (steps.PIXELS,)
    torch.manual_seed(0)
    image = (1, steps.SIDE, steps.SIDE)
    conv = {"encoder": ConvEncoder(image, 40), "decoder": ConvDecoder([(20,)], image)}
    pseudo = torch.rand(100, *x_shape)
    return {
        "VAE 784–400–20": steps.vae(400, 20),
        "convolutional VAE": pv.models.VAE(image, pv.StandardNormal(20), pv.Bernoulli(), **conv),
        "VampPrior": pv.models.VampPriorVAE(pseudo, 20, pv.Bernoulli()),
        "ladder": pv.models.LadderVAE(x_shape, (16, 8), pv.Bernoulli()),
        "SRVAE, MLPs": steps.srvae("SRVAE, MLPs"),
    }


KINDS: dict[str, dict[str, Any]] = {
    "eager": {"capture": False},
    "recorded": {"capture": True},
    "graphed": {"capture": True},
    "graphed, compiled": {"capture": True, "compiled": True},
}


def compared(pair: pv.Pair, count: int, device: str) -> dict[str, Any]:
    """Return milliseconds a step of a whole epoch, by kind of step, and how far the epochs' losses lie apart."""
    torch.manual_seed(1)
    x = torch.rand(count, *pair.x_shape).gt(0.7).float()
    losses, milliseconds, seconds = {}, {}, {}
    for kind, settings in KINDS.items():
        began, devices = time.perf_counter(), dict(cuda_graph.DEVICES)
        if kind == "recorded":
            cuda_graph.DEVICES.clear()
        try:
            run = pv.fit(
                copy.deepcopy(pair).to(device),
                x,
                epochs=EPOCHS,
                batch_size=steps.BATCH,
                lr=steps.LEARNING_RATE,
                seed=0,
                device=device,
                progress=False,
                **settings,
            )
        finally:
            cuda_graph.DEVICES.update(devices)
        losses[kind] = [record["loss"] for record in run.metrics]
        # The first epoch records and compiles.
        epoch = statistics.median(record["seconds"] for record in run.metrics[1:])
        milliseconds[kind] = 1000 * epoch * steps.BATCH / count
        seconds[kind] = round(time.perf_counter() - began, 2)
    # Compilers may draw other noise: their losses agree in distribution only.
    exact = [losses[kind] for kind in ("recorded", "graphed")]
    pairs_of = zip(*exact, strict=True), zip(losses["eager"], losses["graphed"], strict=True)
    difference = max(abs(a / b - 1) for both in pairs_of for a, b in both)
    return {"step_ms": milliseconds, "losses": losses, "difference": difference, "seconds": seconds}


def step_rows() -> dict[str, Callable[[Tensor], object]]:
    """Return the ways of taking a step of the VAE 784–400–20."""
    return steps.vae_rows(400, 20)


def likelihood(count: int, device: str) -> dict[str, Any]:
    """Return the times of estimates by a trained VAE: all data from the guide, a hundredth of them by "auto"."""
    pair = steps.vae(400, 20).to(device)
    torch.manual_seed(2)
    x = torch.rand(count, steps.PIXELS).gt(0.7).float().to(device)
    pv.fit(pair, x, epochs=2, batch_size=steps.BATCH, seed=0, device=device, progress=False)
    found = dict[str, Any]()
    for proposal, rows, draws in (("guide", x, 5000), ("auto", x[: count // 100], 1000)):
        began = time.perf_counter()
        ll = pv.log_likelihood(pair, rows, num_particles=draws, seed=0, proposal=proposal, progress=False)  # type: ignore[arg-type]
        found[proposal] = {
            "data": len(rows),
            "num_particles": draws,
            "mean": ll.mean,
            "monte_carlo_error": ll.mean_monte_carlo_error,
            "share_settled": float(ll.settled.double().mean()),
            "seconds": round(time.perf_counter() - began, 2),
        }
    return found


def _once(row: Callable[[Tensor], object], x: Tensor) -> float:
    began = time.perf_counter()
    for _ in range(8):
        row(x)
    return round(time.perf_counter() - began, 2)


def _turn(row: Callable[[Tensor], object], feed: Any) -> Callable[[], list[float]]:
    return lambda: timings(lambda: row(next(feed)), 10)


if __name__ == "__main__":
    main(tyro.cli(Options))
