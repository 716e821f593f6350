"""Facts about downloads, and about what is said of absent or damaged data files and folders."""

from __future__ import annotations

import http.server
import re
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision

from pyro_vae.data import data_root, load
from tests.support.data_files import (
    idx,
    no_network,  # noqa: F401
    omniglot_arrays,
    own_folders,  # noqa: F401
    write_cifar,
    write_cifar_archive,
    write_mnist,
    write_mnist_archives,
    write_npz,
    write_omniglot,
)

# Downloads


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    """Serve files and write no log."""

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def mirror(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """Serve a folder over HTTP on this machine."""
    folder = tmp_path / "mirror"
    folder.mkdir()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield folder, f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


def test_download_fetches_what_is_lacking(
    mirror: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, url = mirror
    write_mnist_archives(tmp_path / "data" / "MNIST" / "raw", "MNIST", monkeypatch)
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [url])
    lacking, damaged, *_ = sorted((tmp_path / "data" / "MNIST" / "raw").iterdir())
    for path in (lacking, damaged):
        path.rename(folder / path.name)
    damaged.write_bytes(b"damaged")
    data = load("mnist", tmp_path / "data", download=True)
    assert (len(data.train), len(data.test)) == (5, 2)
    assert damaged.read_bytes() == b"damaged", "files of the user's stay as they were"
    # Now they are in the root, and nothing is fetched again.
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [])
    assert torch.equal(load("mnist", tmp_path / "data", download=True).train, data.train)


def test_download_of_cifar(mirror: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, url = mirror
    write_cifar_archive(folder, monkeypatch)
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", url + "cifar-10-python.tar.gz")
    assert len(load("cifar10", tmp_path / "data", download=True).train) == 10
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["cifar-10-batches-py"]


# What goes wrong


def test_unknown_name_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"name='minst'.*known are digits, mnist, fashion-mnist"):
        load("minst")


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("mnist", "MNIST/raw/train-images-idx3-ubyte.gz"),
        ("fashion-mnist", "FashionMNIST/raw/t10k-labels-idx1-ubyte"),
        ("cifar10", "cifar-10-batches-py/data_batch_1"),
    ],
)
def test_absent_files_are_named_with_the_remedy(name: str, file: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{name} is not under {re.escape(str(tmp_path))}") as raised:
        load(name, tmp_path)
    for part in (file, "$PYRO_VAE_DATA", "--data-root", "download=True", "--download"):
        assert part in str(raised.value)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("name", ["static-mnist", "omniglot", "frey-faces"])
def test_data_without_a_download_say_so(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"{name} is not under.*\.npz.*PYRO_VAE_DATA.*cannot fetch"):
        load(name, tmp_path, download=True)


@pytest.mark.usefixtures("no_network")
def test_damaged_archive_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = tmp_path / "MNIST" / "raw"
    write_mnist_archives(raw, "MNIST", monkeypatch)
    damaged = raw / "t10k-images-idx3-ubyte.gz"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"md5: {re.escape(str(damaged))}. Replace it"):
        load("mnist", tmp_path)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("train-images-idx3-ubyte", b""),
        ("train-images-idx3-ubyte", idx(np.zeros((5, 28, 28)))[:-1]),
        ("train-images-idx3-ubyte", idx(np.zeros((5, 28, 27)))),
        ("train-labels-idx1-ubyte", idx(np.zeros(4))),
        ("train-labels-idx1-ubyte", b"not labels at all"),
    ],
)
def test_damaged_unpacked_files_are_named(file: str, content: bytes, tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    write_mnist(raw)
    (raw / file).write_bytes(content)
    with pytest.raises(ValueError, match=f"train files of mnist under {re.escape(str(tmp_path))} .*remove them"):
        load("mnist", tmp_path)


def test_changed_cifar_is_not_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar(tmp_path, monkeypatch)
    with (tmp_path / "cifar-10-batches-py" / "test_batch").open("ab") as file:
        file.write(b".")
    with pytest.raises(ValueError, match=r"files of cifar10 under .* are damaged .*corrupted"):
        load("cifar10", tmp_path)


@pytest.mark.parametrize("size", [0, 10, 1000])
def test_cut_npz_is_named(size: int, tmp_path: Path) -> None:
    write_omniglot(tmp_path)
    path = tmp_path / "omniglot" / "images_evaluation.npz"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=f"{re.escape(str(path))} is damaged"):
        load("omniglot", tmp_path)


def test_npz_that_holds_other_things_is_named(tmp_path: Path) -> None:
    path = tmp_path / "freyfaces" / "freyfaces.npz"
    frames = np.zeros((1965, 28, 20), dtype=np.uint8)
    write_npz(path, faces=frames)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))} is damaged.*images"):
        load("frey-faces", tmp_path)
    write_npz(path, images=frames / 255)
    with pytest.raises(ValueError, match=r"array 'images' is float64 \(1965, 28, 20\), not uint8 \(1965, 28, 20\)"):
        load("frey-faces", tmp_path)
    write_npz(path, images=frames[1:])
    with pytest.raises(ValueError, match=r"is uint8 \(1964, 28, 20\)"):
        load("frey-faces", tmp_path)
    write_npz(path, images=np.array([{"no": "pickle"}], dtype=object))
    with pytest.raises(ValueError, match=r"is damaged.*allow_pickle"):
        load("frey-faces", tmp_path)
    with path.open("wb") as file:
        np.save(file, frames)
    with pytest.raises(ValueError, match="is damaged or not the file expected"):
        load("frey-faces", tmp_path)


def test_omniglot_needs_a_label_per_image(tmp_path: Path) -> None:
    write_omniglot(tmp_path)
    arrays = omniglot_arrays(3)
    path = tmp_path / "omniglot" / "images_background.npz"
    write_npz(path, images=arrays["images"], labels=arrays["labels"][:2])
    with pytest.raises(ValueError, match="not one label per image"):
        load("omniglot", tmp_path)


# Folders


def test_data_root_takes_argument_then_variable_then_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert data_root() == tmp_path / "cache" / "pyro_vae"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert data_root() == Path.home() / ".cache" / "pyro_vae"
    monkeypatch.setenv("PYRO_VAE_DATA", str(tmp_path / "set"))
    assert data_root() == tmp_path / "set"
    assert data_root(tmp_path) == data_root(str(tmp_path)) == tmp_path
    assert data_root("~") == Path.home()


def test_variable_names_the_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_mnist(tmp_path / "MNIST" / "raw")
    monkeypatch.setenv("PYRO_VAE_DATA", str(tmp_path))
    assert len(load("mnist").train) == 5
