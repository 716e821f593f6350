"""Time the log-likelihood of a Bernoulli VAE by importance sampling, ours and what else a user could run, in one run.

    python -m benchmarks.speed.likelihood

All rows evaluate the same network, 784–512–40, on the same binary images, float32, in images × samples per second. They
take turns, because a slow minute of a shared machine then affects all of them. Read the ratios. pythae is installed
into a throw-away environment. If that fails, its rows are absent.
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import tyro
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, linear

import pyro_vae as pv
from benchmarks.harness.common import RESULTS, machine_kind, save
from benchmarks.harness.peers import launch
from pyro_vae.networks.mlp import MLP
from pyro_vae.report.figures import save_figure
from pyro_vae.report.markdown import markdown_table

PIXELS, HIDDEN, LATENT = 784, 512, 40
PEER = "pythae==0.1.2"
# Data and samples at a time, for the rows whose author chooses them: as many as log_likelihood takes here.
DATA, SAMPLES = 128, 24
COMPILED, EAGER = "pv.log_likelihood, compiled", "pv.log_likelihood, eager"
HAND = "PyTorch by hand, vectorised"
PRODUCTS = ("decoder's products alone, default", "decoder's products alone, oneDNN")

# Seconds of an equal amount of work each, the mean log-likelihood in nats where there is one, seconds before the first.
Turn = tuple[list[float], float, float]


@dataclass(frozen=True)
class Options:
    """Time every row."""

    chunks: int = 4
    """Chunks of 128 images that each of our rows takes in a turn."""
    num_particles: int = 5000
    """Samples per image."""
    peer_images: int = 16
    """Images that pythae takes in a turn."""
    rounds: int = 5
    """Turns of each row."""
    threads: int = 2
    """Threads of every row."""
    peers: bool = True
    """Whether to install and time pythae."""
    results: Path = RESULTS
    """Folder for the results. Give another one for a trial, or the saved figures are replaced."""


def main(options: Options) -> None:
    """Time, print the table, save the figures and draw them."""
    torch.set_num_threads(options.threads)
    started = time.perf_counter()
    torch.manual_seed(0)
    encoder, decoder = MLP([(PIXELS,)], 2 * LATENT, (HIDDEN,)), MLP([(LATENT,)], PIXELS, (HIDDEN,))
    pair = pv.models.VAE((PIXELS,), pv.StandardNormal(LATENT), pv.Bernoulli(), encoder=encoder, decoder=decoder)
    x = torch.rand(DATA * options.chunks, PIXELS).gt(0.7).float()
    count = options.num_particles
    # Images × samples in one of the times that a turn returns.
    rows: dict[str, tuple[Callable[[], Turn], int]] = {
        COMPILED: (partial(ours, pair, x, count, True), DATA * count),
        EAGER: (partial(ours, pair, x, count, False), DATA * count),
        HAND: (partial(by_hand, pair, x[:DATA], count), DATA * count),
        PRODUCTS[0]: (partial(products, decoder, linear), DATA * SAMPLES),
    }
    if torch.backends.mkldnn.is_available():
        rows[PRODUCTS[1]] = (partial(products, decoder, onednn), DATA * SAMPLES)
    with tempfile.TemporaryDirectory() as folder:
        python = peer_python(Path(folder)) if options.peers else None
        if python is not None:
            network = Path(folder) / "network.pt"
            layers = {name: [(a.weight.data, a.bias.data) for a in net.layers] for name, net in pair_networks(pair)}
            images = x[: options.peer_images]
            torch.save({"x": images, **layers}, network)
            for size in sorted({min(100, count), count}):
                arguments = [python, network, len(images), count, size, options.threads]
                rows[f"pythae get_nll, batch_size={size}"] = (partial(peer, arguments), len(images) * count)
        turns: dict[str, list[Turn]] = {name: [] for name in rows}
        for _ in range(options.rounds):
            for name, (take, _) in rows.items():
                turns[name].append(take())
    results: dict[str, Any] = {
        "network": f"{PIXELS}–{HIDDEN}–{LATENT}",
        "num_particles": count,
        "threads": options.threads,
        "rounds": options.rounds,
        "peer": PEER if python is not None else None,
        "rows": {name: summary(turns[name], work) for name, (_, work) in rows.items()},
    }
    folder = options.results / machine_kind(options.threads)
    path = save("likelihood", results, started, folder)
    print(table(json.loads(path.read_text(encoding="utf-8"))))
    save_figure(figure(results), folder / "likelihood.png")
    print(f"saved in {path}")


def pair_networks(pair: pv.models.VAE) -> list[tuple[str, MLP]]:
    """Return the two networks by name."""
    return [("encoder", pair.q_z.network), ("decoder", pair.p_x.network)]


def ours(pair: pv.Pair, x: Tensor, num_particles: int, capture: bool) -> Turn:
    """Time chunks of data of one call; what comes before them, recording and compiling, is told apart."""
    times = [time.perf_counter()]
    ll = pv.log_likelihood(
        pair,
        x,
        num_particles=num_particles,
        seed=0,
        capture=capture,
        proposal="guide",
        progress=lambda done, total: times.append(time.perf_counter()),
    )
    # The first chunk's time holds the set-up.
    first, *taken = [later - earlier for earlier, later in pairwise(times)]
    return (taken, ll.mean, first - statistics.median(taken)) if taken else ([first], ll.mean, 0.0)


@torch.inference_mode()
def by_hand(pair: pv.models.VAE, x: Tensor, num_particles: int) -> Turn:
    """Time the loop that a tutorial would write, vectorised over images and samples, without errors or diagnostics."""
    (_, encoder), (_, decoder) = pair_networks(pair)
    start = time.perf_counter()
    loc, raw = encoder(x).chunk(2, -1)
    scale = torch.nn.functional.softplus(raw) + 1e-4
    parts = []
    for first in range(0, num_particles, SAMPLES):
        noise = torch.randn(min(SAMPLES, num_particles - first), *loc.shape)
        z = loc + scale * noise
        log_prior_over_guide = (0.5 * noise**2 - 0.5 * z**2 + scale.log()).sum(-1)
        logits = decoder(z)
        log_lik = -binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none").sum(-1)
        parts.append(log_lik + log_prior_over_guide)
    mean = float((torch.logsumexp(torch.cat(parts), 0) - math.log(num_particles)).mean())
    return [time.perf_counter() - start], mean, 0.0


def onednn(left: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return the affine map by oneDNN."""
    return torch.ops.mkldnn._linear_pointwise(left, weight, bias, "none", [], None)


