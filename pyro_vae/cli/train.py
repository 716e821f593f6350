"""``pyro-vae train``."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Union

import torch
import tyro
from torch import Tensor

from pyro_vae.cli.recipes import RECIPES
from pyro_vae.cli.recipes.recipe import Recipe
from pyro_vae.cli.runs import join_processes
from pyro_vae.cli.training import Training
from pyro_vae.data import AnyDataSet
from pyro_vae.pair.modes import device_of
from pyro_vae.pair.pair import Pair
from pyro_vae.report.files import forget_likelihood, write_collapse, write_figures, write_loss_terms, write_scores
from pyro_vae.report.markdown import write_report
from pyro_vae.runtime.progress import console
from pyro_vae.runtime.random_state import derived_seed
from pyro_vae.training.arguments import split
from pyro_vae.training.fit import fit

__all__ = ["train", "train_command"]

# The training options that fit takes under the same names.
SETTINGS = (
    *("epochs", "batch_size", "lr", "beta", "warmup", "clip_norm", "patience"),
    *("compiled", "precision", "tf32", "seed", "device", "resume"),
)
# Subfolder for the epochs before a model's start.
EARLY = "before_start"


@dataclass(frozen=True)
class TrainModel:
    """Train one model."""

    model: Recipe[Any, Any]
    training: Training

    def run(self) -> None:
        """Train, and write the report."""
        train(self.model, self.training)


@dataclass(frozen=True)
class Train:
    """Train a model."""

    command: TrainModel

    def run(self) -> None:
        """Train the chosen model."""
        self.command.run()


def train_command() -> type[Train]:
    """Return the command ``train``, with a subcommand for each recipe: its options and those of training."""
    models = tuple(
        Annotated[
            _subclass(TrainModel, model=recipe, training=recipe.training),
            tyro.conf.subcommand(name, description=recipe.__doc__),
        ]
        for name, recipe in RECIPES.items()
    )
    return _subclass(Train, command=Union[models])  # noqa: UP007


def _subclass(base: type[Any], **fields: Any) -> type[Any]:
    """Return a subclass whose fields have the types that tyro is to parse."""
    return dataclasses.make_dataclass(
        base.__name__, fields.items(), bases=(base,), namespace={"__doc__": base.__doc__}, frozen=True
    )


def train(recipe: Recipe[Any, Any], training: Training) -> tuple[Path, Pair, Any]:
    """Train a model and write its run folder.

    Returns:
        The folder, the trained pair and the data set.

    Raises:
        ValueError: for options that the model, the data or the training cannot take.
    """
    processes = join_processes(training.device)
    if training.download:
        processes.from_first(lambda: bool(recipe.load_data(training.data, training.data_root, download=True)))
    data: AnyDataSet = recipe.load_data(training.data, training.data_root)
    folder = training.run_dir or Path("runs") / f"{recipe.command}-{training.data}"
    torch.manual_seed(training.seed)
    validation = data.validation if data.validation is not None else training.validation or None
    (x, *_), _ = split((data.train,), validation, training.seed)
    # A model may start from data, e.g. pseudo-inputs: never from held-out ones.
    pair: Pair = recipe.build(data._replace(train=x))
    loss, num_particles = training.make_loss(recipe.loss(pair, len(x)), pair)
    record = folder / "metrics.jsonl"
    begun = len(record.read_text(encoding="utf-8").splitlines()) if training.resume and record.exists() else 0
    settings: dict[str, Any] = {
        "loss": loss,
        "num_particles": num_particles,
        "validation": validation,
        "capture": "auto" if training.capture == "auto" else training.capture == "true",
        "config": {"model": recipe.command, "data": training.data, "options": dataclasses.asdict(recipe)},
    }
    settings |= {field: getattr(training, field) for field in SETTINGS}
    settings |= _train_early(recipe, pair, data, folder, x, settings)
    run = fit(pair, data.train, run_dir=folder, **settings)
    if processes.is_first:
        # Double precision serves training alone: reports are in the precision of the data.
        pair.to("cpu", data.train.dtype if data.train.is_floating_point() else torch.get_default_dtype())
        if len(run.metrics) > begun:
            # An earlier evaluation was of other parameters.
            forget_likelihood(folder)
        _report(recipe, pair, data, folder, run.metrics)
    return folder, pair, data


def _report(
    recipe: Recipe[Any, Any], pair: Pair, data: AnyDataSet, folder: Path, metrics: list[dict[str, Any]]
) -> None:
    write_loss_terms(folder, pair, data)
    write_collapse(folder, pair, data)
    write_figures(folder, pair, data, metrics)
    if scores := recipe.scores(pair, data):
        for line in write_scores(folder, scores):
            console.print(line, soft_wrap=True, markup=False, highlight=False)
    console.print(f"report: {write_report(folder)}", soft_wrap=True, markup=False)


def _train_early(
    recipe: Recipe[Any, Any], pair: Pair, data: AnyDataSet, folder: Path, x: Tensor, settings: dict[str, Any]
) -> dict[str, Any]:
    """Train the epochs before the model's start, in a subfolder; return the settings that change after them."""
    epochs = recipe.early_epochs
    if not epochs:
        return {}
    if settings["warmup"] > epochs:
        raise ValueError(
            f"warmup is {settings['warmup']} epochs, and the model is started after {epochs}, with β at its full "
            "weight from then on: make the warm-up as short, or start later"
        )
    begun = (folder / "config.json").exists()
    if begun and not settings["resume"]:
        raise ValueError(f"{folder} already holds a run: choose another folder, or continue it (--resume)")
    # Other noise than before the start.
    later = {"warmup": 0, "seed": derived_seed(settings["seed"], "after start")}
    if begun:
        # Its checkpoint is past the start.
        return later
    fit(pair, data.train, run_dir=folder / EARLY, **{**settings, "epochs": epochs})
    recipe.start(pair, x.to(device_of(pair), next(pair.parameters()).dtype))
    return {"resume": False, **later}
