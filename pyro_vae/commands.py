"""The command line's commands and their options, as tyro reads them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from pyro_vae.precision import Precision

__all__ = ["Demo", "Evaluate", "List", "Sample", "SuperResolve", "Training"]


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
    """Data per step and process."""
    loss: Literal["default", "elbo", "mean-field", "iwae"] = "default"
    """What is minimised: −ELBO by sampling or with closed divergences, or the importance-weighted bound's negative; by
    default the model's own loss, −ELBO by sampling where it has none."""
    num_particles: int = 1
    """Draws per datum and step."""
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
    capture: Literal["auto", "true", "false"] = "auto"
    """Whether steps replay a recording of the model: where that pays, always, or never."""
    compiled: bool = False
    """Compile the recording, which pays in long runs."""
    precision: Precision = "float32"
    """Of training."""
    tf32: bool = False
    """Round the operands of float32 products to TF32 on a CUDA device."""
    seed: int = 0
    """Of initial values, shuffling and draws."""
    device: str = "auto"
    """auto, cpu or cuda."""


@dataclass(frozen=True)
class List:
    """Name the models and the data sets."""


@dataclass(frozen=True)
class Evaluate:
    """Estimate the log-likelihood of test data with a trained run; interrupted, the same command goes on."""

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