@torch.inference_mode()
def products(decoder: MLP, product: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Turn:
    """Time the decoder's matrix products on a chunk: nothing that evaluates this network takes less."""
    taken = []
    for _ in range(11):
        start = time.perf_counter()
        for layer in decoder.layers:
            left = OPERANDS.setdefault(layer.in_features, torch.randn(DATA * SAMPLES, layer.in_features))
            product(left, layer.weight, layer.bias)
        taken.append(time.perf_counter() - start)
    return taken[1:], math.nan, 0.0


OPERANDS: dict[int, Tensor] = {}


def peer_python(folder: Path) -> str | None:
    """Make a throw-away environment with pythae beside this process's torch; None, with a reason, where that fails."""
    venv.create(folder / "peer", with_pip=True)
    python = folder / "peer" / "bin" / "python"
    # Last on the path: both sides run the same torch.
    (site,) = (folder / "peer" / "lib").glob("python*/site-packages")
    (site / "outer.pth").write_text(str(Path(torch.__file__).parents[1]) + "\n", encoding="utf-8")
    command = [str(python), "-m", "pip", "install", "--quiet", PEER]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"{PEER} cannot be installed, its rows are absent: {done.stderr.strip().splitlines()[-1]}")
        return None
    return str(python)


def peer(arguments: list[Any]) -> Turn:
    """Time pythae in a separate process; importing it does not count."""
    python, *rest = map(str, arguments)
    command = [python, "-m", "benchmarks.harness.peers.pythae_likelihood", *rest]
    environment = launch.environment(rest[-1])
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        sys.exit(done.stderr)
    record = json.loads(done.stdout.splitlines()[-1])
    return [record["seconds"]], record["mean"], 0.0


def summary(turns: list[Turn], work: int) -> dict[str, Any]:
    """Return a row's images × samples per second, median and quartiles, its estimate and its set-up in seconds."""
    rates = [work / seconds for taken, _, _ in turns for seconds in taken]
    quartiles = statistics.quantiles(rates, n=4) if len(rates) > 1 else 3 * rates
    mean = turns[-1][1]
    return {
        "median": round(statistics.median(rates)),
        "quartiles": [round(quartiles[0]), round(quartiles[2])],
        "mean": None if math.isnan(mean) else mean,
        "setup_seconds": [round(setup, 2) for _, _, setup in turns],
    }


def table(record: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    results = record["results"]
    rows = results["rows"]
    best = rows[COMPILED]["median"]
    header = ["", "images × samples per second", "quartiles", f"{COMPILED} ÷ it"]
    lines = [
        [
            name,
            f"{row['median']:,}".replace(",", " "),
            " to ".join(f"{value:,}".replace(",", " ") for value in row["quartiles"]),
            f"{best / row['median']:.2f}",
        ]
        for name, row in rows.items()
    ]
    setup = rows[COMPILED]["setup_seconds"]
    peer = "" if results["peer"] else " pythae could not be installed, and is absent."
    return (
        f"{markdown_table(header, lines)}\n\n"
        f"{results['network']}, K = {results['num_particles']}, {results['threads']} threads, medians over "
        f"{results['rounds']} turns of each row; recording and compiling, {setup[0]:.1f} s the first time and "
        f"{statistics.median(setup):.1f} s in the median, come before. Ours give errors, k̂ and K-curve too.{peer} "
        f"{record['machine']['cores']} cores, {record['machine']['processor']}, torch {record['versions']['torch']}."
    )


def figure(results: dict[str, Any]) -> Figure:
    """Draw each row's rate."""
    rows = dict(reversed(results["rows"].items()))
    drawn = Figure(figsize=(8, 0.9 + 0.42 * len(rows)), layout="constrained")
    ax = drawn.subplots()
    colours = ["tab:blue" if name.startswith("pv.") else "tab:gray" for name in rows]
    bars = ax.barh(list(rows), [row["median"] / 1000 for row in rows.values()], color=colours)
    ax.bar_label(bars, fmt="%.0f", padding=3, fontsize=9)
    ax.set_xlabel("thousand images × samples per second")
    ax.set_title(
        f"log p(x) by importance sampling, {results['network']}, K = {results['num_particles']}, "
        f"{results['threads']} threads",
        fontsize=11,
    )
    ax.margins(x=0.12)
    ax.spines[["top", "right"]].set_visible(False)
    return drawn


if __name__ == "__main__":
    main(tyro.cli(Options))
