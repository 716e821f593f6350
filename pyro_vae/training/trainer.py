"""A run's state between epochs: what an epoch does, what is followed, and the files that a run folder holds."""

from __future__ import annotations

import json
import math
import platform
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from pyro_vae._version import __version__
from pyro_vae.capture.cuda_graph import GraphedStep
from pyro_vae.pair.annealed import annealed
from pyro_vae.pair.modes import device_of
from pyro_vae.pair.pair import Pair
from pyro_vae.pair.trace import site_terms
from pyro_vae.runtime.batches import Batch, Batches, Rows
from pyro_vae.runtime.distributed import Processes
from pyro_vae.runtime.files import read_json, write_text
from pyro_vae.runtime.random_state import own_random_state, seed_generators
from pyro_vae.training.precision import float32_products, mixed
from pyro_vae.training.run_folder import load_state, restore, save_parameters, save_state
from pyro_vae.training.step import NonFiniteLossError, Step, non_finite_sites

__all__ = ["Settings", "Trainer"]

# Without validation data the terms of the loss are followed on this many training data.
FOLLOWED = 512
# Losses that stay on the device are read back at the end of an epoch, and of every so many steps.
STEPS_BETWEEN_READINGS = 1000
# Saving may take this share of a run's time. Epochs in between are held in memory, and written if the run breaks off.
SHARE_OF_SAVING = 0.05


@dataclass(frozen=True)
class Settings:
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
    scheduler: str | None
    compiled: bool
    data: str
    validation: str
    precision: str
    tf32: bool
    processes: int


