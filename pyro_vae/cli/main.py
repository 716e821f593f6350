"""The command line: ``pyro-vae list | train | evaluate | sample | super-resolve | demo``."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Union

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pyro_vae import data as data_sets
from pyro_vae.cli.commands import Demo, Evaluate, List, Sample, SuperResolve
from pyro_vae.cli.recipes import OPTIONS
from pyro_vae.cli.runs import console, load_run
from pyro_vae.cli.train import join_processes, train
from pyro_vae.cli.training import Training
from pyro_vae.likelihood.estimate import LogLikelihood, likelihood_notes
from pyro_vae.likelihood.importance import log_likelihood
from pyro_vae.likelihood.shared import shared_log_likelihood
from pyro_vae.predict.generate import generate
from pyro_vae.predict.super_resolution import super_resolve
from pyro_vae.report.figures import image_grid, save_figure, super_resolution_grid
from pyro_vae.report.files import record_likelihood
from pyro_vae.report.markdown import write_report
from pyro_vae.runtime.device import resolve_device
from pyro_vae.runtime.distributed import LostProcessError
from pyro_vae.runtime.files import read_json, write_whole
from pyro_vae.runtime.memory import MEBIBYTE

__all__ = ["main"]

# Of the means that one command draws; they lie in memory together.
MOST_BYTES = 2**30


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0, 2 for a user's mistake, 130 when interrupted."""
    # tyro reads the options' fields from these classes, one per model: training options and the model's own.
    trains = tuple(
        Annotated[
            dataclasses.make_dataclass(f"Train_{name}", [("model", options), ("training", how)], frozen=True),
            tyro.conf.subcommand(name, description=options.__doc__),
        ]
        for name, options in OPTIONS.items()
        for how in [getattr(options, "training", Training)]
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
    with _terminable() as end:
        try:
            _run(command)
        except KeyboardInterrupt as interrupt:
            end()
            console.print("\n".join(getattr(interrupt, "__notes__", ["interrupted"])), soft_wrap=True)
            # Another signal may yet end the process before it does.
            sys.stdout.flush()
            return 130
        except (ValueError, OSError, LostProcessError) as error:
            end()
            who = f" in process {rank}" if (rank := os.environ.get("RANK", "0")) != "0" else ""
            text = f"[bold red]error{who}:[/] {escape(str(error))}"
            Console(stderr=True).print(text, soft_wrap=True, highlight=False)
            return 1 if isinstance(error, LostProcessError) else 2
    return 0


@contextmanager
def _terminable() -> Iterator[Callable[[], object]]:
    """Let SIGTERM, which schedulers send, and torchrun when a process is lost, end a command as Ctrl-C does.

    What is yielded makes a command deaf to it, so that one which ends already can say why.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield partial(signal.signal, signal.SIGTERM, signal.SIG_IGN)
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(command: Any) -> None:
    if isinstance(command, (Sample, SuperResolve, Demo)) and os.environ.get("WORLD_SIZE", "1") != "1":
        raise ValueError("only train and evaluate share their work among processes: start this one without torchrun")
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
        train(name, command.what.model, command.what.training)


def _list() -> None:
    table = Table("model", "what it is")
    for name, options in OPTIONS.items():
        table.add_row(name, (options.__doc__ or "").strip())
    console.print(table)
    console.print("data sets: " + ", ".join(data_sets.NAMES), highlight=False)
    console.print("graphs, for vgae: " + ", ".join(data_sets.GRAPHS), highlight=False)


def _evaluate(command: Evaluate) -> None:
    processes = join_processes(command.device)
    device = processes.device(resolve_device(command.device))
    pair, data = load_run(command.run, command.data_root)
    x = data.test if command.size is None else data_sets.subset_after_shuffle(data.test, command.size)
    estimate = partial(
        log_likelihood,
        pair.to(device),
        num_particles=command.num_particles,
        memory=command.memory * MEBIBYTE,
        run_dir=command.run,
        progress=processes.is_first,
    )
    ll = shared_log_likelihood(processes, estimate, x, seed=command.seed)
    if processes.is_first:
        _report_likelihood(command.run, ll)


def _report_likelihood(folder: Path, ll: LogLikelihood) -> None:
    figures = record_likelihood(folder, ll)
    notes = likelihood_notes(ll.record())
    for line in (repr(ll), *notes, f"figures: {', '.join(map(str, figures))}", f"report: {write_report(folder)}"):
        console.print(line, soft_wrap=True, markup=False, highlight=False)


def _sample(command: Sample) -> None:
    pair, data = load_run(command.run, command.data_root)
    size = data.test[0].numel() * torch.get_default_dtype().itemsize
    if command.num_samples * size > MOST_BYTES:
        raise ValueError(
            f"num_samples is {command.num_samples}; each takes {size / 1024:.0f} KiB, {MOST_BYTES // MEBIBYTE} MiB is "
            f"the most that is drawn at once: ask for {MOST_BYTES // size} at most"
        )
    drawn = generate(pair, command.num_samples, seed=command.seed)
    figure = None
    if data.links is None:
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


def _keep(path: Path, figure: Figure | None, **arrays: torch.Tensor) -> None:
    """Write arrays and, where they have one, their picture beside them."""

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            numbers: dict[str, Any] = {name: array.cpu().numpy() for name, array in arrays.items()}
            np.savez_compressed(file, **numbers)

    write_whole(path.with_suffix(".npz"), write)
    written = str(path.with_suffix(".npz"))
    if figure is not None:
        save_figure(figure, path.with_suffix(".png"))
        written += f" and {path.with_suffix('.png')}"
    console.print(f"wrote {written}", soft_wrap=True, markup=False)


def _demo(command: Demo) -> None:
    # The demo's networks are small: a second thread costs more than it gives, and far more on a busy machine.
    torch.set_num_threads(1)
    folder = command.run_dir or _free_folder(Path("runs/demo"))
    options = OPTIONS["srvae"]()
    folder, pair, data = train("srvae", options, Training(run_dir=folder, epochs=command.epochs, lr=command.lr))
    ll = log_likelihood(pair, data.test, num_particles=1000, seed=0)
    terms = read_json(folder / "loss_terms.json")
    table = Table("term (nats per datum)", *terms, title="−ELBO by sampling and in closed form")
    for name in terms["Trace_ELBO"]:
        table.add_row(name, *(f"{column[name][0]:.3f} ± {column[name][1]:.3f}" for column in terms.values()))
    console.print(table)
    _report_likelihood(folder, ll)


def _free_folder(folder: Path) -> Path:
    number = 2
    free = folder
    while free.exists():
        free = folder.with_name(f"{folder.name}-{number}")
        number += 1
    return free


if __name__ == "__main__":
    sys.exit(main())
