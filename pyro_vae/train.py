"""``fit``: epochs, data, devices, checkpoints and records around a training step."""

from __future__ import annotations

import json
import math
import platform
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyro
import rich.progress
import torch
from pyro.infer import Trace_ELBO
from rich.console import Console
from torch import Tensor, nn

from pyro_vae._version import __version__
from pyro_vae.capture import captured_step
from pyro_vae.checkpoint import load_state, read_json, restore, save_parameters, save_state, write_text
from pyro_vae.checks import check_batch
from pyro_vae.inputs import Data, as_batch, check_data, check_settings, fingerprint, resolve_device, split
from pyro_vae.pair import Pair, device_of, site_terms
from pyro_vae.randomness import own_random_state
from pyro_vae.svi import Loss, NonFiniteLossError, Step, check_loss, eager_step, non_finite_sites

__all__ = ["Run", "fit"]

MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
# Recording a program takes about as long as this many small steps: runs that take fewer of a kind do not record it.
STEPS_BEFORE_CAPTURE = 50
# Without validation data the terms of the loss are followed on this many training data.
FOLLOWED = 512


class Run(NamedTuple):
    """What :func:`fit` leaves: the trained pair, one record per epoch, and where the files are.

    Each record holds ``epoch``, ``seconds``, ``loss`` (training), ``validation_loss`` (−ELBO), ``beta``, ``terms``
    (each site's share of −ELBO) and ``monitor`` (γ and the like); all in nats per datum.
    """

    pair: Pair
    metrics: list[dict[str, Any]]
    run_dir: Path | None


@dataclass(frozen=True)
class _Settings:
    """What must not change between the parts of one run."""

    batch_size: int
    lr: float
    beta: float
    warmup: int
    clip_norm: float | None
    num_particles: int
    patience: int | None
    seed: int
    loss: str
    optimizer: str
    compiled: bool
    data: str
    validation: str


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
    beta: float = 1.0,
    warmup: int = 0,
    clip_norm: float | None = None,
    patience: int | None = None,
    capture: Literal["auto"] | bool = "auto",
    compiled: bool = False,
    seed: int = 0,
    device: str | torch.device = "auto",
    run_dir: str | Path | None = None,
    resume: bool = False,
    config: dict[str, Any] | None = None,
    progress: bool = True,
) -> Run:
    """Train a pair by stochastic variational inference.

    The optimiser sees the mean loss per datum of each batch. The caller's random state is left as it was.

    Args:
        pair: any pair; it is trained in place and left on the device.
        data: ``x`` (N, …), a tuple of ``x`` and the pair's conditions, each with N rows, or a data set of
            :mod:`pyro_vae.data`, for its training images.
        epochs: passes over the data, those of a resumed run included.
        batch_size: data per step; the last batch of an epoch may be shorter.
        loss: any Pyro ELBO (``Trace_ELBO()`` by default), or an objective to maximise, such as
            :func:`~pyro_vae.objectives.iwae`.
        num_particles: draws per datum for an objective; a Pyro ELBO holds its own.
        validation: held-out data, or the share of ``data`` to hold out.
        optimizer: makes a torch optimiser from the parameters; Adam with ``lr`` by default.
        beta: weight of the divergence terms.
        warmup: epochs over which β rises linearly from 0 to ``beta``.
        clip_norm: largest global norm of the gradient.
        patience: epochs without a better validation loss after which training stops and the best parameters return.
        capture: whether steps replay a recording of the pair's program, which gives the same bits as Pyro's eager step
            in less time. "auto" records when that pays, and warns, once, of what it cannot record and trains eagerly;
            True records from the start and raises instead; False is eager.
        compiled: whether to compile the recording, which takes a while, pays in long runs and needs a C++ compiler. A
            resumed run then equals an unbroken one up to rounding.
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
            named, the batch kept and the last good checkpoint intact.

    >>> import torch, pyro_vae as pv
    >>> pair = pv.models.LinearGaussianVAE(3, 1)
    >>> run = fit(pair, torch.randn(64, 3), epochs=2, batch_size=32, progress=False)
    >>> [record["epoch"] for record in run.metrics]
    [1, 2]
    """
    loss = Trace_ELBO() if loss is None else loss
    target, batch = resolve_device(device), as_batch(data)
    check_batch(pair, batch, "data")
    train, held_out = split(batch, validation, seed)
    check_data(pair, train, held_out, batch_size=batch_size, epochs=epochs, num_particles=num_particles)
    check_settings(held_out, lr=lr, beta=beta, warmup=warmup, clip_norm=clip_norm, patience=patience)
    check_loss(pair, loss, train, num_particles=num_particles, uses_beta=beta != 1 or warmup > 0)
    make = optimizer or (lambda parameters: torch.optim.Adam(parameters, lr=lr))
    update = make(list(pair.to(target).parameters()))
    if isinstance(update, torch.optim.LBFGS):
        raise ValueError("LBFGS evaluates its loss several times a step, on new draws each time: use another optimiser")
    settings = _Settings(
        *(batch_size, lr, beta, warmup, clip_norm, num_particles, patience, seed),
        *(_described(loss), _described(update), compiled, fingerprint(train), fingerprint(held_out)),
    )
    trainer = _Trainer(pair, update, train, held_out, settings)
    steps = _steps(pair, loss, update, settings, capture)
    folder = None if run_dir is None else Path(run_dir)
    with own_random_state(seed, target):
        if folder is not None:
            trainer.open_folder(folder, resume, {"epochs": epochs, **(config or {})})
        elif resume:
            raise ValueError("resume needs run_dir, the folder of the run to continue")
        _epochs(trainer, steps, epochs, progress)
    if patience is not None:
        trainer.restore_best()
    pair.eval()
    return Run(pair, trainer.metrics, folder)


