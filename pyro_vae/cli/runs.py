"""Run folders and processes, as every command needs them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pyro_vae.cli.recipes import RECIPES
from pyro_vae.data import AnyDataSet
from pyro_vae.pair.pair import Pair
from pyro_vae.runtime.device import resolve_device
from pyro_vae.runtime.distributed import Processes, join
from pyro_vae.runtime.files import read_json
from pyro_vae.runtime.progress import console
from pyro_vae.training.run_folder import load_parameters

__all__ = ["join_processes", "load_run", "refuse_processes"]


def load_run(folder: Path, data_root: str | None = None) -> tuple[Pair, Any]:
    """Load the trained pair of a run folder, in evaluation mode, and its data set.

    Raises:
        ValueError: for a folder without a run of the command line, and for a damaged or foreign checkpoint.
    """
    config = read_json(folder / "config.json")
    if config.get("model") not in RECIPES or not {"options", "data"} <= set(config):
        raise ValueError(
            f"{folder}/config.json names no model of the command line ({', '.join(RECIPES)}); "
            "evaluate your pair with pv.log_likelihood"
        )
    try:
        recipe = RECIPES[config["model"]](**config["options"])
    except TypeError as error:
        raise ValueError(f"{folder}/config.json is damaged, or of another version: {error}") from error
    data: AnyDataSet = recipe.load_data(config["data"], data_root)
    pair: Pair = recipe.build(data)
    load_parameters(pair, folder / "checkpoint" / "pair.safetensors")
    return pair.eval(), data


def join_processes(device: str) -> Processes:
    """Join the processes that torchrun started, and let only the first of them print."""
    processes = join(resolve_device(device))
    console.quiet = not processes.is_first
    return processes


def refuse_processes() -> None:
    """Refuse to run a command under torchrun that shares no work.

    Raises:
        ValueError: for more than one process.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ValueError("only train and evaluate share their work among processes: start this one without torchrun")
