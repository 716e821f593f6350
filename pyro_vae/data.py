"""Data sets of images with pixels in [0, 1], and the maps between gray levels, bits and a continuum."""

from __future__ import annotations

import os
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

__all__ = ["NAMES", "DataSet", "binarise", "data_root", "dequantise", "load", "subset_after_shuffle"]

# Any number would serve; it stays as it is because scores on two different splits cannot be compared.
_SPLIT_SEED = 0
# How far a pixel may lie off its grid, in levels: far above rounding in float32 at 256 levels, 3e-5; far below the gap
# that some pixel shows when the number of levels is wrong.
_GRID_TOLERANCE = 0.01


class DataSet(NamedTuple):
    """Hold images whose every pixel is in [0, 1].

    Attributes:
        name: one of :data:`NAMES`.
        train: training images, (N, C, H, W), in the default float type at the time of loading.
        test: test images, (M, C, H, W).
        train_labels: class indices, (N,) int64, or None where the data have none.
        test_labels: class indices, (M,) int64, or None.
        levels: how many equally spaced gray levels k / (levels - 1) a pixel can take; None if they are not on a grid.
        validation: validation images, (V, C, H, W), for the data that are published with such a split; else None.

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
    ================  ==============================  =============================================================

    ``static-mnist`` and ``frey-faces`` also have a validation set, of 10000 and 200. Where only archives are there,
    unpacked copies are kept in the user's cache, for ``root`` may be read-only. OMNIGLOT is averaged down from
    105 x 105, so its numbers do not compare with those on the 28 x 28 file of Burda et al.; its labels count the
    characters of each of the two files from 0. The static MNIST's test set is sorted by digit: take parts of it with
    :func:`subset_after_shuffle`.

    Args:
        name: one of :data:`NAMES`.
        root: folder that holds the files; see :func:`data_root` for the default.
        download: fetch what ``root`` lacks (``mnist``, ``fashion-mnist`` and ``cifar10`` only). Nothing is fetched
            when the files or intact archives are there.

    Returns:
        The images and labels, pixels in [0, 1] in the default float type.

    Raises:
        ValueError: if the name is not known, or files are absent, damaged, or hold other arrays than these.
        OSError: if the folder to unpack or download into cannot be written, or a download fails.
        RuntimeError: if every mirror of a download fails.

    >>> digits = load("digits")
    >>> len(digits.train), len(digits.test), digits.x_shape, digits.levels
    (1437, 360, (1, 8, 8), 17)
    """
    if name not in _LOADERS:
        raise ValueError(f"name={name!r} is not a known data set; known are {', '.join(NAMES)}")
    return _LOADERS[name](data_root(root), download)


def data_root(root: str | Path | None = None) -> Path:
    """Return the folder that holds the data.

    Args:
        root: the folder; if None, ``$PYRO_VAE_DATA``, else ``pyro_vae`` in ``$XDG_CACHE_HOME`` or ``~/.cache``.

    Returns:
        The folder, which need not exist.

    >>> data_root("images").name
    'images'
    """
    chosen = root if root is not None else os.environ.get("PYRO_VAE_DATA")
    return Path(chosen).expanduser() if chosen else _user_cache()


