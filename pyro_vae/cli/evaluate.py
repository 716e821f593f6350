"""``pyro-vae evaluate``."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import tyro

from pyro_vae.cli.runs import join_processes, load_run
from pyro_vae.data import subset_after_shuffle
from pyro_vae.likelihood.estimate import LogLikelihood, likelihood_notes
from pyro_vae.likelihood.importance import log_likelihood
from pyro_vae.likelihood.shared import shared_log_likelihood
from pyro_vae.report.files import record_likelihood
from pyro_vae.report.markdown import write_report
from pyro_vae.runtime.device import resolve_device
from pyro_vae.runtime.memory import MEBIBYTE
from pyro_vae.runtime.progress import console

__all__ = ["Evaluate", "report_likelihood"]


@dataclass(frozen=True)
class Evaluate:
    """Estimate the log-likelihood of test data under a trained run. Repeat an interrupted command to resume it."""

    folder: tyro.conf.Positional[Path]
    """Run folder."""
    num_particles: int = 1000
    """Importance samples per datum."""
    size: int | None = None
    """Number of test data, after a seeded shuffle; all by default."""
    proposal: Literal["guide", "auto"] = "guide"
    """Draw from the guide, or fit proposals to the data that it does not settle."""
    memory: int = 512
    """Memory that tensors may take, in MiB."""
    data_root: str | None = None
    """Folder of the data sets."""
    seed: int = 0
    """Seed of the draws."""
    device: str = "auto"
    """auto, cpu or cuda."""

    def run(self) -> None:
        """Estimate, save and print the log-likelihood."""
        processes = join_processes(self.device)
        device = processes.device(resolve_device(self.device))
        pair, data = load_run(self.folder, self.data_root)
        x = data.test if self.size is None else subset_after_shuffle(data.test, self.size)
        estimate = partial(
            log_likelihood,
            pair.to(device),
            num_particles=self.num_particles,
            proposal=self.proposal,
            memory=self.memory * MEBIBYTE,
            run_dir=self.folder,
            progress=processes.is_first,
        )
        ll = shared_log_likelihood(processes, estimate, x, seed=self.seed)
        if processes.is_first:
            report_likelihood(self.folder, ll)


def report_likelihood(folder: Path, ll: LogLikelihood) -> None:
    """Save a log-likelihood in its run folder, rewrite the report, and print both."""
    figures = record_likelihood(folder, ll)
    notes = likelihood_notes(ll.record())
    for line in (repr(ll), *notes, f"figures: {', '.join(map(str, figures))}", f"report: {write_report(folder)}"):
        console.print(line, soft_wrap=True, markup=False, highlight=False)
