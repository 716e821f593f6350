"""The command line: ``pyro-vae list | train | evaluate | sample | super-resolve | demo``."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Union

import numpy as np
import rich.progress
import torch
import tyro
from matplotlib.figure import Figure
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pyro_vae import data as data_sets
from pyro_vae.checkpoint import load_parameters, read_json, write_whole
from pyro_vae.data import DataSet
from pyro_vae.evaluate import LogLikelihood, log_likelihood
from pyro_vae.figures import image_grid, save_figure, super_resolution_grid
from pyro_vae.inputs import resolve_device
from pyro_vae.models import OPTIONS
from pyro_vae.pair import Pair
from pyro_vae.predict import generate, super_resolve
from pyro_vae.report import record_likelihood, write_figures, write_loss_terms, write_report
from pyro_vae.train import fit

__all__ = ["main"]

console = Console()


@dataclass(frozen=True)
class Training:
    """How to train."""

    data: str = "digits"
    """Data set; `pyro-vae list` names them."""
    data_root: str | None = None
    """Folder of the data sets; else $PYRO_VAE_DATA, else the user's cache."""
    download: bool = False
    """Fetch the data set where it is absent."""
    run_dir: Path | None = None
    """Run folder; runs/MODEL-DATA by default."""
    resume: bool = False
    """Continue the run in the folder."""
    epochs: int = 20
    """Passes over the data."""
    batch_size: int = 128
    """Data per step."""
    lr: float = 1e-3
    """Adam's learning rate."""
    beta: float = 1.0
    """Weight of the divergence terms."""
    warmup: int = 0
    """Epochs over which β rises from 0."""
    clip_norm: float | None = None
    """Largest global norm of the gradient."""
    patience: int | None = None
    """Epochs without a better validation loss before training stops."""
    validation: float = 0.1
    """Share of the training data to hold out, where the data set brings no validation set; 0 trains on all."""
    seed: int = 0
    """Of initial values, shuffling and draws."""
    device: str = "auto"
    """auto, cpu or cuda."""


@dataclass(frozen=True)
class List:
    """Name the models and the data sets."""


@dataclass(frozen=True)
class Evaluate:
    """Estimate the log-likelihood of test data with a trained run."""

    run: tyro.conf.Positional[Path]
    """Run folder."""
    num_particles: int = 1000
    """Importance samples per datum."""
    size: int | None = None
    """Number of test data, after a seeded shuffle; all by default."""
    memory: int = 512
    """MiB that the tensors of a chunk may take."""
    data_root: str | None = None
    """Folder of the data sets."""
    seed: int = 0
    """Of the draws."""
    device: str = "auto"
    """auto, cpu or cuda."""


@dataclass(frozen=True)
class Sample:
    """Draw new data from a trained run: samples.npz (draws and means) and a picture of the first hundred."""

    run: tyro.conf.Positional[Path]
    """Run folder."""
    num_samples: int = 100
    """Number of draws."""
    data_root: str | None = None
    """Folder of the data sets."""
    seed: int = 0
    """Of the draws."""


@dataclass(frozen=True)
class SuperResolve:
    """Draw high-resolution images for low-resolution test data: super_resolution.npz and a picture of five."""

    run: tyro.conf.Positional[Path]
    """Run folder of an SRVAE."""
    size: int = 100
    """Number of test images to shrink and enlarge again."""
    num_samples: int = 16
    """Draws for each."""
    data_root: str | None = None
    """Folder of the data sets."""
    seed: int = 0
    """Of the draws."""