def binarise(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw each pixel as a Bernoulli variable whose probability is its gray level.

    Drawn anew for each epoch, this makes the dynamically binarised MNIST.

    Args:
        x: gray levels in [0, 1], any shape.
        generator: source of randomness, on the device of ``x``; the global one if None.

    Returns:
        Zeros and ones, in the shape and type of ``x``.

    Raises:
        ValueError: if ``x`` is not in [0, 1].

    >>> binarise(torch.tensor([0.0, 1.0])).tolist()
    [0.0, 1.0]
    """
    _check_unit_interval(x)
    return torch.bernoulli(x, generator=generator)


def dequantise(x: Tensor, levels: int, generator: torch.Generator | None = None) -> Tensor:
    """Spread each gray level evenly over its own share of [0, 1).

    y = (k + u) / levels with k = (levels - 1) x and u ~ Uniform(0, 1), so that k = floor(levels y), and a density of
    y bounds the probability of k: log P(k) >= E[log p(y)] - log(levels) per pixel.

    Args:
        x: gray levels k / (levels - 1), any shape.
        levels: how many levels there are, at least 2.
        generator: source of randomness, on the device of ``x``; the global one if None.

    Returns:
        Values in [0, 1), in the shape and type of ``x``.

    Raises:
        ValueError: if ``levels`` is below 2 or more than the type of ``x`` resolves, or ``x`` is not on that grid.

    Reference:
        Theis, van den Oord and Bethge (2016), A note on the evaluation of generative models, ICLR, section 3.1.

    >>> y = dequantise(torch.tensor([0.0, 0.5, 1.0]), levels=3)
    >>> (3 * y).floor().tolist()
    [0.0, 1.0, 2.0]
    """
    if levels < 2:
        raise ValueError(f"levels={levels} leaves nothing to tell apart; pass 2 or more, e.g. the data set's own")
    _check_unit_interval(x)
    # Rounding in k + u, in the division and in a later product by `levels` moves a value by no more than this, in
    # levels. Noise that keeps this far from 0 and 1 is never rounded into the neighbouring level, nor to y = 1.
    margin = 2 * levels * torch.finfo(x.dtype).eps
    if margin > _GRID_TOLERANCE:
        raise ValueError(f"x of type {x.dtype} cannot resolve levels={levels}; convert x to a wider type")
    scaled = x * (levels - 1)
    level = scaled.round()
    if not torch.all((scaled - level).abs() < _GRID_TOLERANCE):
        raise ValueError(f"x is not on the grid k / {levels - 1}; pass levels=data_set.levels and images as loaded")
    noise = torch.rand(x.shape, generator=generator, dtype=x.dtype, device=x.device)
    return (level + margin + (1 - 2 * margin) * noise) / levels


def subset_after_shuffle(x: Tensor, size: int, seed: int = 0) -> Tensor:
    """Take ``size`` rows at random, the same ones at every call.

    Off the front alone they would not stand for the whole where rows are sorted. Images and labels taken with the same
    ``seed`` stay matched.

    Args:
        x: rows, (N, ...).
        size: how many rows, from 1 to N.
        seed: seed of the shuffle.

    Returns:
        The first rows after the shuffle, (size, ...).

    Raises:
        ValueError: if ``size`` is not between 1 and N.

    >>> sorted(subset_after_shuffle(torch.arange(3), 3).tolist())
    [0, 1, 2]
    """
    if not 1 <= size <= len(x):
        raise ValueError(f"size={size} is not between 1 and the number of rows, {len(x)}")
    return x[_shuffled(len(x), seed)[:size].to(x.device)]


def _shuffled(size: int, seed: int = _SPLIT_SEED) -> Tensor:
    # On the CPU, for streams differ between devices.
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))


def _check_unit_interval(x: Tensor) -> None:
    if not x.is_floating_point():
        raise ValueError(f"x has type {x.dtype}; pass gray levels in [0, 1] as floats")
    if x.numel() == 0:
        return
    low, high = (bound.item() for bound in x.aminmax())
    if not (low >= 0 and high <= 1):  # written so that a NaN fails
        raise ValueError(f"x is not in [0, 1]: it runs from {low:g} to {high:g}; divide it by its highest level")


def _user_cache() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "pyro_vae"


def _unit(images: Tensor, highest: int) -> Tensor:
    """Return (N, C, H, W) whole numbers 0..highest as floats in [0, 1]."""
    # One copy, divided in place: MNIST is 188 MB in float32, and a second copy only to divide would double that.
    return images.to(torch.get_default_dtype(), memory_format=torch.contiguous_format).div_(highest)


def _absent(name: str, root: Path, files: Iterable[str], remedy: str) -> ValueError:
    return ValueError(
        f"{name} is not under {root}: looked for {', '.join(files)}. Put them there, or name the folder that holds "
        f"them: root=, $PYRO_VAE_DATA, or --data-root on the command line; {remedy}"
    )


def _digits() -> DataSet:
    # Imported here, as torchvision below, for they take seconds to import and other data sets do without them.
    from sklearn.datasets import load_digits

    pixels, classes = load_digits(return_X_y=True)
    images = _unit(torch.from_numpy(pixels).reshape(-1, 1, 8, 8), 16)
    labels = torch.from_numpy(classes).long()
    # Of 1797 in all, four fifths train, rounded down.
    train, test = torch.split(_shuffled(len(images)), [1437, 360])
    return DataSet("digits", images[train], images[test], labels[train], labels[test], levels=17)


def _torchvision(name: str, class_name: str, root: Path, download: bool) -> DataSet:
    import torchvision.datasets

    source = getattr(torchvision.datasets, class_name)
    folder = _unpacked(name, source, root, download)
    train, train_labels = _torchvision_split(name, source, folder, train=True)
    test, test_labels = _torchvision_split(name, source, folder, train=False)
    return DataSet(name, train, test, train_labels, test_labels, levels=256)


def _torchvision_split(name: str, source: Any, folder: Path, *, train: bool) -> tuple[Tensor, Tensor]:
    split = "train" if train else "test"
    try:
        stored = source(folder, train=train)
        images, labels = torch.as_tensor(stored.data), torch.as_tensor(stored.targets)
    except (AssertionError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"the {split} files of {name} under {folder} are damaged ({error}): remove them") from error
    images, shape = (images.movedim(-1, 1), (3, 32, 32)) if images.ndim == 4 else (images.unsqueeze(1), (1, 28, 28))
    if images.shape[1:] != shape or images.dtype != torch.uint8 or len(images) != len(labels):
        raise ValueError(
            f"the {split} files of {name} under {folder} hold {images.dtype} images of shape {tuple(images.shape)} and "
            f"{len(labels)} labels, not one label per uint8 image of shape {shape}: remove them"
        )
    return _unit(images, 255), labels.long()


def _torchvision_files(source: Any) -> tuple[dict[str, str], list[str]]:
    """Return the archives' paths with their md5, and the paths of the unpacked files."""
    if hasattr(source, "tgz_md5"):
        names = [file for file, _ in source.train_list + source.test_list] + [source.meta["filename"]]
        return {source.filename: source.tgz_md5}, [f"{source.base_folder}/{file}" for file in names]
    archives = {f"{source.__name__}/raw/{file}": md5 for file, md5 in source.resources}
    return archives, [file.removesuffix(".gz") for file in archives]


def _unpacked(name: str, source: Any, root: Path, download: bool) -> Path:
    """Return a folder that holds the unpacked files, having unpacked or fetched them if need be."""
    from torchvision.datasets.utils import check_integrity

    archives, files = _torchvision_files(source)
    if _all_there(root, files):
        return root
    intact = [file for file, md5 in archives.items() if check_integrity(root / file, md5)]
    if len(intact) == len(archives):
        cache = _user_cache()
        if not _all_there(cache, files):
            _unpack(source, root, intact, files, target=cache)
        return cache
    if download:
        _unpack(source, root, intact, files, target=root)
        return root
    damaged = [str(root / file) for file in archives if file not in intact and (root / file).is_file()]
    remedy = "download=True (--download on the command line) fetches them"
    if damaged:
        raise ValueError(f"{name}: not the published archive, by its md5: {', '.join(damaged)}. Replace it; {remedy}")
    raise _absent(name, root, [*files, f"or else {', '.join(archives)}"], remedy)


def _all_there(folder: Path, files: Iterable[str]) -> bool:
    return all((folder / file).is_file() for file in files)


def _unpack(source: Any, root: Path, archives: Iterable[str], files: Iterable[str], *, target: Path) -> None:
    """Unpack intact archives of ``root`` into ``target``, fetching those that are not among them."""
    target.mkdir(parents=True, exist_ok=True)
    # torchvision writes in place, so another process could read half a file. Here each moves whole files out of a
    # folder of its own, and the last replaces a file by its equal.
    with tempfile.TemporaryDirectory(dir=target, prefix=".unpacking-") as folder:
        stage = Path(folder)
        for file in archives:
            (stage / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / file, stage / file)
        # With an archive in place that has the right md5, `download` means: unpack it, and ask nobody.
        source(stage, train=False, download=True)
        for file in files:
            (target / file).parent.mkdir(parents=True, exist_ok=True)
            os.replace(stage / file, target / file)


def _static_mnist(root: Path) -> DataSet:
    path = _npz("static-mnist", root, "binarized_mnist/binarized_mnist.npz")
    packed = _arrays(path, dict.fromkeys(("train", "valid", "test"), ("uint8", (None, 98))))
    bits = (torch.from_numpy(np.unpackbits(rows, axis=1)) for rows in packed)
    train, valid, test = (_unit(rows.reshape(-1, 1, 28, 28), 1) for rows in bits)
    return DataSet("static-mnist", train, test, None, None, levels=2, validation=valid)


def _frey_faces(root: Path) -> DataSet:
    path = _npz("frey-faces", root, "freyfaces/freyfaces.npz")
    (frames,) = _arrays(path, {"images": ("uint8", (1965, 28, 20))})
    images = _unit(torch.from_numpy(frames).unsqueeze(1), 255)
    # Shuffled first, for neighbouring frames of a film are near copies; the sizes are the usual ones.
    train, valid, test = (images[rows] for rows in torch.split(_shuffled(len(images)), [1565, 200, 200]))
    return DataSet("frey-faces", train, test, None, None, levels=256, validation=valid)


def _omniglot(root: Path) -> DataSet:
    paths = [_npz("omniglot", root, f"omniglot/images_{part}.npz") for part in ("background", "evaluation")]
    (train, train_labels), (test, test_labels) = (_omniglot_ink(path) for path in paths)
    return DataSet("omniglot", train, test, train_labels, test_labels, levels=None)


def _omniglot_ink(path: Path) -> tuple[Tensor, Tensor]:
    paper, labels = _arrays(path, {"images": ("bool", (None, None, 105, 105)), "labels": ("int64", (None, None))})
    if paper.shape[:2] != labels.shape:
        raise ValueError(f"{path} has images {paper.shape} and labels {labels.shape}, not one label per image")
    ink = torch.empty(*labels.shape, 28, 28)
    # One character at a time: all of them as floats at 105 x 105 would take up to 1.7 GB.
    for character, drawings in zip(ink, paper, strict=True):
        character.copy_(adaptive_avg_pool2d(torch.from_numpy(~drawings).to(ink.dtype), 28))
    return ink.reshape(-1, 1, 28, 28), torch.from_numpy(labels).reshape(-1)


def _npz(name: str, root: Path, file: str) -> Path:
    if not _all_there(root, [file]):
        raise _absent(name, root, [file], "download=True cannot fetch them")
    return root / file


def _arrays(path: Path, expected: dict[str, tuple[str, tuple[int | None, ...]]]) -> list[np.ndarray[Any, Any]]:
    """Read arrays by name, each with its dtype and shape, None standing for any size but 0."""
    try:
        # Opened here, for np.load leaves a damaged file open.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            arrays = [stored[name] for name in expected]
    # A TypeError, where the file is a bare array under the wrong name: it is no context.
    except (EOFError, KeyError, OSError, TypeError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is damaged or not the file expected ({error}); replace it") from error
    for (name, (dtype, shape)), array in zip(expected.items(), arrays, strict=True):
        fits = array.ndim == len(shape) and array.size > 0
        fits = fits and all(b is None or a == b for a, b in zip(array.shape, shape, strict=True))
        if array.dtype != dtype or not fits:
            wanted = ", ".join("any" if size is None else str(size) for size in shape)
            raise ValueError(f"{path}: array {name!r} is {array.dtype} {array.shape}, not {dtype} ({wanted})")
    return arrays


_LOADERS: dict[str, Callable[[Path, bool], DataSet]] = {
    "digits": lambda root, download: _digits(),
    "mnist": lambda root, download: _torchvision("mnist", "MNIST", root, download),
    "fashion-mnist": lambda root, download: _torchvision("fashion-mnist", "FashionMNIST", root, download),
    "cifar10": lambda root, download: _torchvision("cifar10", "CIFAR10", root, download),
    "static-mnist": lambda root, download: _static_mnist(root),
    "omniglot": lambda root, download: _omniglot(root),
    "frey-faces": lambda root, download: _frey_faces(root),
}

#: The names :func:`load` knows.
NAMES: tuple[str, ...] = tuple(_LOADERS)
