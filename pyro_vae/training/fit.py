"""``fit``: train a pair."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from dataclasses import replace
from numbers import Real
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import rich.progress
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor

from pyro_vae.capture.program import Capture, check_capture
from pyro_vae.inspection import Inspection, inspect
from pyro_vae.inspection.arrays import takes_arrays
from pyro_vae.objectives.bounds import elbo
from pyro_vae.objectives.loss import WEIGHED, Loss, check_is_loss, check_loss
from pyro_vae.pair.modes import kept_in_evaluation, normalises, rehearsal, remember_kept
from pyro_vae.pair.pair import Pair
from pyro_vae.pair.trace import trace_pair
from pyro_vae.runtime.batches import Batches
from pyro_vae.runtime.device import resolve_device
from pyro_vae.runtime.distributed import Averaging, LostProcessError, Processes, join
from pyro_vae.runtime.progress import error_console
from pyro_vae.runtime.random_state import own_random_state
from pyro_vae.runtime.scalars import real, whole
from pyro_vae.runtime.threads import one_at_a_time
from pyro_vae.training.arguments import (
    Data,
    Identity,
    Settings,
    as_batch,
    fingerprint,
    next_seeds,
    remember_seeds,
    split,
)
from pyro_vae.training.captured_step import captured_step
from pyro_vae.training.optimizers import (
    MakeOptimizer,
    MakeScheduler,
    check_moves_all,
    described,
    described_schedule,
    make_optimizer,
    make_schedule,
    rate_of,
)
from pyro_vae.training.precision import Precision, check_precision, share_of_bfloat16, to_precision
from pyro_vae.training.run_folder import RunFolder
from pyro_vae.training.step import Step, eager_step
from pyro_vae.training.trainer import NonFiniteBatchError, Trainer

__all__ = ["Run", "fit"]

# Capturing a program takes about as long as this many small steps: "auto" waits until a kind of step has come as often.
STEPS_BEFORE_CAPTURE = 50


class Run(NamedTuple):
    """The result of :func:`fit`: the trained pair, one record per epoch, and the run folder.

    A record holds ``epoch``, ``seconds``, ``loss`` (training), ``validation_loss`` (−ELBO), ``beta``, ``lr``,
    ``terms`` (each site's share of −ELBO) and ``monitor`` (e.g. γ of a scale). Losses are in nats per datum.
    """

    pair: Pair
    metrics: list[dict[str, Any]]
    run_dir: Path | None


@one_at_a_time
@takes_arrays
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
    lr: float | None = None,
    scheduler: MakeScheduler | None = None,
    beta: float = 1.0,
    warmup: float = 0,
    clip_norm: float | None = None,
    patience: int | None = None,
    capture: Capture = "auto",
    compiled: bool = False,
    precision: Precision | None = None,
    tf32: bool = False,
    seed: int | None = None,
    device: str | torch.device = "auto",
    run_dir: str | Path | None = None,
    resume: bool = False,
    config: dict[str, Any] | None = None,
    progress: bool = True,
) -> Run:
    """Train a pair by stochastic variational inference.

    Each step minimises the mean loss per datum of one batch:

    −(1/B) Σ_b ELBO_b,      ELBO_b = E_q(z | x_b) [log p(x_b | z) + β (log p(z) − log q(z | x_b))]

    Validation data are scored by −ELBO. The caller's random state does not change.

    Under ``torchrun`` every process calls ``fit`` with all of the data. Each takes its share of batches of
    ``batch_size`` × number of processes, and gradients are averaged over the whole batch. The trained pair is the same
    in every process; the first one writes the run folder.

    Args:
        pair: the pair, which is trained in place and stays on the device. Modules in evaluation mode inside a pair in
            training mode keep theirs, and so do frozen ones that an earlier run left so.
        data: ``x`` (N, …), a tuple of ``x`` and the pair's conditions, N rows each, or a data set of
            :mod:`pyro_vae.data`, whose training images are taken. Data are copied to the GPU if they fit in half of its
            free memory, and streamed batch by batch otherwise.
        epochs: passes over the data; a resumed run counts those already done.
        batch_size: data per step and process. The last batch of an epoch may be shorter. Under batch normalisation a
            single last datum joins the batch before it.
        loss: a Pyro ELBO (``Trace_ELBO()`` by default), which is minimised, or an objective such as
            :func:`~pyro_vae.objectives.iwae`, which is maximised.
        num_particles: draws of z per datum for an objective. A Pyro ELBO has its number, e.g.
            ``Trace_ELBO(num_particles=5)``.
        validation: held-out data, or the share of ``data`` to hold out.
        optimizer: an optimiser class of torch, or a function from the parameters to an optimiser, which sets its
            learning rate itself; fused Adam by default.
        lr: learning rate of the default optimiser, 0.001 without it, or of an optimiser class.
        scheduler: a function from the optimiser to a scheduler of ``torch.optim.lr_scheduler``. It takes a step after
            each epoch; a ``ReduceLROnPlateau`` follows the validation loss.
        beta: β, the weight of the divergence of a Pyro ELBO. An objective takes its weight itself, e.g.
            :func:`~pyro_vae.objectives.beta_elbo`.
        warmup: epochs over which β rises linearly from 0 to ``beta``.
        clip_norm: largest global norm of the gradient.
        patience: epochs without a better validation loss after which training stops. The best parameters are then
            restored.
        capture: "auto", True or False. A captured step traces one step and replays the recorded tensor operations:
            bitwise the results of Pyro's eager step, and faster. "auto" captures after 50 eager steps of one shape, and
            falls back to eager steps, with one warning, if the pair cannot be captured; True captures at once and
            raises instead; False is always eager. If your model reads a Python value that changes during training,
            store it as an attribute of an ``nn.Module``, or use False. On a GPU the step becomes one CUDA graph, if the
            optimiser is fused or capturable.
        compiled: whether to compile the captured step. It takes seconds to a minute, pays in long runs and needs a C++
            compiler. Results are then equal up to rounding.
        precision: "float32" or "float64" convert pair and data; None leaves them as they are. "bf16-mixed" runs the
            pair's networks under torch's autocast to bfloat16 while training; parameters, densities and sums stay in
            float32. Evaluation always runs in full precision. A processor without instructions for bfloat16 refuses it.
        tf32: whether a GPU may round the operands of float32 matmuls to TF32 while training.
        seed: seed of the shuffling and of every draw. Without it the pair's first call has seed 0, a later call one
            derived from the call before, and a resumed run that of its beginning: a loop of calls goes on as one call
            would. A share that is held out stays the same over a pair's calls.
        device: "cpu", "cuda", or "auto" for a GPU if there is one.
        run_dir: folder for configuration, metrics and checkpoints; None saves nothing.
        resume: whether to resume the run in ``run_dir``. On a CPU the result is bitwise that of an unbroken run.
        config: further entries of ``config.json``.
        progress: whether to draw a progress bar.

    Returns:
        :class:`Run`.

    Raises:
        ValueError: for bad data or settings, before the first step; for a loss that is not finite, naming the site. The
            batch is then saved, and the last checkpoint is intact. A GPU notices at the end of the epoch at the latest.
        LostProcessError: if another process of the run has ended.

    Reference:
        Kingma and Welling (2014), Auto-encoding variational Bayes, ICLR.

    >>> import torch, pyro_vae as pv
    >>> pair = pv.models.LinearGaussianVAE(3, 1)
    >>> run = fit(pair, torch.randn(64, 3), epochs=2, batch_size=32, progress=False)
    >>> [record["epoch"] for record in run.metrics]
    [1, 2]
    """
    if not isinstance(pair, Pair):
        raise ValueError(f"pair is {_kind_of(pair)}; it must be an instance of a subclass of pv.Pair")
    loss = Trace_ELBO() if loss is None else loss
    check_is_loss(loss)
    epochs, batch_size = whole(epochs, "epochs"), whole(batch_size, "batch_size")
    num_particles = whole(num_particles, "num_particles")
    patience, seed = (None if n is None else whole(n, name) for n, name in ((patience, "patience"), (seed, "seed")))
    beta, warmup = real(beta, "beta"), real(warmup, "warmup")
    lr, clip_norm = (None if n is None else real(n, name) for n, name in ((lr, "lr"), (clip_norm, "clip_norm")))
    _check_folder(run_dir, config)
    _check_capture(capture, compiled)
    processes, target = _place(device, precision, tf32, resume)
    folder = RunFolder(None if run_dir is None else Path(run_dir), processes)
    seeds = folder.seeds(seed) if resume else next_seeds(pair, seed)
    train, held_out, inspection = _data(pair, data, validation, precision, seeds.split)
    settings = Settings(batch_size, lr, beta, warmup, clip_norm, num_particles, patience, *seeds, compiled, tf32)
    settings.check(train, held_out, epochs=epochs, processes=processes.size)
    _check_one_datum(inspection, settings)
    check_loss(inspection, loss, train, num_particles=num_particles, uses_beta=settings.uses_beta)
    update = make_optimizer(optimizer, list(pair.to(target).parameters()), lr)
    check_moves_all(pair, update)
    # Before a scheduler moves it.
    settings = replace(settings, lr=rate_of(update))
    schedule = None if scheduler is None else make_schedule(scheduler, update, held_out is not None)
    identity = _identity(settings, loss, update, schedule, (train, held_out), precision or _dtype(pair), processes)
    in_bfloat16 = list(inspection.networks) if precision == "bf16-mixed" else []
    weighed = loss is elbo or isinstance(loss, WEIGHED)
    batches = Batches(train, target)
    trainer = Trainer(pair, update, schedule, batches, held_out, settings, processes, in_bfloat16, weighed)
    shows = progress and processes.is_first
    if shows and in_bfloat16:
        error_console.print(f"a matmul in bfloat16 takes {share_of_bfloat16(target):.2f} of its time in float32 here")
    steps = _steps(trainer, loss, capture, error_console.print if shows else None)
    with closing(folder), own_random_state(processes.seed(seeds.run), trainer.device):
        state = folder.open(trainer.state(), identity, {"epochs": epochs, **(config or {})}, resume=resume)
        if state is not None:
            trainer.restore(state)
        # Before the first step: a run that breaks off has used its seed too.
        remember_seeds(pair, seeds)
        remember_kept(pair, trainer.kept)
        _train(trainer, steps, folder, epochs, shows)
    pair.eval()
    return Run(pair, trainer.metrics, folder.path)


def _kind_of(thing: object) -> str:
    return f"the class {thing.__name__}" if isinstance(thing, type) else f"of type {type(thing).__name__}"


def _check_folder(run_dir: object, config: object) -> None:
    if not isinstance(run_dir, (str, PathLike, type(None))):
        raise ValueError(f"run_dir is {_kind_of(run_dir)}; it must be a path")
    if not isinstance(config, (Mapping, type(None))):
        raise ValueError(f"config is {_kind_of(config)}; it must be a dictionary of entries for config.json")
    if config and run_dir is None:
        raise ValueError("config adds entries to a run folder's config.json: give run_dir too, or leave config out")


def _check_capture(capture: Capture, compiled: bool) -> None:
    check_capture(capture)
    if compiled and capture is False:
        raise ValueError("compiled asks for the recording of a run with capture=False: leave one of them out")


def _place(
    device: str | torch.device, precision: Precision | None, tf32: bool, resume: bool
) -> tuple[Processes, torch.device]:
    """Return the processes of the run, joined, and the device of this one."""
    target = resolve_device(device)
    check_precision(precision, tf32, target, resume=resume)
    processes = join(target)
    return processes, processes.device(target)


def _dtype(pair: Pair) -> str:
    return str(next(pair.parameters()).dtype).removeprefix("torch.")


def _data(
    pair: Pair, data: Data, validation: Data | float | None, precision: Precision | None, seed: int
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...] | None, Inspection]:
    """Convert pair and data to the run's precision; return training data, held-out data and the pair's inspection."""
    batch = _converted(as_batch(data), precision)
    to_precision(pair, precision)
    if not any(parameter.requires_grad for parameter in pair.parameters()):
        raise ValueError(f"{type(pair).__name__} has no parameters to train")
    inspection = inspect(pair, batch, "data")
    if validation is not None and not isinstance(validation, (int, float, Real)):
        validation = _converted(as_batch(validation), precision)
        inspection.check(validation, "validation")
    return (*split(batch, validation, seed), inspection)


def _converted(batch: tuple[Any, ...], precision: Precision | None) -> tuple[Any, ...]:
    return tuple(to_precision(each, precision) if isinstance(each, Tensor) else each for each in batch)


def _identity(
    settings: Settings,
    loss: Loss,
    update: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler | None,
    data: tuple[tuple[Tensor, ...], tuple[Tensor, ...] | None],
    precision: str,
    processes: Processes,
) -> Identity:
    """Return everything that a resumed run must share, and refuse processes that were given different data."""
    train, held_out = map(fingerprint, data)
    processes.check_same((train, held_out))
    return Identity(
        settings,
        loss=described(loss),
        optimizer=described(update),
        scheduler=described_schedule(schedule),
        data=train,
        validation=held_out,
        precision=precision,
        processes=processes.size,
    )


def _check_one_datum(inspection: Inspection, settings: Settings) -> None:
    """Refuse batches of one datum for a pair that normalises by batches and cannot run on one."""
    pair = inspection.pair
    if settings.batch_size > 1 or not normalises(pair, kept_in_evaluation(pair)):
        return
    try:
        with rehearsal(pair, seed=0):
            trace_pair(pair, *(tensor[:1] for tensor in inspection.batch))
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            # Another fault, which training reports.
            return
        raise ValueError(
            "batch_size is 1, and the pair normalises by batches, which takes two data at least: raise batch_size, or "
            "put the norm in evaluation mode (norm.eval())"
        ) from error


def _steps(trainer: Trainer, loss: Loss, capture: Capture, tell: Callable[[str], object] | None) -> tuple[Step, Step]:
    """Return the step of a run's first batch, which Pyro validates and so is eager, and that of all other batches."""
    pair, optimizer, settings = trainer.pair, trainer.optimizer, trainer.settings
    average = Averaging(pair, trainer.processes) if trainer.processes.size > 1 else None
    particles, clip_norm = settings.num_particles, settings.clip_norm
    eager = eager_step(pair, loss, optimizer, num_particles=particles, clip_norm=clip_norm, average=average)
    if capture is False:
        return eager, eager
    captured = captured_step(
        pair,
        loss,
        optimizer,
        num_particles=particles,
        clip_norm=clip_norm,
        compiled=settings.compiled,
        # A compiled program rounds otherwise than the eager step: a resumed run must begin it at the same step.
        after=0 if capture is True or settings.compiled else STEPS_BEFORE_CAPTURE,
        strict=capture is True,
        tell=tell,
        average=average,
    )
    return eager, captured


def _train(trainer: Trainer, steps: tuple[Step, Step], folder: RunFolder, epochs: int, progress: bool) -> None:
    """Run epochs and save each; however they end, leave a folder that can be resumed."""
    columns = (*rich.progress.Progress.get_default_columns()[:-1], rich.progress.TimeElapsedColumn())
    with rich.progress.Progress(*columns, disable=not progress, console=error_console) as bar:
        task = bar.add_task("training", total=epochs, completed=trainer.epoch)
        try:
            while trainer.epoch < epochs and not trainer.out_of_patience():
                record = trainer.run_epoch(*steps)
                folder.save(trainer.state)
                shown = record["validation_loss"] if record["validation_loss"] is not None else record["loss"]
                bar.update(task, completed=trainer.epoch, description=f"epoch {trainer.epoch}: {shown:.3f} nats")
            folder.flush()
            if trainer.restore_best():
                folder.save_best(trainer.pair)
        except KeyboardInterrupt as interrupt:
            _flush(folder)
            interrupt.add_note(folder.how_to_resume(trainer.epoch))
            raise
        except LostProcessError as error:
            _flush(folder)
            raise LostProcessError(f"{error}; {folder.how_to_resume(trainer.epoch)}") from error
        except NonFiniteBatchError as error:
            saved = folder.save_failed_batch(error.rows, trainer.epoch)
            raise NonFiniteBatchError(error.epoch, error.sites, error.rows, saved) from error.__cause__
        except Exception:
            # A disk that is full has raised already.
            with suppress(OSError):
                _flush(folder)
            raise


def _flush(folder: RunFolder) -> None:
    # A lost process makes torchrun end the others, perhaps just now: an interrupt gets a second attempt.
    for _ in range(2):
        with suppress(KeyboardInterrupt):
            folder.flush()
            return
