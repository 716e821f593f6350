"""``fit``: epochs, data, devices, checkpoints and records around a training step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyro
import rich.progress
import torch
from pyro.infer import Trace_ELBO
from rich.console import Console
from torch import Tensor, nn

from pyro_vae.objectives.bounds import elbo
from pyro_vae.objectives.loss import WEIGHED, Loss, check_loss
from pyro_vae.pair.inspection import Inspection, inspect
from pyro_vae.pair.pair import Pair
from pyro_vae.runtime.batches import Batches
from pyro_vae.runtime.device import resolve_device
from pyro_vae.runtime.distributed import Averaging, LostProcessError, Processes, join
from pyro_vae.runtime.random_state import own_random_state
from pyro_vae.training.arguments import Data, as_batch, check_data, check_settings, fingerprint, split
from pyro_vae.training.captured_step import captured_step
from pyro_vae.training.precision import Precision, check_precision, to_precision
from pyro_vae.training.step import Step, eager_step
from pyro_vae.training.trainer import Settings, Trainer

__all__ = ["Run", "fit"]

MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
MakeScheduler = Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]
# Recording a program takes about as long as this many small steps: runs that take fewer of a kind do not record it.
STEPS_BEFORE_CAPTURE = 50
# One for the progress bar and for the lines above it.
console = Console(stderr=True)
# The attributes of an ELBO that say what is maximised.
NUMBERS_OF_A_LOSS = ("alpha", "beta", "gamma", "data_size", "num_particles", "self_links")


class Run(NamedTuple):
    """What :func:`fit` leaves: the trained pair, one record per epoch, and where the files are.

    Each record holds ``epoch``, ``seconds``, ``loss`` (training), ``validation_loss`` (−ELBO), ``beta``, ``lr``,
    ``terms`` (each site's share of −ELBO) and ``monitor`` (γ and the like); losses are in nats per datum.
    """

    pair: Pair
    metrics: list[dict[str, Any]]
    run_dir: Path | None


def fit(
    pair: Pair,
    data: Data,
    *,
    epochs: int = 20,
    batch_size: int = 128,
    loss: Loss | None = None,
    num_particles: int = 1,
    validation: Data | float | None = None,
    optimizer: MakeOptimizer | None = None,
    lr: float = 1e-3,
    scheduler: MakeScheduler | None = None,
    beta: float = 1.0,
    warmup: int = 0,
    clip_norm: float | None = None,
    patience: int | None = None,
    capture: Literal["auto"] | bool = "auto",
    compiled: bool = False,
    precision: Precision | None = None,
    tf32: bool = False,
    seed: int = 0,
    device: str | torch.device = "auto",
    run_dir: str | Path | None = None,
    resume: bool = False,
    config: dict[str, Any] | None = None,
    progress: bool = True,
) -> Run:
    """Train a pair by stochastic variational inference.

    The optimiser sees the mean loss per datum of each batch. The caller's random state is left as it was.

    Under ``torchrun``, or another launcher for torch, each process calls this with all of the data, and takes its share
    of batches of ``batch_size`` times the number of processes; a short last batch is shared out too. Gradients are
    averaged over data, the pair comes out equal everywhere, and the first process keeps the run folder.

    Args:
        pair: any pair; it is trained in place and left on the device.
        data: ``x`` (N, …), a tuple of ``x`` and the pair's conditions, each with N rows, or a data set of
            :mod:`pyro_vae.data`, for its training images. They move to a CUDA device where they take at most half of
            its free memory, and are streamed to it in the same batches where they take more.
        epochs: passes over the data, those of a resumed run included.
        batch_size: data per step and process; the last batch of an epoch may be shorter.
        loss: any Pyro ELBO (``Trace_ELBO()`` by default), or an objective to maximise, such as
            :func:`~pyro_vae.objectives.iwae`.
        num_particles: draws per datum for an objective; a Pyro ELBO holds its own.
        validation: held-out data, or the share of ``data`` to hold out.
        optimizer: makes a torch optimiser from the parameters; torch's fused Adam with ``lr`` by default.
        scheduler: makes one of torch's learning-rate schedulers from the optimiser. It takes a step after each epoch,
            by the validation loss if it is a ``ReduceLROnPlateau``. A resumed run is held to the same one, but for
            functions that it was given.
        beta: weight of the divergence terms.
        warmup: epochs over which β rises linearly from 0 to ``beta``.
        clip_norm: largest global norm of the gradient.
        patience: epochs without a better validation loss after which training stops and the best parameters return.
        capture: whether steps replay a recording of the pair's program, which gives the same bits as Pyro's eager step
            in less time. "auto" records when that pays, and warns, once, of what it cannot record and trains eagerly;
            True records from the start and raises instead; False is eager. On a CUDA device the recorded step becomes
            one CUDA graph, if the optimiser is fused or capturable.
        compiled: whether to compile the recording, which takes a while, pays in long runs and needs a C++ compiler. A
            resumed run then equals an unbroken one up to rounding.
        precision: "float32" and "float64" convert pair and data, None takes them as they are; "bf16-mixed" keeps
            parameters, densities and sums in float32 and runs the pair's networks, its outermost modules that hold
            parameters and return tensors, under torch's autocast to bfloat16 while training.
        tf32: whether a CUDA device may round the operands of float32 products to TF32 while training.
        seed: of the shuffling and of every draw.
        device: "cpu", "cuda", or "auto" for CUDA where there is one.
        run_dir: folder for configuration, metrics and checkpoints; None keeps no file.
        resume: continue the run in ``run_dir``, bit for bit as if it had never stopped (on CPU).
        config: what else ``config.json`` should hold.
        progress: whether to draw a progress bar.

    Returns:
        :class:`Run`.

    Raises:
        ValueError: for bad data or settings, before any step is taken; for a loss that is not finite, with the site
            named, the batch kept and the last good checkpoint intact. On a CUDA device it is noticed when losses are
            read back, at the end of the epoch at the latest.
        LostProcessError: when another process of the run has ended.

    >>> import torch, pyro_vae as pv
    >>> pair = pv.models.LinearGaussianVAE(3, 1)
    >>> run = fit(pair, torch.randn(64, 3), epochs=2, batch_size=32, progress=False)
    >>> [record["epoch"] for record in run.metrics]
    [1, 2]
    """
    loss = Trace_ELBO() if loss is None else loss
    processes, target = _place(device, precision, tf32)
    train, held_out, inspection = _data(pair, data, validation, precision, seed)
    kept: dict[str, Any] = {"batch_size": batch_size, "num_particles": num_particles, "lr": lr, "clip_norm": clip_norm}
    kept |= {"beta": beta, "warmup": warmup, "patience": patience, "seed": seed, "compiled": compiled, "tf32": tf32}
    _check(inspection, loss, train, held_out, epochs, processes.size, kept)
    update = _optimizer(optimizer, list(pair.to(target).parameters()), lr)
    schedule = None if scheduler is None else _schedule(scheduler, update, held_out is not None)
    named: dict[str, Any] = {
        "loss": _described(loss),
        "optimizer": _described(update),
        "scheduler": _described_schedule(schedule),
    }
    named |= {"data": fingerprint(train), "validation": fingerprint(held_out), "precision": precision or _dtype(pair)}
    settings = Settings(**kept, **named, processes=processes.size)
    processes.check_same((settings.data, settings.validation))
    in_bfloat16 = list(inspection.networks) if precision == "bf16-mixed" else []
    trainer = Trainer(pair, update, schedule, Batches(train, target), held_out, settings, processes, in_bfloat16)
    trainer.weighs_divergence = loss is elbo or isinstance(loss, WEIGHED)
    shows = progress and processes.is_first
    steps = _steps(pair, loss, update, settings, capture, console.print if shows else None)
    _train(trainer, steps, epochs, shows, run_dir, resume, config or {})
    return Run(pair, trainer.metrics, trainer.folder)


def _place(device: str | torch.device, precision: Precision | None, tf32: bool) -> tuple[Processes, torch.device]:
    """Return the processes of the run, joined, and this one's device."""
    target = resolve_device(device)
    check_precision(precision, tf32, target)
    processes = join(target)
    return processes, processes.device(target)


def _dtype(pair: Pair) -> str:
    return str(next(pair.parameters()).dtype).removeprefix("torch.")


def _data(
    pair: Pair, data: Data, validation: Data | float | None, precision: Precision | None, seed: int
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...] | None, Inspection]:
    """Return training and held-out data in the run's precision, to which the pair is converted, and its facts."""
    batch = _converted(as_batch(data), precision)
    to_precision(pair, precision)
    if not any(parameter.requires_grad for parameter in pair.parameters()):
        raise ValueError(f"{type(pair).__name__} has no parameters to train")
    inspection = inspect(pair, batch, "data")
    if validation is not None and not isinstance(validation, (int, float)):
        validation = _converted(as_batch(validation), precision)
        inspection.check(validation, "validation")
    return (*split(batch, validation, seed), inspection)


