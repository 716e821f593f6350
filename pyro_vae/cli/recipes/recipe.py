"""The recipe of a model: its options, and the steps by which the command line builds, trains and scores it."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

from torch import Tensor

from pyro_vae import data as data_sets
from pyro_vae.cli.training import Training
from pyro_vae.data import AnyDataSet, DataSet
from pyro_vae.objectives.loss import Loss
from pyro_vae.pair.pair import Pair

__all__ = ["RECIPES", "ImageRecipe", "Recipe"]

SomePair = TypeVar("SomePair", bound=Pair)
SomeData = TypeVar("SomeData", bound=AnyDataSet)

#: Every recipe, by the name of its command.
RECIPES: dict[str, type[Recipe[Any, Any]]] = {}


@dataclass(frozen=True)
class Recipe(abc.ABC, Generic[SomePair, SomeData]):
    """Build, train and score one model from the command line.

    Write a frozen dataclass in a file of this folder, ``class MyRecipe(ImageRecipe[MyVAE], command="my-vae")``.
    Its fields are the options of ``pyro-vae train my-vae``; its docstring is the help text. Only :meth:`build` must be
    written. Then import the file in ``__init__.py``.
    """

    command: ClassVar[str]
    training: ClassVar[type[Training]] = Training

    def __init_subclass__(cls, *, command: str | None = None) -> None:
        super().__init_subclass__()
        if command is not None:
            cls.command = command
            RECIPES[command] = cls

    @abc.abstractmethod
    def load_data(self, name: str, root: str | None, *, download: bool = False) -> SomeData:
        """Load a data set from the folder ``root``; fetch missing files if ``download``."""

    @abc.abstractmethod
    def build(self, data: SomeData) -> SomePair:
        """Build the pair for a data set.

        Raises:
            ValueError: for options that the model or the data cannot take.
        """

    def loss(self, pair: SomePair, num_data: int) -> Loss | None:
        """Return the model's loss on ``num_data`` training data; None if it is trained by any loss of the user's."""
        return None

    @property
    def early_epochs(self) -> int:
        """The number of epochs before :meth:`start`."""
        return 0

    def start(self, pair: SomePair, x: Tensor) -> None:
        """Prepare the pair on the training data ``x``, after :attr:`early_epochs` epochs and before the others."""
        return

    def scores(self, pair: SomePair, data: SomeData) -> Mapping[str, float]:
        """Score the trained pair, beyond its likelihood: numbers by name, for the terminal and the report."""
        return {}


@dataclass(frozen=True)
class ImageRecipe(Recipe[SomePair, DataSet]):
    """Train a model on images, or on any other data that :func:`pyro_vae.data.load` loads."""

    def load_data(self, name: str, root: str | None, *, download: bool = False) -> DataSet:
        """Load a data set of images.

        Raises:
            ValueError: for an unknown name, for absent or damaged files, and for a failed download.
        """
        try:
            return data_sets.load(name, root, download=download)
        except RuntimeError as error:
            # torchvision raises it once every mirror has failed.
            raise ValueError(f"{name} could not be fetched: {error}") from error