@dataclass(frozen=True)
class Demo:
    """Train the two-stage VAE on the bundled digits, evaluate it and write its report."""

    run_dir: Path | None = None
    """Run folder; the first free of runs/demo, runs/demo-2, …"""
    epochs: int = 200
    """Passes over the data."""
    lr: float = 3e-3
    """Adam's learning rate."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0, 2 for a user's mistake, 130 when interrupted."""
    # tyro reads the options' fields from these classes, one per model: training options and the model's own.
    trains = tuple(
        Annotated[
            dataclasses.make_dataclass(f"Train_{name}", [("model", options), ("training", Training)], frozen=True),
            tyro.conf.subcommand(name, description=options.__doc__),
        ]
        for name, options in OPTIONS.items()
    )
    # Unions made at run time: Union[...] rather than |, which takes no tuple.
    train = dataclasses.make_dataclass("Train", [("what", Union[trains])], frozen=True)  # noqa: UP007
    train.__doc__ = "Train a model."
    commands = {"list": List, "train": train, "evaluate": Evaluate, "sample": Sample}
    commands |= {"super-resolve": SuperResolve, "demo": Demo}
    union: Any = Union[tuple(Annotated[c, tyro.conf.subcommand(n)] for n, c in commands.items())]  # noqa: UP007
    command: Any = tyro.cli(
        union,
        prog="pyro-vae",
        description="Deep latent-variable models with log-likelihoods that can be checked.",
        args=arguments,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
    )
    try:
        _run(command)
    except KeyboardInterrupt as interrupt:
        console.print("\n".join(getattr(interrupt, "__notes__", ["interrupted"])), soft_wrap=True)
        return 130
    except (ValueError, OSError) as error:
        Console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True, highlight=False)
        return 2
    return 0


def _run(command: Any) -> None:
    if isinstance(command, List):
        _list()
    elif isinstance(command, Evaluate):
        _evaluate(command)
    elif isinstance(command, Sample):
        _sample(command)
    elif isinstance(command, SuperResolve):
        _super_resolve(command)
    elif isinstance(command, Demo):
        _demo(command)
    else:
        name = next(n for n, options in OPTIONS.items() if isinstance(command.what.model, options))
        _train(name, command.what.model, command.what.training)


def _list() -> None:
    table = Table("model", "what it is")
    for name, options in OPTIONS.items():
        table.add_row(name, (options.__doc__ or "").strip())
    console.print(table)
    console.print("data sets: " + ", ".join(data_sets.NAMES), highlight=False)


def _train(name: str, options: Any, training: Training) -> tuple[Path, Pair, DataSet]:
    resolve_device(training.device)
    data = _load_data(training.data, training.data_root, training.download)
    folder = training.run_dir or Path("runs") / f"{name}-{training.data}"
    torch.manual_seed(training.seed)
    pair = options.build(data)
    run = fit(
        pair,
        data.train,
        epochs=training.epochs,
        batch_size=training.batch_size,
        validation=data.validation if data.validation is not None else training.validation or None,
        lr=training.lr,
        beta=training.beta,
        warmup=training.warmup,
        clip_norm=training.clip_norm,
        patience=training.patience,
        seed=training.seed,
        device=training.device,
        run_dir=folder,
        resume=training.resume,
        config={"model": name, "data": training.data, "options": dataclasses.asdict(options)},
    )
    pair.to("cpu")
    # An earlier evaluation was of other parameters.
    (folder / "log_likelihood.json").unlink(missing_ok=True)
    write_loss_terms(folder, pair, data)
    write_figures(folder, pair, data, run.metrics)
    console.print(f"report: {write_report(folder)}", soft_wrap=True, markup=False)
    return folder, pair, data


def _load_data(name: str, root: str | None, download: bool = False) -> DataSet:
    try:
        return data_sets.load(name, root, download=download)
    except RuntimeError as error:
        # What torchvision raises when every mirror has failed.
        raise ValueError(f"{name} could not be fetched: {error}") from error


def load_run(folder: Path, data_root: str | None = None) -> tuple[Pair, DataSet]:
    """Build the pair that a run folder describes, with its parameters, and load its data.

    Raises:
        ValueError: for a folder without a run of the command line's, and for a damaged or foreign checkpoint.
    """
    config = read_json(folder / "config.json")
    if config.get("model") not in OPTIONS or not {"options", "data"} <= set(config):
        raise ValueError(
            f"{folder}/config.json names no model of the command line ({', '.join(OPTIONS)}); "
            "evaluate a pair of your own with pv.log_likelihood"
        )
    data = _load_data(config["data"], data_root)
    try:
        options = OPTIONS[config["model"]](**config["options"])
    except TypeError as error:
        raise ValueError(f"{folder}/config.json is damaged, or of another version: {error}") from error
    pair = options.build(data)
    load_parameters(pair, folder / "checkpoint" / "pair.safetensors")
    return pair.eval(), data