def _check(
    inspection: Inspection,
    loss: Loss,
    train: tuple[Tensor, ...],
    held_out: tuple[Tensor, ...] | None,
    epochs: int,
    processes: int,
    kept: dict[str, Any],
) -> None:
    """Refuse bad data and settings before anything is trained or written."""
    counts = {name: kept[name] for name in ("batch_size", "num_particles")}
    check_data(train, **counts, epochs=epochs, processes=processes)
    check_settings(held_out, **{name: kept[name] for name in ("lr", "beta", "warmup", "clip_norm", "patience")})
    uses_beta = kept["beta"] != 1 or kept["warmup"] > 0
    check_loss(inspection, loss, train, num_particles=kept["num_particles"], uses_beta=uses_beta)


def _train(
    trainer: Trainer,
    steps: tuple[Step, Step],
    epochs: int,
    progress: bool,
    run_dir: str | Path | None,
    resume: bool,
    config: dict[str, Any],
) -> None:
    """Begin the run or take it up, and leave the pair trained."""
    with own_random_state(trainer.processes.seed(trainer.settings.seed), trainer.device):
        if run_dir is not None:
            trainer.open_folder(Path(run_dir), resume, {"epochs": epochs, **config})
        elif resume:
            raise ValueError("resume needs run_dir, the folder of the run to continue")
        _epochs(trainer, steps, epochs, progress)
    if trainer.settings.patience is not None:
        trainer.restore_best()
    trainer.pair.eval()