class Trainer:
    """The state of a run between epochs, and its files."""

    def __init__(
        self,
        pair: Pair,
        optimizer: torch.optim.Optimizer,
        scheduler: torch.optim.lr_scheduler.LRScheduler | None,
        train: Batches,
        held_out: tuple[Tensor, ...] | None,
        settings: Settings,
        processes: Processes,
        in_bfloat16: list[nn.Module],
    ) -> None:
        self.pair, self.optimizer, self.settings, self.processes = pair, optimizer, settings, processes
        self.scheduler = scheduler
        self.device = device_of(pair)
        self.train, self.in_bfloat16 = train, in_bfloat16
        self.validates = held_out is not None
        self.followed = tuple(t.to(self.device) for t in (held_out or train.first(FOLLOWED)))
        self.epoch = self.saved = 0
        self.metrics: list[dict[str, Any]] = []
        self.best: dict[str, Tensor] | None = None
        self.folder: Path | None = None
        self.unsaved: dict[str, Any] | None = None
        self.next_save = 0.0
        self.validated = False
        # Whether the loss is an ELBO whose divergence β weighs; others have weights of their own, or none.
        self.weighs_divergence = True

    def run_epoch(self, first: Step, step: Step) -> dict[str, Any]:
        """Take one pass over the data in an order drawn from (seed, epoch), then record and keep it."""
        start = time.perf_counter()
        self.pair.train()
        if self.processes.size > 1:
            # Every process draws noise of its own, which a resumed run must find again though one of them kept files.
            seed_generators(self.processes.seed(self.settings.seed, self.epoch + 1), self.device)
        size, beta = len(self.train), 0.0
        # The order depends on nothing but seed and epoch, so that a resumed run draws the same one.
        generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + self.epoch)
        order = torch.randperm(size, generator=generator)
        parts = order.split(self.settings.batch_size * self.processes.size)
        losses: list[float | Tensor] = []
        # A walk over all modules at each step would take as long as a small network's update.
        read, numbers = 0, annealed(self.pair)
        with self._products():
            shares = [self.processes.share(part) for part in parts]
            for i, batch in enumerate(self.train(shares)):
                beta = self._beta(self.epoch + i / len(parts))
                for number in numbers:
                    number.move_to(self.epoch + i / len(parts))
                losses.append(self._guarded(step if self.validated else first, batch, beta))
                self.validated = True
                if i + 1 == len(parts) or i + 1 - read >= STEPS_BETWEEN_READINGS:
                    losses[read:] = self._read(losses[read:], shares[read:])
                    read = i + 1
        total = math.fsum(float(loss) * len(part) for loss, part in zip(losses, parts, strict=True))
        record: dict[str, Any] = {"epoch": self.epoch + 1, "seconds": time.perf_counter() - start, "loss": total / size}
        record["beta"] = beta if self.weighs_divergence else None
        record["lr"] = float(self.optimizer.param_groups[0]["lr"])
        record.update(self._follow())
        if isinstance(self.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            self.scheduler.step(record["validation_loss"])
        elif self.scheduler is not None:
            self.scheduler.step()
        self.epoch += 1
        self.metrics.append(record)
        if self.settings.patience is not None and self._best_epoch() == self.epoch:
            self.best = {name: value.clone() for name, value in self.pair.state_dict().items()}
        self._keep()
        return record

    @contextmanager
    def _products(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(float32_products(self.device, self.settings.tf32))
            stack.enter_context(mixed(self.in_bfloat16, self.device))
            yield

    def _beta(self, epochs_done: float) -> float:
        warmup = self.settings.warmup
        return self.settings.beta * (min(1.0, epochs_done / warmup) if warmup else 1.0)

    def _guarded(self, step: Step, batch: Batch, beta: float) -> float | Tensor:
        """Take a step; Pyro validates the first one only, since the data as a whole were checked before."""
        try:
            validate = not self.validated and pyro.infer.util.is_validation_enabled()
            with pyro.validation_enabled(validate), warnings.catch_warnings():
                # Pyro warns of a NaN that is an error here, with the site named.
                warnings.filterwarnings("ignore", "Encountered NaN")
                if isinstance(step, GraphedStep) and isinstance(batch, Rows):
                    return step.on_rows(batch.data, batch.rows, beta=beta)
                return step(*batch, beta=beta)
        except (ValueError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
            raise self._failure(batch, error) from error

    def _read(self, losses: list[float | Tensor], shares: list[Tensor]) -> list[float]:
        """Read losses back from the device, all at once, and refuse the first that is not finite."""
        if not any(isinstance(loss, Tensor) for loss in losses):
            return [float(loss) for loss in losses]
        # The first step of an epoch may have read its own.
        stacked = torch.stack([torch.as_tensor(loss, dtype=torch.float64, device=self.device) for loss in losses])
        values: list[float] = stacked.tolist()
        for i, value in enumerate(values):
            if not math.isfinite(value):
                batch = next(self.train([shares[i]]))
                raise self._failure(batch, NonFiniteLossError(f"the loss is {value}"))
        return values

    def _failure(self, batch: Batch, error: Exception) -> Exception:
        """Return the error of a step with what is known of it, and keep the batch where its loss was not finite."""
        own = non_finite_sites(self.pair, *batch) if len(batch[0]) else []
        found = self.processes.gather((own, [tensor.cpu() for tensor in batch] if own else []))
        sites, rows = next((each for each in found if each[0]), ([], [tensor.cpu() for tensor in batch]))
        if not sites and not isinstance(error, NonFiniteLossError):
            return error
        where = f"at {', '.join(sites)}" if sites else "though every site is finite on a second draw"
        kept = ""
        if self.folder is not None:
            path = self.folder / "non_finite_batch.pt"
            if self.processes.is_first:
                save_state({"batch": rows}, path)
            self.flush()
            kept = f"; the batch is in {path}, the checkpoint is that of epoch {self.epoch}"
        return NonFiniteLossError(
            f"the loss is not finite in epoch {self.epoch + 1}, {where}{kept}: lower lr, clip gradients "
            "(clip_norm) or raise the floor of a learned scale"
        )

    @torch.no_grad()
    def _follow(self) -> dict[str, Any]:
        """Return each site's share of −ELBO on held-out data, with the same draws after every epoch."""
        self.pair.eval()
        batch, sums = self.followed, dict[str, float]()
        seed = self.processes.seed(self.settings.seed)
        with own_random_state(seed, self.device), pyro.validation_enabled(False):
            chunks = torch.arange(len(batch[0]), device=self.device).split(FOLLOWED)
            for rows in chunks if self.processes.size == 1 else map(self.processes.share, chunks):
                if len(rows):
                    for name, term in site_terms(self.pair, *(tensor[rows] for tensor in batch)).items():
                        sums[name] = sums.get(name, 0.0) + float((term.log_guide - term.log_model).sum())
        shares = self.processes.gather(sums)
        names = dict.fromkeys(name for share in shares for name in share)
        terms = {name: sum(share.get(name, 0.0) for share in shares) / len(batch[0]) for name in names}
        monitor = {n: m.monitor() for n, m in self.pair.named_modules() if hasattr(m, "monitor")}
        total = sum(terms.values()) if self.validates else None
        return {"validation_loss": total, "terms": terms, "monitor": monitor}

    def _best_epoch(self) -> int:
        def loss(record: dict[str, Any]) -> float:
            # NaN compares as neither better nor worse, so that a first one would stay the best.
            return math.inf if math.isnan(record["validation_loss"]) else record["validation_loss"]

        return int(min(self.metrics, key=loss)["epoch"])

    def out_of_patience(self) -> bool:
        """Tell whether the validation loss has not improved for ``patience`` epochs."""
        patience = self.settings.patience
        return patience is not None and bool(self.metrics) and self.epoch - self._best_epoch() >= patience

    def restore_best(self) -> None:
        """Put the parameters of the best epoch back."""
        if self.best is not None:
            self.pair.load_state_dict(self.best)
            if self.folder is not None and self.processes.is_first:
                save_parameters(self.pair, self.folder / "checkpoint" / "pair.safetensors")

    def open_folder(self, folder: Path, resume: bool, config: dict[str, Any]) -> None:
        """Begin a run folder, or take up the run that a folder holds."""
        self.folder = folder
        # One process reads and writes, so that the others need not see its files.
        state = self.processes.from_first(lambda: self._open(folder, resume, config))
        if state is None:
            return
        restore(self.pair, state["pair"], folder)
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        self.epoch, self.metrics, self.best = state["epoch"], state["metrics"], state["best"]
        torch.set_rng_state(state["rng"])
        if self.device.type == "cuda" and state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)
        if self.processes.is_first:
            # An interrupt may have left the record an epoch behind.
            self._save(self._state())

    def _open(self, folder: Path, resume: bool, config: dict[str, Any]) -> dict[str, Any] | None:
        before: dict[str, Any] = {}
        state = None
        name = type(self.pair).__name__
        own = {"pair": name, "fit": asdict(self.settings)}
        if resume:
            before = read_json(folder / "config.json")
            self._check_same(before, own, config)
            state = load_state(folder / "checkpoint" / "state.pt", name)
            if config["epochs"] < state["epoch"]:
                raise ValueError(
                    f"{folder} holds a run of {state['epoch']} epochs: ask for as many at least (--epochs)"
                )
            restore(self.pair, state["pair"], folder)
        elif (folder / "config.json").exists():
            raise ValueError(f"{folder} already holds a run: choose another folder, or continue it (resume, --resume)")
        versions = {"pyro_vae": __version__, "torch": torch.__version__, "pyro": pyro.__version__}
        versions["python"] = platform.python_version()
        # The checkpoint first: a folder with a configuration is taken for a run.
        if state is None:
            self._save(self._state())
        text = json.dumps({**before, **own, "versions": versions, **config}, indent=2)
        write_text(folder / "config.json", text + "\n")
        return state

    def _check_same(self, config: dict[str, Any], own: dict[str, Any], given: dict[str, Any]) -> None:
        # Through JSON and back, as what was kept has gone.
        own, given = json.loads(json.dumps(own)), json.loads(json.dumps(given))
        held = config.get("fit", {})
        # Numbers are shown; what describes data or an optimiser is too long to be.
        changed = [
            k if isinstance(value, str) else f"{k} ({held.get(k)}, now {value})"
            for k, value in own["fit"].items()
            if held.get(k) != value
        ]
        changed += [k for k, value in given.items() if k != "epochs" and config.get(k, value) != value]
        if config.get("pair") != own["pair"]:
            raise ValueError(f"{self.folder} holds a run of {config.get('pair')}, not of {own['pair']}")
        if changed:
            raise ValueError(
                f"{self.folder} was begun with other settings: {', '.join(changed)}; only epochs may change"
            )

    def how_to_resume(self) -> str:
        """Say where an interrupted run stands, and how it goes on."""
        if self.folder is None:
            return f"interrupted in epoch {self.epoch + 1}"
        begun, held = (
            (f"epoch {self.saved + 1}", f"epoch {self.saved}")
            if self.processes.is_first
            else (f"epoch {self.epoch + 1}", "its last checkpoint")
        )
        return (
            f"interrupted in {begun}; {self.folder} holds {held}: continue it by the same "
            "call with resume=True (the same command with --resume)"
        )

    def _state(self) -> dict[str, Any]:
        return {
            "model": type(self.pair).__name__,
            "pair": self.pair.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "epoch": self.epoch,
            "metrics": list(self.metrics),
            "best": self.best,
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }

    def _keep(self) -> None:
        """Write the state of the epoch just done; hold a copy instead where that was done a moment ago."""
        if self.folder is None or not self.processes.is_first:
            return
        if time.perf_counter() >= self.next_save:
            self._save(self._state())
        else:
            self.unsaved = tree_map_only(Tensor, torch.clone, self._state())

    def flush(self) -> None:
        """Write what is held of the last epoch, if anything is."""
        if self.unsaved is not None:
            self._save(self.unsaved)

    def _save(self, state: dict[str, Any]) -> None:
        """Write the checkpoint and the record of the epochs so far; each file is replaced whole."""
        assert self.folder is not None
        start = time.perf_counter()
        # An interrupt between the files leaves the rest to be written.
        self.unsaved = state
        save_state(state, self.folder / "checkpoint" / "state.pt")
        self.saved = state["epoch"]
        save_parameters(self.pair, self.folder / "checkpoint" / "pair.safetensors", state["pair"])
        write_text(self.folder / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in state["metrics"]))
        self.unsaved = None
        end = time.perf_counter()
        self.next_save = end + (end - start) * (1 / SHARE_OF_SAVING - 1)
