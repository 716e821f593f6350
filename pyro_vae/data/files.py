"""Files of the data sets: find them, unpack them, and read them whole or refuse them."""

from __future__ import annotations

import os
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_vae.data.transforms import unit

__all__ = ["absent", "all_there", "data_root", "npz_file", "read_arrays", "torchvision_split", "unpacked"]


def data_root(root: str | Path | None = None) -> Path:
    """Return the folder of the data sets.

    Args:
        root: the folder; if None, ``$PYRO_VAE_DATA``, else ``pyro_vae`` in ``$XDG_CACHE_HOME`` or ``~/.cache``.

    Returns:
        The folder; it need not exist.

    >>> data_root("images").name
    'images'
    """
    chosen = root if root is not None else os.environ.get("PYRO_VAE_DATA")
    return Path(chosen).expanduser() if chosen else _user_cache()


def _user_cache() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "pyro_vae"


def absent(name: str, root: Path, files: Iterable[str], remedy: str) -> ValueError:
    """Return the error for files that are not under ``root``, with the way out."""
    return ValueError(
        f"{name} is not under {root}: looked for {', '.join(files)}. Put them there, or name the folder that holds "
        f"them: root=, $PYRO_VAE_DATA, or --data-root on the command line; {remedy}"
    )


def all_there(folder: Path, files: Iterable[str]) -> bool:
    """Return whether a folder holds all of the files."""
    return all((folder / file).is_file() for file in files)


def npz_file(name: str, root: Path, file: str) -> Path:
    """Return the path of a file that cannot be downloaded.

    Raises:
        ValueError: for an absent file.
    """
    if not all_there(root, [file]):
        raise absent(name, root, [file], "download=True cannot fetch them")
    return root / file


def read_arrays(path: Path, expected: dict[str, tuple[str, tuple[int | None, ...]]]) -> list[np.ndarray[Any, Any]]:
    """Read arrays by name and check their dtypes and shapes; None stands for any size but 0."""
    try:
        # np.load leaves a damaged file open; this closes it.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            arrays = [stored[name] for name in expected]
    # TypeError: the file is a bare array, which is no context manager.
    except (EOFError, KeyError, OSError, TypeError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is damaged or not the file expected ({error}); replace it") from error
    for (name, (dtype, shape)), array in zip(expected.items(), arrays, strict=True):
        fits = array.ndim == len(shape) and array.size > 0
        fits = fits and all(b is None or a == b for a, b in zip(array.shape, shape, strict=True))
        if array.dtype != dtype or not fits:
            wanted = ", ".join("any" if size is None else str(size) for size in shape)
            raise ValueError(f"{path}: array {name!r} is {array.dtype} {array.shape}, not {dtype} ({wanted})")
    return arrays


def unpacked(name: str, source: Any, root: Path, download: bool) -> Path:
    """Return the folder of the unpacked files; unpack or fetch them first if necessary."""
    from torchvision.datasets.utils import check_integrity

    archives, files = _torchvision_files(source)
    if all_there(root, files):
        return root
    intact = [file for file, md5 in archives.items() if check_integrity(root / file, md5)]
    if len(intact) == len(archives):
        cache = _user_cache()
        if not all_there(cache, files):
            _unpack(source, root, intact, files, target=cache)
        return cache
    if download:
        _unpack(source, root, intact, files, target=root)
        return root
    damaged = [str(root / file) for file in archives if file not in intact and (root / file).is_file()]
    remedy = "download=True (--download on the command line) fetches them"
    if damaged:
        raise ValueError(f"{name}: not the published archive, by its md5: {', '.join(damaged)}. Replace it; {remedy}")
    raise absent(name, root, [*files, f"or else {', '.join(archives)}"], remedy)


def _unpack(source: Any, root: Path, archives: Iterable[str], files: Iterable[str], *, target: Path) -> None:
    """Unpack intact archives of ``root`` into ``target``, and fetch the others."""
    target.mkdir(parents=True, exist_ok=True)
    # torchvision writes in place: another process could read half a file. Each process therefore unpacks into a
    # temporary folder and moves whole files; the last one replaces a file by an equal one.
    with tempfile.TemporaryDirectory(dir=target, prefix=".unpacking-") as folder:
        stage = Path(folder)
        for file in archives:
            (stage / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / file, stage / file)
        # `download` unpacks an archive with the right md5 without fetching it.
        source(stage, train=False, download=True)
        for file in files:
            (target / file).parent.mkdir(parents=True, exist_ok=True)
            os.replace(stage / file, target / file)


def _torchvision_files(source: Any) -> tuple[dict[str, str], list[str]]:
    """Return the archives' paths with their md5, and the paths of the unpacked files."""
    if hasattr(source, "tgz_md5"):
        names = [file for file, _ in source.train_list + source.test_list] + [source.meta["filename"]]
        return {source.filename: source.tgz_md5}, [f"{source.base_folder}/{file}" for file in names]
    archives = {f"{source.__name__}/raw/{file}": md5 for file, md5 in source.resources}
    return archives, [file.removesuffix(".gz") for file in archives]


def torchvision_split(name: str, source: Any, folder: Path, *, train: bool) -> tuple[Tensor, Tensor]:
    """Read images, (N, C, H, W) in [0, 1], and labels, (N,) int64, with a data set class of torchvision.

    Raises:
        ValueError: for damaged files.
    """
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
    return unit(images, 255), labels.long()
