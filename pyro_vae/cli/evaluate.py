"""``pyro-vae evaluate``."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import tyro

from pyro_vae.cli.runs import join_processes, load_run, refuse_processes
from pyro_vae.data import subset_after_shuffle
from pyro_vae.likelihood.ais.annealing import annealed_log_likelihood, bidirectional_log_likelihood
from pyro_vae.likelihood.estimate import LogLikelihood, likelihood_notes, likelihood_table
from pyro_vae.likelihood.importance import log_likelihood
from pyro_vae.likelihood.shared import shared_log_likelihood
from pyro_vae.report.files import likelihood_record, record_likelihood
from pyro_vae.report.markdown import write_report
from pyro_vae.runtime.device import resolve_device
from pyro_vae.runtime.files import write_text
from pyro_vae.runtime.memory import MEBIBYTE
from pyro_vae.runtime.progress import console, progress_bar

__all__ = ["Evaluate", "report_likelihood"]

# Data of an annealed estimate and of bounds by default: each takes seconds to minutes.
FEW = 100


@dataclass(frozen=True)
class Evaluate:
    """Estimate the log-likelihood of test data under a trained run. Repeat an interrupted command to resume it."""

    folder: tyro.conf.Positional[Path]
    """Run folder."""
    num_particles: int = 1000
    """Importance samples per datum, at most."""
    size: int | None = None
    """Number of test data, after a seeded shuffle; all by default, 100 for annealing and bounds."""
    proposal: Literal["auto", "guide", "prior", "annealed"] = "auto"
    """Fit proposals to the data that the guide does not settle; draw from the guide or the prior alone; or anneal all
    data from the prior."""
    tolerance: float | None = None
    """Error per datum in nats: data that need fewer draws get fewer."""
    bounds: bool = False
    """Bound log p(x) from both sides, on data drawn from the model."""
    temperatures: int = 1000
    """Temperatures of annealing and bounds."""
    chains: int = 16
    """Chains per datum of annealing and bounds."""
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
        if self.bounds or self.proposal == "annealed":
            refuse_processes()
            self._anneal()
            return
        processes = join_processes(self.device)
        device = processes.device(resolve_device(self.device))
        pair, data = load_run(self.folder, self.data_root)
        x = data.test if self.size is None else subset_after_shuffle(data.test, self.size)
        estimate = partial(
            log_likelihood,
            pair.to(device),
            num_particles=self.num_particles,
            memory=self.memory * MEBIBYTE,
            run_dir=self.folder,
            progress=processes.is_first,
        )
        chosen = partial(estimate, proposal=self.proposal, tolerance=self.tolerance)
        ll, guide = shared_log_likelihood(processes, chosen, x, seed=self.seed), None
        if self.proposal == "auto":
            # The literature's protocol, to compare with.
            guide = shared_log_likelihood(processes, partial(estimate, proposal="guide"), x, seed=self.seed)
        if processes.is_first:
            report_likelihood(self.folder, ll, guide)

    def _anneal(self) -> None:
        """Anneal test data, or bound simulated data; save and print the numbers."""
        pair, data = load_run(self.folder, self.data_root)
        pair = pair.to(resolve_device(self.device))
        count = FEW if self.size is None else self.size
        settings: dict[str, Any] = {
            "num_temperatures": self.temperatures,
            "num_chains": self.chains,
            "seed": self.seed,
        }
        record: dict[str, Any]
        if self.bounds:
            name, bounds = "bounds", bidirectional_log_likelihood(pair, count, **settings)
            shown = repr(bounds)
            record = {"lower": bounds.lower.tolist(), "upper": bounds.upper.tolist(), "quantity": bounds.quantity}
        else:
            x = subset_after_shuffle(data.test, min(count, len(data.test)))
            with progress_bar(True, "annealing", len(x)) as update:
                annealed = annealed_log_likelihood(pair, x, progress=lambda done, _: update(done), **settings)
            name, shown = "annealed", repr(annealed)
            errors = annealed.standard_error.tolist()
            record = {"mean": annealed.mean, "per_datum": annealed.per_datum.tolist(), "quantity": annealed.quantity}
            # JSON has no infinity.
            record["standard_error"] = [error if math.isfinite(error) else str(error) for error in errors]
        path = self.folder / f"{name}.json"
        write_text(path, json.dumps({**record, **settings}, indent=2) + "\n")
        console.print(f"{shown}\nsaved: {path}", soft_wrap=True, markup=False, highlight=False)


def report_likelihood(folder: Path, ll: LogLikelihood, guide: LogLikelihood | None = None) -> None:
    """Save a log-likelihood in its run folder, rewrite the report, and print both."""
    figures = record_likelihood(folder, ll, guide)
    record = likelihood_record(ll, guide)
    lines = (
        likelihood_table(record),
        *likelihood_notes(record),
        f"figures: {', '.join(map(str, figures))}",
        f"report: {write_report(folder)}",
    )
    for line in lines:
        console.print(line, soft_wrap=True, markup=False, highlight=False)