def _described(thing: object) -> str:
    """Return a loss's or an optimiser's name with the numbers that a resumed run is held to."""
    if isinstance(thing, torch.optim.Optimizer):
        numbers = {name: value for name, value in thing.defaults.items() if isinstance(value, (int, float, tuple))}
    elif isinstance(thing, pyro.infer.ELBO):
        # The rest of an ELBO's attributes says how its value is computed, and some change as it runs.
        numbers = {name: value for name, value in vars(thing).items() if name in ("alpha", "num_particles")}
    else:
        return getattr(thing, "__name__", type(thing).__name__)
    return f"{type(thing).__name__}({', '.join(f'{name}={value}' for name, value in sorted(numbers.items()))})"


def _steps(
    pair: Pair, loss: Loss, optimizer: torch.optim.Optimizer, settings: _Settings, capture: Literal["auto"] | bool
) -> tuple[Step, Step]:
    """Return the step of an epoch's first batch, which Pyro validates and so is eager, and that of the others."""
    if capture not in ("auto", True, False):
        raise ValueError(f"capture is {capture!r}; it must be 'auto', True or False")
    if settings.compiled and capture is False:
        raise ValueError("compiled asks for the recording of a run with capture=False: leave one of them out")
    options: Any = {"num_particles": settings.num_particles, "clip_norm": settings.clip_norm}
    eager = eager_step(pair, loss, optimizer, **options)
    if capture is False:
        return eager, eager
    # A compiled recording rounds otherwise than the eager step: a resumed run must begin it where the first did.
    after = 0 if capture is True or settings.compiled else STEPS_BEFORE_CAPTURE
    options |= {"compiled": settings.compiled, "after": after, "strict": capture is True}
    return eager, captured_step(pair, loss, optimizer, **options)


def _epochs(trainer: _Trainer, steps: tuple[Step, Step], epochs: int, progress: bool) -> None:
    columns = (*rich.progress.Progress.get_default_columns()[:-1], rich.progress.TimeElapsedColumn())
    with rich.progress.Progress(*columns, disable=not progress, console=Console(stderr=True)) as bar:
        task = bar.add_task("training", total=epochs, completed=trainer.epoch)
        try:
            while trainer.epoch < epochs and not trainer.out_of_patience():
                record = trainer.run_epoch(*steps)
                shown = record["validation_loss"] if record["validation_loss"] is not None else record["loss"]
                bar.update(task, completed=trainer.epoch, description=f"epoch {trainer.epoch}: {shown:.3f} nats")
        except KeyboardInterrupt as interrupt:
            interrupt.add_note(trainer.how_to_resume())
            raise


