"""Arguments of ``fit``: data, settings and the identity of a run, checked before the first step."""

from __future__ import annotations

import hashlib
import math
import numbers
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import Subset, TensorDataset

from pyro_vae.data import AnyDataSet, DataSet, GraphData
from pyro_vae.pair.pair import Pair
from pyro_vae.runtime.random_state import derived_seed

__all__ = [
    "Data",
    "Identity",
    "Seeds",
    "Settings",
    "as_batch",
    "fingerprint",
    "next_seeds",
    "remember_seeds",
    "split",
]

# The attribute of a pair that holds the seed of its next run, and that of its held-out share.
STORED_SEEDS = "_seeds_of_fit"
Data: TypeAlias = Tensor | Sequence[Tensor] | TensorDataset | Subset[Any] | AnyDataSet


@dataclass(frozen=True)
class Settings:
    """Numbers that training is set by; :func:`~pyro_vae.fit` explains each of them."""

    batch_size: int
    lr: float | None
    beta: float
    warmup: float
    clip_norm: float | None
    num_particles: int
    patience: int | None
    seed: int
    split_seed: int
    compiled: bool
    tf32: bool

    @property
    def uses_beta(self) -> bool:
        """Whether the divergence has another weight than 1 at any time."""
        return self.beta != 1 or self.warmup > 0

    def beta_after(self, epochs: float) -> float:
        """Return β after this many epochs of training."""
        return self.beta * (min(1.0, epochs / self.warmup) if self.warmup else 1.0)

    def check(
        self, train: tuple[Tensor, ...], held_out: tuple[Tensor, ...] | None, *, epochs: int, processes: int
    ) -> None:
        """Refuse settings that do not fit the data, or that no training could use.

        Raises:
            ValueError: naming the setting and its limits.
        """
        self._check_counts(len(train[0]), epochs, processes)
        if not 0 <= self.beta < math.inf or not 0 <= self.warmup < math.inf:
            raise ValueError(
                f"beta is {self.beta}, warmup {self.warmup}; both must be finite, and neither may be negative"
            )
        if self.beta == 0 and self.warmup:
            raise ValueError(f"warmup is {self.warmup}, and beta 0: no weight rises to 0, leave warmup out")
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise ValueError(f"lr is {self.lr}; it must be positive and finite")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"clip_norm is {self.clip_norm}; it must be positive, or None for no clipping")
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"patience is {self.patience}; it must be at least 1, or None for no early stopping")
        if self.patience is not None and held_out is None:
            raise ValueError("patience needs validation data: pass validation=0.1, or a set of its own")

    def _check_counts(self, size: int, epochs: int, processes: int) -> None:
        if epochs < 1:
            raise ValueError(f"epochs is {epochs}; it must be at least 1")
        if not 1 <= self.batch_size <= size:
            raise ValueError(f"batch_size is {self.batch_size}; there are {size} training data")
        if self.batch_size * processes > size:
            raise ValueError(
                f"batch_size is {self.batch_size} in {processes} processes; there are {size} training data"
            )
        if self.num_particles < 1:
            raise ValueError(f"num_particles is {self.num_particles}; it must be at least 1")


@dataclass(frozen=True)
class Identity:
    """Everything but the number of epochs that a resumed run must share with its beginning.

    Args:
        settings: the numbers.
        loss, optimizer, scheduler: their names with the numbers that they began with.
        data, validation: fingerprints of the training and the held-out data.
        precision: the ``precision`` asked for, or the dtype of the parameters.
        processes: the number of processes.
    """

    settings: Settings
    loss: str
    optimizer: str
    scheduler: str | None
    data: str
    validation: str
    precision: str
    processes: int

    def as_json(self) -> dict[str, Any]:
        """Return the section "fit" of a run's config.json: one flat object."""
        named = asdict(self)
        settings = named.pop("settings")
        if settings["split_seed"] == settings["seed"]:
            del settings["split_seed"]
        return {**settings, **named}


class Seeds(NamedTuple):
    """The seed of a run, and that of the share that it holds out."""

    run: int
    split: int


def next_seeds(pair: Pair, seed: int | None) -> Seeds:
    """Return the seeds of a pair's next run.

    Without a seed the run goes on from the pair's last one, with another order and other noise. The held-out share
    stays that of the pair's first run: its data were never trained on.
    """
    run, first = vars(pair).get(STORED_SEEDS, (0, None))
    run = run if seed is None else seed
    return Seeds(run, run if first is None else first)


def remember_seeds(pair: Pair, seeds: Seeds) -> None:
    """Store in the pair the seeds of the run after this one; a copy of the pair has them too."""
    vars(pair)[STORED_SEEDS] = (derived_seed(seeds.run, "fit"), seeds.split)


def as_batch(data: Data) -> tuple[Tensor, ...]:
    """Return ``x`` and the conditions as a tuple: of a data set, its training images.

    Whatever else the caller passes is one thing, for :func:`~pyro_vae.inspection.data.check_batch` to name.
    """
    if isinstance(data, DataSet | GraphData):
        return (data.train,)
    # A list of numbers, or of lists, is one thing.
    several = isinstance(data, tuple | list) and any(hasattr(each, "shape") for each in data)
    return tuple(data) if several else (data,)  # type: ignore[arg-type, return-value]


def split(
    data: tuple[Tensor, ...], validation: Data | float | None, seed: int
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...] | None]:
    """Return training and held-out data; the seed draws a held-out share.

    Raises:
        ValueError: for a share that is not between 0 and 1, or leaves no training data.
    """
    if validation is None:
        return data, None
    if not isinstance(validation, (int, float, numbers.Real)):
        return data, as_batch(validation)
    if not 0 < validation < 1:
        raise ValueError(f"validation is {validation}; as a share of the data it must lie between 0 and 1")
    order = torch.randperm(len(data[0]), generator=torch.Generator().manual_seed(seed))
    held = max(1, round(validation * len(order)))
    if held == len(order):
        raise ValueError(f"data holds no data beside the {held} held out: validation is {validation}, give less")
    return tuple(t[order[held:]] for t in data), tuple(t[order[:held]] for t in data)


def fingerprint(batch: tuple[Tensor, ...] | None) -> str:
    """Return the number of data and a hash of their bytes; a resumed run must have the same."""
    if batch is None:
        return "none"
    digest = hashlib.sha256()
    for tensor in batch:
        digest.update(tensor.detach().cpu().contiguous().numpy().data)
    return f"{len(batch[0])} data, sha256 {digest.hexdigest()[:16]}"
