"""``pyro-vae demo``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from rich.table import Table

from pyro_vae.cli.evaluate import report_likelihood
from pyro_vae.cli.recipes.srvae import SRVAERecipe
from pyro_vae.cli.runs import refuse_processes
from pyro_vae.cli.train import train
from pyro_vae.cli.training import Training
from pyro_vae.likelihood.importance import log_likelihood
from pyro_vae.runtime.files import read_json
from pyro_vae.runtime.progress import console

__all__ = ["Demo"]


@dataclass(frozen=True)
class Demo:
    """Train the two-stage VAE on the bundled digits, evaluate it and write its report."""

    run_dir: Path | None = None
    """Run folder; by default the first free of runs/demo, runs/demo-2, …"""
    epochs: int = 200
    """Passes over the data."""
    lr: float = 3e-3
    """Adam's learning rate."""

    def run(self) -> None:
        """Train, evaluate and print."""
        refuse_processes()
        # The networks are small: a second thread slows them down, above all on a busy machine.
        torch.set_num_threads(1)
        training = Training(run_dir=self.run_dir or _free_folder(Path("runs/demo")), epochs=self.epochs, lr=self.lr)
        folder, pair, data = train(SRVAERecipe(), training)
        ll, guide = (
            log_likelihood(pair, data.test, num_particles=1000, seed=0, proposal=proposal)
            for proposal in ("auto", "guide")
        )
        terms = read_json(folder / "loss_terms.json")
        table = Table("term (nats per datum)", *terms, title="−ELBO by sampling and in closed form")
        for name in terms["Trace_ELBO"]:
            table.add_row(name, *(f"{column[name][0]:.3f} ± {column[name][1]:.3f}" for column in terms.values()))
        console.print(table)
        report_likelihood(folder, ll, guide)


def _free_folder(folder: Path) -> Path:
    number, free = 2, folder
    while free.exists():
        free = folder.with_name(f"{folder.name}-{number}")
        number += 1
    return free
