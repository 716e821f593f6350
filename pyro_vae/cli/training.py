"""The training options of the command line, and the loss that they describe."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import tyro
from pyro.infer import ELBO, Trace_ELBO, TraceMeanField_ELBO

from pyro_vae.objectives.bounds import iwae
from pyro_vae.objectives.loss import Loss
from pyro_vae.pair.pair import Pair
from pyro_vae.training.precision import Precision

__all__ = ["GraphTraining", "Training"]

T = TypeVar("T")
# An option fixed at its default and hidden from the help.
Held = tyro.conf.Fixed[tyro.conf.Suppress[T]]


@dataclass(frozen=True)
class Training:
    """Options of training."""

    data: str = "digits"
    """Data set; `pyro-vae list` names them."""
    data_root: str | None = None
    """Folder of the data sets; by default $PYRO_VAE_DATA, else the user's cache."""
    download: bool = False
    """Fetch the data set if it is absent."""
    run_dir: Path | None = None
    """Run folder; runs/MODEL-DATA by default."""
    resume: bool = False
    """Resume the run in the folder."""
    epochs: int = 20
    """Passes over the data."""
    batch_size: int = 128
    """Data per step and process."""
    loss: Literal["default", "elbo", "mean-field", "iwae"] = "default"
    """Loss: −ELBO by sampling, −ELBO with closed-form KL, or the negative importance-weighted bound. The default is the
    model's loss if it has one, else −ELBO by sampling."""
    num_particles: int = 1
    """Draws per datum and step."""
    lr: float = 1e-3
    """Adam's learning rate."""
    beta: float = 1.0
    """Weight of the KL terms."""
    warmup: int = 0
    """Epochs over which β rises from 0."""
    clip_norm: float | None = None
    """Largest global norm of the gradient."""
    patience: int | None = None
    """Stop after so many epochs without a better validation loss."""
    validation: float = 0.1
    """Share of the training data to hold out if the data set has no validation data; 0 for none."""
    capture: Literal["auto", "true", "false"] = "auto"
    """Capture the training step once and replay it: automatically, always or never."""
    compiled: bool = False
    """Compile the captured step; pays off in long runs."""
    precision: Precision = "float32"
    """Precision of training."""
    tf32: bool = False
    """Round the operands of float32 matmuls to TF32 on a CUDA device."""
    seed: int = 0
    """Seed of initial values, shuffling and draws."""
    device: str = "auto"
    """auto, cpu or cuda."""

    def make_loss(self, own: Loss | None, pair: Pair) -> tuple[Loss, int]:
        """Return the loss, and the number of draws per datum that ``fit`` makes for it.

        Args:
            own: the loss of the model's recipe, or None.
            pair: the pair to train.

        Raises:
            ValueError: for options that the model's loss cannot take, or that would set it aside.
        """
        count = self.num_particles
        if own is not None:
            self._check_own_loss(own, count)
        if own is not None and self.loss == "default":
            return own, count
        if self.loss == "iwae" and count == 1:
            raise ValueError(
                "the importance-weighted bound of one draw is the ELBO: add --num-particles 5, or choose --loss elbo"
            )
        if self.loss == "iwae" or count < 1:
            return iwae, count
        kind = TraceMeanField_ELBO if self.loss == "mean-field" else Trace_ELBO
        if count == 1:
            return kind(), 1
        # All draws in one pass, to the left of the pair's plates.
        return kind(count, max_plate_nesting=pair.max_plate_nesting, vectorize_particles=True), 1

    def _check_own_loss(self, loss: Loss, count: int) -> None:
        name = getattr(loss, "__name__", type(loss).__name__)
        weighed = isinstance(loss, Trace_ELBO | TraceMeanField_ELBO)
        if self.loss != "default" and not weighed:
            raise ValueError(f"the model is trained by its loss, {name}: leave --loss out, or train another model")
        if not weighed and (self.beta != 1 or self.warmup):
            raise ValueError(
                f"beta is {self.beta}, warmup {self.warmup}, but the model's loss, {name}, takes its weight from "
                "the model's options: leave --beta and --warmup out"
            )
        if self.loss == "default" and count != 1 and isinstance(loss, ELBO):
            raise ValueError(
                f"num_particles is {count}, but the model's loss, {name}, sets its number of draws: leave "
                "--num-particles out"
            )


@dataclass(frozen=True)
class GraphTraining(Training):
    """Options of training on one graph; an epoch is one step."""

    data: Literal["cora", "citeseer", "pubmed"] = "cora"
    """Citation network."""
    epochs: int = 200
    """Steps on the whole graph."""
    lr: float = 1e-2
    """Adam's learning rate."""
    download: Held[bool] = False
    batch_size: Held[int] = 1
    patience: Held[int | None] = None
    validation: Held[float] = 0.0
    # The balanced loss depends on the links of each step, which a captured step cannot follow. A step on a whole graph
    # is so long that capture would save nothing.
    capture: Held[Literal["auto", "true", "false"]] = "false"
    compiled: Held[bool] = False
