"""The two types of data set: images with pixels in [0, 1], and graphs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from pyro_vae.data.files import data_root, npz_file, read_arrays, torchvision_split, unpacked
from pyro_vae.data.graphs import LinkSplit, load_graph, split_links
from pyro_vae.data.sprites import sprites
from pyro_vae.data.transforms import shuffled, unit

__all__ = ["NAMES", "AnyDataSet", "DataSet", "GraphData", "load", "load_links"]


class DataSet(NamedTuple):
    """Hold images whose every pixel is in [0, 1].

    Attributes:
        name: one of :data:`NAMES`.
        train: training images, (N, C, H, W), in the default float type at the time of loading.
        test: test images, (M, C, H, W).
        train_labels: class indices, (N,) int64, or None for data without classes.
        test_labels: class indices, (M,) int64, or None.
        levels: the number of equally spaced gray levels k / (levels - 1) of a pixel; None for pixels on no grid.
        validation: validation images, (V, C, H, W), for data that are published with them; else None.

    >>> images = torch.zeros(5, 1, 8, 8)
    >>> DataSet("blank", images[:3], images[3:], None, None, levels=2).x_shape
    (1, 8, 8)
    """

    name: str
    train: Tensor
    test: Tensor
    train_labels: Tensor | None
    test_labels: Tensor | None
    levels: int | None
    validation: Tensor | None = None

    @property
    def x_shape(self) -> tuple[int, int, int]:
        """Return the shape (C, H, W) of one image."""
        channels, height, width = self.train.shape[1:]
        return channels, height, width


class GraphData(NamedTuple):
    """Hold one graph as a data set of one datum, with links held out.

    Attributes:
        name: one of :data:`~pyro_vae.data.GRAPHS`.
        train: adjacency of the training links, (1, N, N) bool.
        test: adjacency of the whole graph, (1, N, N) bool.
        links: the training graph, and the pairs of nodes held out of it.

    >>> from pyro_vae.data import make_graph
    >>> graph = make_graph(torch.tensor([[0, 1], [1, 2]]), num_nodes=4)
    >>> links = split_links(graph, validation=0.0, test=0.5)
    >>> train, whole = links.train.adjacency(), graph.adjacency()
    >>> GraphData("chain", train.unsqueeze(0), whole.unsqueeze(0), links).x_shape
    (4, 4)
    """

    name: str
    train: Tensor
    test: Tensor
    links: LinkSplit

    @property
    def x_shape(self) -> tuple[int, int]:
        """Return the shape (N, N) of the graph's adjacency."""
        return self.links.train.num_nodes, self.links.train.num_nodes

    @property
    def validation(self) -> None:
        """Return None: validation links are pairs of nodes in ``links``, not a second graph."""
        return None


#: Every data set has a name, ``train``, ``test`` and ``validation`` data, and ``x_shape``, the shape of one datum.
AnyDataSet: TypeAlias = DataSet | GraphData


def load(name: str, root: str | Path | None = None, *, download: bool = False) -> DataSet:
    """Read a data set from files under ``root``.

    ================  ==============================  =============================================================
    name              images: train / test, shape     files under ``root``
    ================  ==============================  =============================================================
    digits            1437 / 360, (1, 8, 8)           none: they come with scikit-learn
    mnist             60000 / 10000, (1, 28, 28)      ``MNIST/raw/``, the four files, unpacked or as ``.gz``
    fashion-mnist     60000 / 10000, (1, 28, 28)      ``FashionMNIST/raw/``, likewise
    cifar10           50000 / 10000, (3, 32, 32)      ``cifar-10-batches-py/`` or ``cifar-10-python.tar.gz``
    static-mnist      50000 / 10000, (1, 28, 28)      ``binarized_mnist/binarized_mnist.npz``: bits packed in uint8
    omniglot          19280 / 13180, (1, 28, 28)      ``omniglot/images_{background,evaluation}.npz``: bool paper
    frey-faces        1565 / 200, (1, 28, 20)         ``freyfaces/freyfaces.npz``: uint8 in video order
    sprites           3686 / 922, (1, 32, 32)         none: drawn, see :func:`~pyro_vae.data.sprites.sprites`
    ================  ==============================  =============================================================

    ``static-mnist`` and ``frey-faces`` also have a validation set, of 10000 and 200. Archives are unpacked into the
    user's cache, since ``root`` may be read-only. OMNIGLOT is averaged down from 105 x 105: do not compare results with
    those on the 28 x 28 file of Burda et al. Its labels number the characters of each file from 0. The test set of
    ``static-mnist`` is sorted by digit: take a part of it with :func:`subset_after_shuffle`.

    Args:
        name: one of :data:`NAMES`.
        root: folder of the files; see :func:`data_root` for the default.
        download: fetch missing files (``mnist``, ``fashion-mnist`` and ``cifar10`` only). Files and intact archives
            are not fetched again.

    Returns:
        :class:`DataSet`, with pixels in [0, 1] in the default float type.

    Raises:
        ValueError: for an unknown name, and for files that are absent, damaged, or of other arrays.
        OSError: for a folder that cannot be written, and for a failed download.
        RuntimeError: if every mirror of a download fails.

    >>> digits = load("digits")
    >>> len(digits.train), len(digits.test), digits.x_shape, digits.levels
    (1437, 360, (1, 8, 8), 17)
    """
    if name not in _LOADERS:
        raise ValueError(f"name={name!r} is not a known data set; known are {', '.join(NAMES)}")
    return _LOADERS[name](data_root(root), download)


