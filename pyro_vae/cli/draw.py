"""``pyro-vae sample`` and ``pyro-vae super-resolve``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure

from pyro_vae.cli.runs import load_run, refuse_processes
from pyro_vae.data import DataSet
from pyro_vae.models.srvae import SRVAE
from pyro_vae.predict.generate import generate
from pyro_vae.predict.super_resolution import super_resolve
from pyro_vae.report.figures import image_grid, save_figure, super_resolution_grid
from pyro_vae.runtime.files import write_whole
from pyro_vae.runtime.memory import MEBIBYTE
from pyro_vae.runtime.progress import console

__all__ = ["Sample", "SuperResolve"]

# Limit on the means of one command, which are in memory at once.
MOST_BYTES = 2**30


@dataclass(frozen=True)
class Sample:
    """Draw new data from a trained run: samples.npz (draws and means) and a picture of the first hundred."""

    folder: tyro.conf.Positional[Path]
    """Run folder."""
    num_samples: int = 100
    """Number of draws."""
    data_root: str | None = None
    """Folder of the data sets."""
    seed: int = 0
    """Seed of the draws."""

    def run(self) -> None:
        """Draw and save."""
        refuse_processes()
        pair, data = load_run(self.folder, self.data_root)
        size = data.test[0].numel() * torch.get_default_dtype().itemsize
        if self.num_samples * size > MOST_BYTES:
            raise ValueError(
                f"num_samples is {self.num_samples}; each takes {size / 1024:.0f} KiB, {MOST_BYTES // MEBIBYTE} MiB "
                f"is the most that is drawn at once: ask for {MOST_BYTES // size} at most"
            )
        drawn = generate(pair, self.num_samples, seed=self.seed)
        figure = None
        if isinstance(data, DataSet):
            rows = list(drawn.mean[:100].split(10))
            figure = image_grid(rows, [""] * len(rows), f"Samples, {data.name}, seed {self.seed}")
        _save(self.folder / "samples", figure, x=drawn.x, mean=drawn.mean)


@dataclass(frozen=True)
class SuperResolve:
    """Draw high-resolution images for low-resolution test data: super_resolution.npz and a picture of five."""

    folder: tyro.conf.Positional[Path]
    """Run folder of an SRVAE."""
    size: int = 100
    """Number of test images to shrink and enlarge again."""
    num_samples: int = 16
    """Draws for each."""
    data_root: str | None = None
    """Folder of the data sets."""
    seed: int = 0
    """Seed of the draws."""

    def run(self) -> None:
        """Shrink, draw and save."""
        refuse_processes()
        pair, data = load_run(self.folder, self.data_root)
        if not isinstance(pair, SRVAE):
            raise ValueError(
                f"{self.folder} holds a {type(pair).__name__}, which has no low-resolution stage: use a run of srvae"
            )
        x = data.test[: self.size]
        y = pair.down_scale(x)
        result = super_resolve(pair, y, num_samples=self.num_samples, seed=self.seed)
        figure = super_resolution_grid(x, y, result, data.name)
        _save(self.folder / "super_resolution", figure, y=y, samples=result.samples, mean=result.means.mean(0))


def _save(path: Path, figure: Figure | None, **arrays: torch.Tensor) -> None:
    """Write arrays, and beside them their picture if they have one."""
    numbers: dict[str, Any] = {name: array.cpu().numpy() for name, array in arrays.items()}
    write_whole(path.with_suffix(".npz"), lambda file: np.savez_compressed(file, **numbers))
    written = str(path.with_suffix(".npz"))
    if figure is not None:
        save_figure(figure, path.with_suffix(".png"))
        written += f" and {path.with_suffix('.png')}"
    console.print(f"wrote {written}", soft_wrap=True, markup=False)
