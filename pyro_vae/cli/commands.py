"""The command line's commands and their options, as tyro reads them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

__all__ = ["Demo", "Evaluate", "List", "Sample", "SuperResolve"]


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
