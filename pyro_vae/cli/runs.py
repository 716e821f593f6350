"""Run folders that the command line reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from pyro_vae import data as data_sets
from pyro_vae.cli.recipes import OPTIONS
from pyro_vae.data import DataSet
from pyro_vae.pair.pair import Pair
from pyro_vae.runtime.files import read_json
from pyro_vae.training.run_folder import load_parameters

__all__ = ["console", "load_data", "load_run"]

console = Console()


def load_data(options: Any, name: str, root: str | None, download: bool = False) -> DataSet:
    if hasattr(options, "load"):
        loaded: DataSet = options.load(name, root)
        return loaded
    try:
        return data_sets.load(name, root, download=download)
    except RuntimeError as error:
        # What torchvision raises when every mirror has failed.
        raise ValueError(f"{name} could not be fetched: {error}") from error


def load_run(folder: Path, data_root: str | None = None) -> tuple[Pair, DataSet]:
    """Build the pair that a run folder describes, with its parameters, and load its data.

    Raises:
        ValueError: for a folder without a run of the command line's, and for a damaged or foreign checkpoint.
    """
    config = read_json(folder / "config.json")
    if config.get("model") not in OPTIONS or not {"options", "data"} <= set(config):
        raise ValueError(
            f"{folder}/config.json names no model of the command line ({', '.join(OPTIONS)}); "
            "evaluate a pair of your own with pv.log_likelihood"
        )
    try:
        options = OPTIONS[config["model"]](**config["options"])
    except TypeError as error:
        raise ValueError(f"{folder}/config.json is damaged, or of another version: {error}") from error
    data = load_data(options, config["data"], data_root)
    pair = options.build(data)
    load_parameters(pair, folder / "checkpoint" / "pair.safetensors")
    return pair.eval(), data
