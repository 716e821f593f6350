"""The command that trains."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from pyro_vae.cli.runs import console, load_data
from pyro_vae.cli.training import Training
from pyro_vae.data import DataSet
from pyro_vae.pair.modes import device_of
from pyro_vae.pair.pair import Pair
from pyro_vae.report.files import forget_likelihood, write_collapse, write_figures, write_loss_terms, write_scores
from pyro_vae.report.markdown import write_report
from pyro_vae.runtime.device import resolve_device
from pyro_vae.runtime.distributed import Processes, join
from pyro_vae.training.arguments import split
from pyro_vae.training.fit import fit

__all__ = ["EARLY", "SETTINGS", "join_processes", "train"]

# The options of training that fit takes as they are.
SETTINGS = (
    *("epochs", "batch_size", "lr", "beta", "warmup", "clip_norm", "patience"),
    *("compiled", "precision", "tf32", "seed", "device", "resume"),
)
# The folder, inside a run's, of the training that comes before a model's start.
EARLY = "before_start"


def train(name: str, options: Any, training: Training) -> tuple[Path, Pair, DataSet]:
    processes = join_processes(training.device)
    if training.download:
        processes.from_first(lambda: bool(load_data(options, training.data, training.data_root, download=True)))
    data = load_data(options, training.data, training.data_root)
    folder = training.run_dir or Path("runs") / f"{name}-{training.data}"
    torch.manual_seed(training.seed)
    validation = data.validation if data.validation is not None else training.validation or None
    train, _ = split((data.train,), validation, training.seed)
    # What a model takes from the data at its start is not to come from those that are held out.
    pair = options.build(data._replace(train=train[0]))
    loss, num_particles = training.make_loss(options, pair, len(train[0]))
    record = folder / "metrics.jsonl"
    begun = len(record.read_text(encoding="utf-8").splitlines()) if training.resume and record.exists() else 0
    settings: dict[str, Any] = {
        "loss": loss,
        "num_particles": num_particles,
        "validation": validation,
        "capture": "auto" if training.capture == "auto" else training.capture == "true",
        "config": {"model": name, "data": training.data, "options": dataclasses.asdict(options)},
    }
    settings |= {field: getattr(training, field) for field in SETTINGS}
    settings |= _train_early(options, pair, data, folder, train[0], settings)
    run = fit(pair, data.train, run_dir=folder, **settings)
    if not processes.is_first:
        return folder, pair, data
    # What was trained in double precision is reported in that of the data.
    pair.to("cpu", data.train.dtype if data.train.is_floating_point() else torch.get_default_dtype())
    if len(run.metrics) > begun:
        # An earlier evaluation was of other parameters.
        forget_likelihood(folder)
    write_loss_terms(folder, pair, data)
    write_collapse(folder, pair, data)
    write_figures(folder, pair, data, run.metrics)
    if hasattr(options, "scores"):
        for line in write_scores(folder, options.scores(pair, data)):
            console.print(line, soft_wrap=True, markup=False, highlight=False)
    console.print(f"report: {write_report(folder)}", soft_wrap=True, markup=False)
    return folder, pair, data


def _train_early(
    options: Any, pair: Pair, data: DataSet, folder: Path, train: torch.Tensor, settings: dict[str, Any]
) -> dict[str, Any]:
    """Train as far as a model's start takes, in a folder of its own, and return what that changes in the rest."""
    epochs = getattr(options, "early_epochs", 0)
    if not epochs:
        return {}
    if settings["warmup"] > epochs:
        raise ValueError(
            f"warmup is {settings['warmup']} epochs, and the model is started after {epochs}, with β at its full "
            "weight from then on: make the warm-up as short, or start later"
        )
    # The checkpoint of a run that is past it holds all there is of it.
    if not (settings["resume"] and (folder / "config.json").exists()):
        if (folder / "config.json").exists():
            raise ValueError(f"{folder} already holds a run: choose another folder, or continue it (--resume)")
        fit(pair, data.train, run_dir=folder / EARLY, **{**settings, "epochs": epochs})
        options.start(pair, train.to(device_of(pair), next(pair.parameters()).dtype))
        settings = {**settings, "resume": False}
    # The warm-up is over by then.
    return {"resume": settings["resume"], "warmup": 0}


def join_processes(device: str) -> Processes:
    processes = join(resolve_device(device))
    console.quiet = not processes.is_first
    return processes