class _Trainer:
    """The state of a run between epochs, and its files."""

    def __init__(
        self,
        pair: Pair,
        optimizer: torch.optim.Optimizer,
        train: tuple[Tensor, ...],
        held_out: tuple[Tensor, ...] | None,
        settings: _Settings,
    ) -> None:
        self.pair, self.optimizer, self.settings = pair, optimizer, settings
        self.device = device_of(pair)
        self.train = tuple(tensor.to(self.device) for tensor in train)
        self.held_out = None if held_out is None else tuple(tensor.to(self.device) for tensor in held_out)
        self.epoch = self.saved = 0
        self.metrics: list[dict[str, Any]] = []
        self.best: dict[str, Tensor] | None = None
        self.folder: Path | None = None

    def run_epoch(self, first: Step, step: Step) -> dict[str, Any]:
        """Take one pass over the data in an order drawn from (seed, epoch), then record and save it."""
        start = time.perf_counter()
        self.pair.train()
        size, total, beta = len(self.train[0]), 0.0, 0.0
        # The order depends on nothing but seed and epoch, so that a resumed run draws the same one.
        generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + self.epoch)
        order = torch.randperm(size, generator=generator).to(self.device)
        steps = math.ceil(size / self.settings.batch_size)
        for i, rows in enumerate(order.split(self.settings.batch_size)):
            beta = self._beta(self.epoch + i / steps)
            total += self._guarded(
                step if i else first, tuple(tensor[rows] for tensor in self.train), beta, i == 0
            ) * len(rows)
        record = {"epoch": self.epoch + 1, "seconds": time.perf_counter() - start, "loss": total / size, "beta": beta}
        record.update(self._follow())
        self.epoch += 1
        self.metrics.append(record)
        if self.settings.patience is not None and self._best_epoch() == self.epoch:
            self.best = {name: value.clone() for name, value in self.pair.state_dict().items()}
        self.save()
        return record

    def _beta(self, epochs_done: float) -> float:
        warmup = self.settings.warmup
        return self.settings.beta * (min(1.0, epochs_done / warmup) if warmup else 1.0)

    def _guarded(self, step: Step, batch: tuple[Tensor, ...], beta: float, validate: bool) -> float:
        """Take a step; Pyro validates an epoch's first batch only, since the data as a whole were checked before."""
        try:
            validate = validate and pyro.infer.util.is_validation_enabled()
            with pyro.validation_enabled(validate), warnings.catch_warnings():
                # Pyro warns of a NaN that is an error here, with the site named.
                warnings.filterwarnings("ignore", "Encountered NaN")
                return step(*batch, beta=beta)
        except (ValueError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
            sites = non_finite_sites(self.pair, *batch)
            if not sites and not isinstance(error, NonFiniteLossError):
                raise
            where = f"at {', '.join(sites)}" if sites else "though every site is finite on a second draw"
            kept = ""
            if self.folder is not None:
                path = self.folder / "non_finite_batch.pt"
                save_state({"batch": [tensor.cpu() for tensor in batch]}, path)
                kept = f"; the batch is in {path}, the checkpoint is that of epoch {self.epoch}"
            raise NonFiniteLossError(
                f"the loss is not finite in epoch {self.epoch + 1}, {where}{kept}: lower lr, clip gradients "
                "(clip_norm) or raise the floor of a learned scale"
            ) from error

    @torch.no_grad()
    def _follow(self) -> dict[str, Any]:
        """Return each site's share of −ELBO on held-out data, with the same draws after every epoch."""
        self.pair.eval()
        batch = self.held_out or tuple(tensor[:FOLLOWED] for tensor in self.train)
        sums: dict[str, float] = {}
        with own_random_state(self.settings.seed, self.device), pyro.validation_enabled(False):
            for rows in torch.arange(len(batch[0]), device=self.device).split(FOLLOWED):
                for name, term in site_terms(self.pair, *(tensor[rows] for tensor in batch)).items():
                    sums[name] = sums.get(name, 0.0) + float((term.log_guide - term.log_model).sum())
        terms = {name: value / len(batch[0]) for name, value in sums.items()}
        monitor = {n: m.monitor() for n, m in self.pair.named_modules() if hasattr(m, "monitor")}
        total = sum(terms.values()) if self.held_out is not None else None
        return {"validation_loss": total, "terms": terms, "monitor": monitor}

    def _best_epoch(self) -> int:
        return int(min(self.metrics, key=lambda record: float(record["validation_loss"]))["epoch"])

    def out_of_patience(self) -> bool:
        """Tell whether the validation loss has not improved for ``patience`` epochs."""
        patience = self.settings.patience
        return patience is not None and bool(self.metrics) and self.epoch - self._best_epoch() >= patience

    def restore_best(self) -> None:
        """Put the parameters of the best epoch back."""
        if self.best is not None:
            self.pair.load_state_dict(self.best)
            if self.folder is not None:
                save_parameters(self.pair, self.folder / "checkpoint" / "pair.safetensors")

    def open_folder(self, folder: Path, resume: bool, config: dict[str, Any]) -> None:
        """Begin a run folder, or take up the run that a folder holds."""
        self.folder = folder
        existing = (folder / "config.json").exists()
        before: dict[str, Any] = {}
        own = {"pair": type(self.pair).__name__, "fit": asdict(self.settings)}
        if resume:
            before = read_json(folder / "config.json")
            self._resume(before, own, config)
        elif existing:
            raise ValueError(f"{folder} already holds a run: choose another folder, or continue it (resume, --resume)")
        versions = {"pyro_vae": __version__, "torch": torch.__version__, "pyro": pyro.__version__}
        versions["python"] = platform.python_version()
        # The checkpoint first: a folder with a configuration is taken for a run.
        self.save()
        text = json.dumps({**before, **own, "versions": versions, **config}, indent=2)
        write_text(folder / "config.json", text + "\n")

    def _resume(self, config: dict[str, Any], own: dict[str, Any], given: dict[str, Any]) -> None:
        assert self.folder is not None
        # Through JSON and back, as what was kept has gone.
        own, given = json.loads(json.dumps(own)), json.loads(json.dumps(given))
        changed = [k for k, value in own["fit"].items() if config.get("fit", {}).get(k) != value]
        changed += [k for k, value in given.items() if k != "epochs" and config.get(k, value) != value]
        if config.get("pair") != own["pair"]:
            raise ValueError(f"{self.folder} holds a run of {config.get('pair')}, not of {own['pair']}")
        if changed:
            raise ValueError(
                f"{self.folder} was begun with other settings: {', '.join(changed)}; only epochs may change"
            )
        state = load_state(self.folder / "checkpoint" / "state.pt", own["pair"])
        restore(self.pair, state["pair"], self.folder)
        self.optimizer.load_state_dict(state["optimizer"])
        self.epoch, self.metrics, self.best = state["epoch"], state["metrics"], state["best"]
        torch.set_rng_state(state["rng"])
        if self.device.type == "cuda" and state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)

    def how_to_resume(self) -> str:
        """Say where an interrupted run stands, and how it goes on."""
        if self.folder is None:
            return f"interrupted in epoch {self.epoch + 1}"
        return (
            f"interrupted in epoch {self.saved + 1}; {self.folder} holds epoch {self.saved}: continue it by the same "
            "call with resume=True (the same command with --resume)"
        )

    def save(self) -> None:
        """Write the checkpoint and the record of the epochs so far; each file is replaced whole."""
        if self.folder is None:
            return
        state = {
            "model": type(self.pair).__name__,
            "pair": self.pair.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "epoch": self.epoch,
            "metrics": self.metrics,
            "best": self.best,
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }
        save_state(state, self.folder / "checkpoint" / "state.pt")
        self.saved = self.epoch
        save_parameters(self.pair, self.folder / "checkpoint" / "pair.safetensors")
        write_text(self.folder / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in self.metrics))