def _evaluate(command: Evaluate) -> None:
    device = resolve_device(command.device)
    pair, data = load_run(command.run, command.data_root)
    x = data.test if command.size is None else data_sets.subset_after_shuffle(data.test, command.size)
    ll = _log_likelihood(pair.to(device), x, command.num_particles, command.memory, command.seed)
    record_likelihood(command.run, ll)
    _show(ll)
    console.print(f"report: {write_report(command.run)}", soft_wrap=True, markup=False)


def _log_likelihood(pair: Pair, x: torch.Tensor, num_particles: int, memory: int, seed: int) -> LogLikelihood:
    with rich.progress.Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("log-likelihood", total=len(x))
        return log_likelihood(
            pair,
            x,
            num_particles=num_particles,
            memory=memory * 2**20,
            seed=seed,
            progress=lambda done, _: bar.update(task, completed=done),
        )


def _show(ll: LogLikelihood) -> None:
    table = Table("", "nats", title=ll.quantity)
    table.add_row("mean over data", f"{ll.mean:.3f}")
    table.add_row("standard error", f"{ll.mean_standard_error:.3f}")
    table.add_row("Monte Carlo part", f"{ll.mean_monte_carlo_error:.4f}")
    if ll.has_bits:
        table.add_row("bits per dimension", f"{ll.bits_per_dimension:.4f}")
    table.caption = f"{len(ll.per_datum)} data, K = {ll.num_particles}, median ESS {float(ll.ess.median()):.1f}"
    console.print(table)


def _sample(command: Sample) -> None:
    pair, data = load_run(command.run, command.data_root)
    drawn = generate(pair, command.num_samples, seed=command.seed)
    rows = list(drawn.mean[:100].split(10))
    figure = image_grid(rows, [""] * len(rows), f"Samples, {data.name}, seed {command.seed}")
    _keep(command.run / "samples", figure, x=drawn.x, mean=drawn.mean)


def _super_resolve(command: SuperResolve) -> None:
    pair, data = load_run(command.run, command.data_root)
    if not hasattr(pair, "down_scale"):
        raise ValueError(
            f"{command.run} holds a {type(pair).__name__}, which has no low-resolution stage: use a run of srvae"
        )
    x = data.test[: command.size]
    y = pair.down_scale(x)  # type: ignore[operator]
    result = super_resolve(pair, y, num_samples=command.num_samples, seed=command.seed)
    figure = super_resolution_grid(x, y, result, data.name)
    _keep(command.run / "super_resolution", figure, y=y, samples=result.samples, mean=result.means.mean(0))


def _keep(path: Path, figure: Figure, **arrays: torch.Tensor) -> None:
    """Write arrays and their picture beside each other."""

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            numbers: dict[str, Any] = {name: array.cpu().numpy() for name, array in arrays.items()}
            np.savez_compressed(file, **numbers)

    write_whole(path.with_suffix(".npz"), write)
    save_figure(figure, path.with_suffix(".png"))
    console.print(f"wrote {path.with_suffix('.npz')} and {path.with_suffix('.png')}", soft_wrap=True, markup=False)


def _demo(command: Demo) -> None:
    # The demo's networks are small: a second thread costs more than it gives, and far more on a busy machine.
    torch.set_num_threads(1)
    folder = command.run_dir or _free_folder(Path("runs/demo"))
    options = OPTIONS["srvae"]()
    folder, pair, data = _train("srvae", options, Training(run_dir=folder, epochs=command.epochs, lr=command.lr))
    ll = _log_likelihood(pair, data.test, 1000, 512, seed=0)
    record_likelihood(folder, ll)
    _show(ll)
    terms = read_json(folder / "loss_terms.json")
    table = Table("term (nats per datum)", *terms, title="−ELBO by sampling and in closed form")
    for name in terms["Trace_ELBO"]:
        table.add_row(name, *(f"{column[name][0]:.3f} ± {column[name][1]:.3f}" for column in terms.values()))
    console.print(table)
    console.print(f"report: {write_report(folder)}", soft_wrap=True, markup=False)


def _free_folder(folder: Path) -> Path:
    number = 2
    free = folder
    while free.exists():
        free = folder.with_name(f"{folder.name}-{number}")
        number += 1
    return free


if __name__ == "__main__":
    sys.exit(main())
