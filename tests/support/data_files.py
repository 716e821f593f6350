"""Small data files in their published formats, written for the tests of the data sets."""

from __future__ import annotations

import gzip
import hashlib
import pickle
import tarfile
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision

from pyro_vae.data import DataSet


@pytest.fixture(autouse=True)
def own_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Keep the user's own data and cache out of every test."""
    monkeypatch.delenv("PYRO_VAE_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


def idx(array: np.ndarray) -> bytes:
    """Write bytes in MNIST's own format."""
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    return header + array.astype(np.uint8).tobytes()


def md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def mnist_arrays() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {
        "train-images-idx3-ubyte": generator.integers(0, 256, (5, 28, 28)),
        "train-labels-idx1-ubyte": np.array([3, 1, 4, 1, 5]),
        "t10k-images-idx3-ubyte": generator.integers(0, 256, (2, 28, 28)),
        "t10k-labels-idx1-ubyte": np.array([9, 2]),
    }


def write_mnist(raw: Path) -> None:
    raw.mkdir(parents=True)
    for file, array in mnist_arrays().items():
        (raw / file).write_bytes(idx(array))


def write_mnist_archives(raw: Path, class_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write small archives, and have torchvision take their md5 for those of the published ones."""
    raw.mkdir(parents=True)
    archives = {f"{file}.gz": gzip.compress(idx(array)) for file, array in mnist_arrays().items()}
    for file, content in archives.items():
        (raw / file).write_bytes(content)
    resources = [(file, md5(content)) for file, content in archives.items()]
    monkeypatch.setattr(getattr(torchvision.datasets, class_name), "resources", resources)


def cifar_images(batch: int) -> np.ndarray:
    return np.random.default_rng(batch).integers(0, 256, (2, 3, 32, 32), dtype=np.uint8)


def write_cifar(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write two images a batch in CIFAR-10's own format, with md5 as for MNIST."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    names = [*(f"data_batch_{batch}" for batch in range(1, 6)), "test_batch"]
    sums = []
    for batch, name in enumerate(names):
        content = pickle.dumps({"data": cifar_images(batch).reshape(2, -1), "labels": [batch, 9]})
        (folder / name).write_bytes(content)
        sums.append([name, md5(content)])
    meta = pickle.dumps({"label_names": list("abcdefghij")})
    (folder / "batches.meta").write_bytes(meta)
    cifar = torchvision.datasets.CIFAR10
    monkeypatch.setattr(cifar, "train_list", sums[:5])
    monkeypatch.setattr(cifar, "test_list", sums[5:])
    monkeypatch.setattr(cifar, "meta", {"filename": "batches.meta", "key": "label_names", "md5": md5(meta)})


def write_cifar_archive(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar(root, monkeypatch)
    archive = root / "cifar-10-python.tar.gz"
    folder = root / "cifar-10-batches-py"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, arcname=folder.name)
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "tgz_md5", md5(archive.read_bytes()))


def write_npz(path: Path, **arrays: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **arrays)


def omniglot_arrays(characters: int) -> dict[str, np.ndarray]:
    paper = np.ones((characters, 2, 105, 105), dtype=bool)
    paper[0, 1] = False
    paper[0, 0, 104, 104] = False
    return {"images": paper, "labels": np.repeat(np.arange(characters), 2).reshape(-1, 2)}


def write_omniglot(root: Path) -> None:
    write_npz(root / "omniglot" / "images_background.npz", **omniglot_arrays(3))
    write_npz(root / "omniglot" / "images_evaluation.npz", **omniglot_arrays(1))


def labels_of(data: DataSet) -> tuple[torch.Tensor, torch.Tensor]:
    assert data.train_labels is not None
    assert data.test_labels is not None
    return data.train_labels, data.test_labels


def contents(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def on_grid(x: torch.Tensor, levels: int) -> bool:
    scaled = x.double() * (levels - 1)
    return bool(((scaled - scaled.round()).abs() < 1e-4).all() and x.min() >= 0 and x.max() <= 1)
