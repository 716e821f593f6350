"""The training loop: epochs of steps, and a record of each epoch."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from pyro_vae.networks.annealed import annealed
from pyro_vae.pair.modes import device_of, kept_in_evaluation, normalises, to_training
from pyro_vae.pair.pair import Pair
from pyro_vae.pair.trace import site_terms
from pyro_vae.runtime.batches import Batch, Batches
from pyro_vae.runtime.distributed import SEEDS, Processes
from pyro_vae.runtime.random_state import own_random_state, seed_generators
from pyro_vae.training.arguments import Settings
from pyro_vae.training.precision import float32_products, mixed
from pyro_vae.training.step import NonFiniteLossError, Step, non_finite_sites

__all__ = ["NonFiniteBatchError", "Trainer"]

# Without validation data, the terms of the loss are computed on this many training data.
FOLLOWED = 512
# Losses that stay on the device are read back at the end of an epoch, and once in so many steps.
STEPS_BETWEEN_READINGS = 1000


class NonFiniteBatchError(NonFiniteLossError):
    """The loss of a batch is not finite.

    Args:
        epoch: number of the epoch, from 1.
        sites: names of the sites whose log-density is not finite.
        rows: the batch, on the CPU.
        saved: where the batch was saved, as a part of a sentence.
    """

    def __init__(self, epoch: int, sites: list[str], rows: list[Tensor], saved: str = "") -> None:
        where = f"at {', '.join(sites)}" if sites else "though every site is finite on a second draw"
        super().__init__(
            f"the loss is not finite in epoch {epoch}, {where}{saved}: lower lr, clip gradients "
            "(clip_norm) or raise the floor of a learned scale"
        )
        self.epoch, self.sites, self.rows = epoch, sites, rows


class Trainer:
    """Run epochs, and hold the state of a run between them.

    Args:
        pair: the pair, on its device.
        optimizer: over the pair's parameters.
        scheduler: takes a step after each epoch.
        train: the training data.
        held_out: validation data, and their conditions.
        settings: numbers of the run.
        processes: the processes that share each batch.
        in_bfloat16: modules that run under autocast to bfloat16.
        weighs_divergence: whether the loss has a divergence, whose weight β the records then hold.
    """

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
        weighs_divergence: bool,
    ) -> None:
        self.pair, self.optimizer, self.scheduler = pair, optimizer, scheduler
        self.train, self.settings, self.processes = train, settings, processes
        self.in_bfloat16, self.weighs_divergence = in_bfloat16, weighs_divergence
        self.device, self.kept = device_of(pair), kept_in_evaluation(pair)
        self.normalises = normalises(pair, self.kept)
        self.validates = held_out is not None
        self.followed = tuple(t.to(self.device) for t in (held_out or train.first(FOLLOWED)))
        self.epoch = 0
        self.metrics: list[dict[str, Any]] = []
        self.best: dict[str, Tensor] | None = None
        # Whether a first step has run, which Pyro validates.
        self.validated = False

    def run_epoch(self, first: Step, step: Step) -> dict[str, Any]:
        """Train on the data once, in an order drawn from (seed, epoch), and return the epoch's record.

        Args:
            first: the step of the run's first batch, which Pyro validates.
            step: that of all other batches.
        """
        start = time.perf_counter()
        to_training(self.pair, self.kept)
        if self.processes.size > 1:
            # Each process draws other noise. It is seeded anew per epoch, since only one process saves its generator.
            seed_generators(self.processes.seed(self.settings.seed, self.epoch + 1), self.device)
        loss, beta = self._train(first, step)
        record: dict[str, Any] = {"epoch": self.epoch + 1, "seconds": time.perf_counter() - start, "loss": loss}
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
        return record

    def out_of_patience(self) -> bool:
        """Tell whether the validation loss has not improved for ``patience`` epochs."""
        patience = self.settings.patience
        return patience is not None and bool(self.metrics) and self.epoch - self._best_epoch() >= patience

    def restore_best(self) -> bool:
        """Put the parameters of the best epoch back, and tell whether there were any."""
        if self.best is not None:
            self.pair.load_state_dict(self.best)
        return self.best is not None

    def state(self) -> dict[str, Any]:
        """Return everything that a resumed run needs: tensors, numbers and strings."""
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

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state that :meth:`state` returned."""
        self.pair.load_state_dict(state["pair"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        self.epoch, self.metrics, self.best = state["epoch"], state["metrics"], state["best"]
        torch.set_rng_state(state["rng"])
        if self.device.type == "cuda" and state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)

    def _train(self, first: Step, step: Step) -> tuple[float, float]:
        """Take the steps of an epoch; return the mean loss per datum and the last β."""
        size, beta = len(self.train), 0.0
        # Drawn from seed and epoch alone: a resumed run has the same order.
        generator = torch.Generator().manual_seed((self.settings.seed * 1_000_003 + self.epoch) % SEEDS)
        order = torch.randperm(size, generator=generator)
        parts = list(order.split(self.settings.batch_size * self.processes.size))
        if self.normalises and len(parts) > 1 and len(parts[-1]) < 2 * self.processes.size:
            # A process with one datum would have no variance to normalise by.
            parts[-2:] = [torch.cat(parts[-2:])]
        losses: list[float | Tensor] = []
        # Found once: a walk over all modules takes as long as a small network's update.
        read, numbers = 0, annealed(self.pair)
        with self._precision():
            shares = [self.processes.share(part) for part in parts]
            for i, batch in enumerate(self.train(shares)):
                beta = self.settings.beta_after(self.epoch + i / len(parts))
                for number in numbers:
                    number.move_to(self.epoch + i / len(parts))
                losses.append(self._guarded(step if self.validated else first, batch, beta))
                self.validated = True
                if i + 1 == len(parts) or i + 1 - read >= STEPS_BETWEEN_READINGS:
                    losses[read:] = self._read(losses[read:], shares[read:])
                    read = i + 1
        total = math.fsum(float(loss) * len(part) for loss, part in zip(losses, parts, strict=True))
        return total / size, beta

    @contextmanager
    def _precision(self) -> Iterator[None]:
        with float32_products(self.device, self.settings.tf32), mixed(self.in_bfloat16, self.device):
            yield

    def _guarded(self, step: Step, batch: Batch, beta: float) -> float | Tensor:
        """Take a step. Pyro validates the first one only; the data were checked before."""
        try:
            validate = not self.validated and pyro.infer.util.is_validation_enabled()
            with pyro.validation_enabled(validate), warnings.catch_warnings():
                # A NaN that Pyro would warn of raises here, with the site's name.
                warnings.filterwarnings("ignore", "Encountered NaN")
                return step(batch, beta=beta)
        except (ValueError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
            raise self._failure(batch, error) from error

    def _read(self, losses: list[float | Tensor], shares: list[Tensor]) -> list[float]:
        """Read losses back from the device, all at once, and refuse the first that is not finite."""
        if not any(isinstance(loss, Tensor) for loss in losses):
            return [float(loss) for loss in losses]
        # An epoch's first step may have returned a number.
        stacked = torch.stack([torch.as_tensor(loss, dtype=torch.float64, device=self.device) for loss in losses])
        values: list[float] = stacked.tolist()
        for i, value in enumerate(values):
            if not math.isfinite(value):
                batch = next(self.train([shares[i]]))
                raise self._failure(batch, NonFiniteLossError(f"the loss is {value}"))
        return values

    def _failure(self, batch: Batch, error: Exception) -> Exception:
        """Return the error to raise: with sites and data where a loss is not finite, else the error itself."""
        tensors = batch.tensors
        own = non_finite_sites(self.pair, *tensors) if len(tensors[0]) else []
        found = self.processes.gather((own, [tensor.cpu() for tensor in tensors] if own else []))
        sites, rows = next((each for each in found if each[0]), ([], [tensor.cpu() for tensor in tensors]))
        if not sites and not isinstance(error, NonFiniteLossError):
            return error
        return NonFiniteBatchError(self.epoch + 1, sites, rows)

    @torch.no_grad()
    def _follow(self) -> dict[str, Any]:
        """Return each site's share of −ELBO on held-out data, with the same noise after every epoch."""
        self.pair.eval()
        batch, sums = self.followed, dict[str, float]()
        # That of the pair's first run: losses of a loop of runs compare.
        seed = self.processes.seed(self.settings.split_seed)
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
            # NaN compares as neither better nor worse: a first one would stay the best.
            return math.inf if math.isnan(record["validation_loss"]) else record["validation_loss"]

        return int(min(self.metrics, key=loss)["epoch"])