def _converted(batch: tuple[Any, ...], precision: Precision | None) -> tuple[Any, ...]:
    return tuple(to_precision(each, precision) if isinstance(each, Tensor) else each for each in batch)


def _optimizer(make: MakeOptimizer | None, parameters: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    if make is None:
        # One pass over parameters and moments in place of a dozen.
        return torch.optim.Adam(parameters, lr=lr, fused=True)
    if not callable(make):
        raise ValueError(
            f"optimizer is {type(make).__name__}; it must be a function that makes one from the pair's parameters: "
            "lambda parameters: torch.optim.Adam(parameters, lr=1e-3)"
        )
    update = make(parameters)
    if isinstance(update, torch.optim.LBFGS):
        raise ValueError("LBFGS evaluates its loss several times a step, on new draws each time: use another optimiser")
    return update


def _schedule(
    make: MakeScheduler, update: torch.optim.Optimizer, validates: bool
) -> torch.optim.lr_scheduler.LRScheduler:
    schedule = make(update) if callable(make) else None
    if not isinstance(schedule, torch.optim.lr_scheduler.LRScheduler):
        given = make if schedule is None else schedule
        raise ValueError(
            f"scheduler gives {type(given).__name__}; it must make a scheduler of torch.optim.lr_scheduler from the "
            "optimiser: lambda optimizer: CosineAnnealingLR(optimizer, 20)"
        )
    if isinstance(schedule, torch.optim.lr_scheduler.ReduceLROnPlateau) and not validates:
        raise ValueError("ReduceLROnPlateau follows the validation loss: pass validation data")
    return schedule


def _described_schedule(schedule: torch.optim.lr_scheduler.LRScheduler | None) -> str | None:
    """Return a schedule's name with the numbers that it began with, and so its parts; functions have none."""
    if schedule is None:
        return None
    state = schedule.state_dict()
    kept = sorted(name for name in state if not name.startswith("_") or name == "_milestones")
    parts = [_described_schedule(part) or "" for part in getattr(schedule, "_schedulers", [])]
    return f"{type(schedule).__name__}({', '.join([*(f'{name}={state[name]}' for name in kept), *parts])})"


def _described(thing: object) -> str:
    """Return a loss's or an optimiser's name with the numbers that a resumed run is held to."""
    if isinstance(thing, torch.optim.Optimizer):
        numbers = {name: value for name, value in thing.defaults.items() if isinstance(value, (int, float, tuple))}
    elif isinstance(thing, pyro.infer.ELBO):
        # The rest of an ELBO's attributes says how its value is computed, and some change as it runs.
        numbers = {name: value for name, value in vars(thing).items() if name in NUMBERS_OF_A_LOSS}
    else:
        return getattr(thing, "__name__", type(thing).__name__)
    return f"{type(thing).__name__}({', '.join(f'{name}={value}' for name, value in sorted(numbers.items()))})"


def _steps(
    pair: Pair,
    loss: Loss,
    optimizer: torch.optim.Optimizer,
    settings: Settings,
    capture: Literal["auto"] | bool,
    tell: Callable[[str], object] | None,
) -> tuple[Step, Step]:
    """Return the step of a run's first batch, which Pyro validates and so is eager, and that of the others."""
    if capture not in ("auto", True, False):
        raise ValueError(f"capture is {capture!r}; it must be 'auto', True or False")
    if settings.compiled and capture is False:
        raise ValueError("compiled asks for the recording of a run with capture=False: leave one of them out")
    average = Averaging(pair) if settings.processes > 1 else None
    options: Any = {"num_particles": settings.num_particles, "clip_norm": settings.clip_norm, "average": average}
    eager = eager_step(pair, loss, optimizer, **options)
    if capture is False:
        return eager, eager
    # A compiled recording rounds otherwise than the eager step: a resumed run must begin it where the first did.
    after = 0 if capture is True or settings.compiled else STEPS_BEFORE_CAPTURE
    options |= {"compiled": settings.compiled, "after": after, "strict": capture is True, "tell": tell}
    return eager, captured_step(pair, loss, optimizer, **options)


def _epochs(trainer: Trainer, steps: tuple[Step, Step], epochs: int, progress: bool) -> None:
    columns = (*rich.progress.Progress.get_default_columns()[:-1], rich.progress.TimeElapsedColumn())
    with rich.progress.Progress(*columns, disable=not progress, console=console) as bar:
        task = bar.add_task("training", total=epochs, completed=trainer.epoch)
        try:
            while trainer.epoch < epochs and not trainer.out_of_patience():
                record = trainer.run_epoch(*steps)
                shown = record["validation_loss"] if record["validation_loss"] is not None else record["loss"]
                bar.update(task, completed=trainer.epoch, description=f"epoch {trainer.epoch}: {shown:.3f} nats")
            trainer.flush()
        except KeyboardInterrupt as interrupt:
            _flush(trainer)
            interrupt.add_note(trainer.how_to_resume())
            raise
        except LostProcessError as error:
            _flush(trainer)
            raise LostProcessError(f"{error}; {trainer.how_to_resume()}") from error
        except Exception:
            _flush(trainer)
            raise


def _flush(trainer: Trainer) -> None:
    # When a process is lost, torchrun ends the others, perhaps just now: an interrupt is met by a second attempt.
    for _ in range(2):
        with suppress(KeyboardInterrupt):
            trainer.flush()
            return