def load_links(
    name: str, root: str | Path | None = None, *, validation: float = 0.05, test: float = 0.1, seed: int = 0
) -> GraphData:
    """Read a citation network as a data set of one datum, and hold links out.

    Args:
        name: one of :data:`~pyro_vae.data.GRAPHS`; see :func:`~pyro_vae.data.load_graph` for its file.
        root: the folder of the data sets; if None, as :func:`data_root`.
        validation, test: shares of the links to hold out.
        seed: seed of the split.

    Returns:
        :class:`GraphData`. Labels belong to nodes: read them from ``links.train.labels``.

    Raises:
        ValueError: as :func:`~pyro_vae.data.load_graph` and :func:`~pyro_vae.data.split_links`.
    """
    graph = load_graph(name, root)
    links = split_links(graph, validation=validation, test=test, seed=seed)
    train, whole = (each.adjacency().unsqueeze(0) for each in (links.train, graph))
    return GraphData(name, train, whole, links)


def _digits() -> DataSet:
    # scikit-learn, like torchvision below, takes seconds to import, and other data sets do not need it.
    from sklearn.datasets import load_digits

    pixels, classes = load_digits(return_X_y=True)
    images = unit(torch.from_numpy(pixels).reshape(-1, 1, 8, 8), 16)
    labels = torch.from_numpy(classes).long()
    # Four fifths of 1797 train, rounded down.
    train, test = torch.split(shuffled(len(images)), [1437, 360])
    return DataSet("digits", images[train], images[test], labels[train], labels[test], levels=17)


def _sprites() -> DataSet:
    drawn = sprites()
    # Four fifths of 4608 train, rounded down. Labels are shapes.
    (train, test), (labels, test_labels) = (
        torch.split(rows, [3686, 922]) for rows in (drawn.images, drawn.factors[:, 0].contiguous())
    )
    return DataSet("sprites", train, test, labels, test_labels, levels=2)


def _torchvision(name: str, class_name: str, root: Path, download: bool) -> DataSet:
    import torchvision.datasets

    source = getattr(torchvision.datasets, class_name)
    folder = unpacked(name, source, root, download)
    train, train_labels = torchvision_split(name, source, folder, train=True)
    test, test_labels = torchvision_split(name, source, folder, train=False)
    return DataSet(name, train, test, train_labels, test_labels, levels=256)


def _static_mnist(root: Path) -> DataSet:
    path = npz_file("static-mnist", root, "binarized_mnist/binarized_mnist.npz")
    packed = read_arrays(path, dict.fromkeys(("train", "valid", "test"), ("uint8", (None, 98))))
    bits = (torch.from_numpy(np.unpackbits(rows, axis=1)) for rows in packed)
    train, valid, test = (unit(rows.reshape(-1, 1, 28, 28), 1) for rows in bits)
    return DataSet("static-mnist", train, test, None, None, levels=2, validation=valid)


def _frey_faces(root: Path) -> DataSet:
    path = npz_file("frey-faces", root, "freyfaces/freyfaces.npz")
    (frames,) = read_arrays(path, {"images": ("uint8", (1965, 28, 20))})
    images = unit(torch.from_numpy(frames).unsqueeze(1), 255)
    # Neighbouring frames of a film are near copies: shuffle first. The sizes are the usual ones.
    train, valid, test = (images[rows] for rows in torch.split(shuffled(len(images)), [1565, 200, 200]))
    return DataSet("frey-faces", train, test, None, None, levels=256, validation=valid)


def _omniglot(root: Path) -> DataSet:
    paths = [npz_file("omniglot", root, f"omniglot/images_{part}.npz") for part in ("background", "evaluation")]
    (train, train_labels), (test, test_labels) = (_omniglot_ink(path) for path in paths)
    return DataSet("omniglot", train, test, train_labels, test_labels, levels=None)


def _omniglot_ink(path: Path) -> tuple[Tensor, Tensor]:
    paper, labels = read_arrays(path, {"images": ("bool", (None, None, 105, 105)), "labels": ("int64", (None, None))})
    if paper.shape[:2] != labels.shape:
        raise ValueError(f"{path} has images {paper.shape} and labels {labels.shape}, not one label per image")
    ink = torch.empty(*labels.shape, 28, 28)
    # One character at a time: all characters as floats at 105 x 105 need up to 1.7 GB.
    for character, drawings in zip(ink, paper, strict=True):
        character.copy_(adaptive_avg_pool2d(torch.from_numpy(~drawings).to(ink.dtype), 28))
    return ink.reshape(-1, 1, 28, 28), torch.from_numpy(labels).reshape(-1)


_LOADERS: dict[str, Callable[[Path, bool], DataSet]] = {
    "digits": lambda root, download: _digits(),
    "mnist": lambda root, download: _torchvision("mnist", "MNIST", root, download),
    "fashion-mnist": lambda root, download: _torchvision("fashion-mnist", "FashionMNIST", root, download),
    "cifar10": lambda root, download: _torchvision("cifar10", "CIFAR10", root, download),
    "static-mnist": lambda root, download: _static_mnist(root),
    "omniglot": lambda root, download: _omniglot(root),
    "frey-faces": lambda root, download: _frey_faces(root),
    "sprites": lambda root, download: _sprites(),
}
#: The names :func:`load` knows.
NAMES: tuple[str, ...] = tuple(_LOADERS)
