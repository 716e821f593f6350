"""Facts about the data sets and about gray levels."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from pyro_vae.data import NAMES, DataSet, binarise, dequantise, load, subset_after_shuffle
from tests.support.data_files import (
    cifar_images,
    contents,
    labels_of,
    mnist_arrays,
    no_network,  # noqa: F401
    on_grid,
    own_folders,  # noqa: F401
    write_cifar,
    write_cifar_archive,
    write_mnist,
    write_mnist_archives,
    write_npz,
    write_omniglot,
)

SHARED_DATA = Path(os.environ.get("PYRO_VAE_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")
MNIST_LIKE = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST"}
# Class sizes of MNIST's test set, in the order of the digits.
TEST_COUNTS = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


def real(name: str, folder: str, cache: Path) -> DataSet:
    """Load a data set from the real files, or skip the test."""
    what = "MNIST" if name == "mnist" else name
    if not (SHARED_DATA / folder).is_dir():
        pytest.skip(f"needs the real {what} files: set PYRO_VAE_DATA")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache))
        return load(name, SHARED_DATA)


@pytest.fixture(scope="module")
def mnist(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    return real("mnist", "MNIST", tmp_path_factory.mktemp("cache"))


# Data sets, from small files in their formats


def test_names_are_those_promised() -> None:
    assert NAMES == ("digits", "mnist", "fashion-mnist", "cifar10", "static-mnist", "omniglot", "frey-faces", "sprites")


def test_digits_split_is_disjoint_and_complete() -> None:
    digits = load("digits")
    assert digits.train.shape == (1437, 1, 8, 8)
    assert digits.test.shape == (360, 1, 8, 8)
    assert digits.train.dtype == torch.get_default_dtype()
    train_labels, test_labels = labels_of(digits)
    assert train_labels.dtype == test_labels.dtype == torch.int64
    images = (torch.cat([digits.train, digits.test]) * 16).reshape(1797, 64).tolist()
    labels = torch.cat(labels_of(digits)).tolist()
    pixels, classes = load_digits(return_X_y=True)
    split = sorted((*image, label) for image, label in zip(images, labels, strict=True))
    assert split == sorted((*image, label) for image, label in zip(pixels.tolist(), classes.tolist(), strict=True))


def test_digits_split_never_changes() -> None:
    digits = load("digits")
    _, test_labels = labels_of(digits)
    assert digits.levels == 17
    assert on_grid(digits.train, 17)
    # Pinned, for a score on another split could not be compared.
    assert test_labels[:8].tolist() == [2, 4, 8, 4, 9, 6, 8, 7]
    assert torch.equal(digits.test, load("digits").test)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("name", MNIST_LIKE)
@pytest.mark.parametrize("download", [False, True])
@pytest.mark.parametrize("archived", [False, True])
def test_mnist_is_read_as_written(
    name: str, download: bool, archived: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = tmp_path / "data" / MNIST_LIKE[name] / "raw"
    if archived:
        write_mnist_archives(raw, MNIST_LIKE[name], monkeypatch)
    else:
        write_mnist(raw)
    before = contents(tmp_path / "data")
    data = load(name, tmp_path / "data", download=download)
    arrays = mnist_arrays()
    assert data.name == name
    assert data.levels == 256
    assert data.x_shape == (1, 28, 28)
    train_labels, test_labels = labels_of(data)
    assert (data.train * 255).round().squeeze(1).tolist() == arrays["train-images-idx3-ubyte"].tolist()
    assert (data.test * 255).round().squeeze(1).tolist() == arrays["t10k-images-idx3-ubyte"].tolist()
    assert train_labels.tolist() == [3, 1, 4, 1, 5]
    assert test_labels.tolist() == [9, 2]
    assert train_labels.dtype == torch.int64
    assert data.train.dtype == torch.get_default_dtype()
    assert contents(tmp_path / "data") == before, "the root may be read-only"


@pytest.mark.usefixtures("no_network")
def test_unpacked_copy_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_mnist_archives(tmp_path / "data" / "MNIST" / "raw", "MNIST", monkeypatch)
    load("mnist", tmp_path / "data")
    kept = contents(tmp_path / "cache")
    assert {path.name for path in kept if path.is_file()} == set(mnist_arrays())
    load("mnist", tmp_path / "data")
    assert contents(tmp_path / "cache") == kept
    # The cache is the root by default, so the data stay there when the archives have gone.
    assert len(load("mnist").train) == 5


@pytest.mark.usefixtures("no_network")
def test_several_may_unpack_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_mnist_archives(tmp_path / "data" / "MNIST" / "raw", "MNIST", monkeypatch)
    start = threading.Barrier(4)

    def load_at_once(_: int) -> DataSet:
        start.wait()
        return load("mnist", tmp_path / "data")

    with ThreadPoolExecutor(4) as pool:
        loaded = list(pool.map(load_at_once, range(4)))
    assert all(torch.equal(data.train, loaded[0].train) for data in loaded)
    assert [path.name for path in (tmp_path / "cache" / "pyro_vae").iterdir()] == ["MNIST"]


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("write", [write_cifar, write_cifar_archive])
def test_cifar_is_read_as_written(
    write: Callable[[Path, pytest.MonkeyPatch], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "data", monkeypatch)
    before = contents(tmp_path / "data")
    data = load("cifar10", tmp_path / "data")
    assert data.train.shape == (10, 3, 32, 32)
    assert data.test.shape == (2, 3, 32, 32)
    assert data.levels == 256
    assert data.train.is_contiguous()
    assert (data.train * 255).round().tolist() == np.concatenate([cifar_images(batch) for batch in range(5)]).tolist()
    assert (data.test * 255).round().tolist() == cifar_images(5).tolist()
    train_labels, test_labels = labels_of(data)
    assert train_labels.tolist() == [0, 9, 1, 9, 2, 9, 3, 9, 4, 9]
    assert test_labels.tolist() == [5, 9]
    assert contents(tmp_path / "data") == before


def test_static_mnist_is_read_as_written(tmp_path: Path) -> None:
    bits = {name: np.random.default_rng(n).integers(0, 2, (n, 784)) for n, name in enumerate(("train", "valid"), 2)}
    bits["test"] = np.eye(784, dtype=int)[[0, 29]]
    packed = {name: np.packbits(rows.astype(np.uint8), axis=1) for name, rows in bits.items()}
    write_npz(tmp_path / "binarized_mnist" / "binarized_mnist.npz", **packed)
    data = load("static-mnist", tmp_path)
    assert data.levels == 2
    assert (data.train_labels, data.test_labels) == (None, None)
    assert data.train.flatten(1).tolist() == bits["train"].tolist()
    assert data.validation is not None
    assert data.validation.flatten(1).tolist() == bits["valid"].tolist()
    assert data.test.nonzero().tolist() == [[0, 0, 0, 0], [1, 0, 1, 1]]


def test_frey_faces_split_is_disjoint_and_complete(tmp_path: Path) -> None:
    # Frame i has i in the top left corner, in base 256.
    frames = np.zeros((1965, 28, 20), dtype=np.uint8)
    frames[:, 0, 0], frames[:, 0, 1] = np.divmod(np.arange(1965), 256)
    write_npz(tmp_path / "freyfaces" / "freyfaces.npz", images=frames)
    data = load("frey-faces", tmp_path)
    assert data.validation is not None
    assert [len(data.train), len(data.validation), len(data.test)] == [1565, 200, 200]
    assert data.x_shape == (1, 28, 20)
    assert data.levels == 256
    corner = (torch.cat([data.train, data.validation, data.test])[:, 0, 0, :2] * 255).round().long()
    frame = 256 * corner[:, 0] + corner[:, 1]
    assert sorted(frame.tolist()) == list(range(1965))
    assert torch.equal(frame, torch.randperm(1965, generator=torch.Generator().manual_seed(0)))


def test_omniglot_is_ink(tmp_path: Path) -> None:
    write_omniglot(tmp_path)
    data = load("omniglot", tmp_path)
    assert data.train.shape == (6, 1, 28, 28)
    assert data.test.shape == (2, 1, 28, 28)
    assert data.levels is None
    assert data.train[1].eq(1).all(), "the second drawing is all ink"
    # A pixel of the 28 is the mean of the 4 x 4 of the 105 that it touches, in the corner.
    assert data.train[0].nonzero().tolist() == [[0, 27, 27]]
    assert data.train[0, 0, 27, 27] == 1 / 16
    assert not data.train[2:].any()
    train_labels, test_labels = labels_of(data)
    assert train_labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert test_labels.tolist() == [0, 0]


# The real files


def test_real_mnist(mnist: DataSet) -> None:
    assert mnist.train.shape == (60000, 1, 28, 28)
    assert mnist.test.shape == (10000, 1, 28, 28)
    train_labels, test_labels = labels_of(mnist)
    assert train_labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert train_labels.bincount().tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert test_labels.bincount().tolist() == TEST_COUNTS
    assert round(mnist.train.mean(dtype=torch.float64).item(), 4) == 0.1307
    assert on_grid(mnist.test, 256)
    assert mnist.train.min() == 0
    assert mnist.train.max() == 1


def test_real_fashion_mnist(tmp_path: Path) -> None:
    data = real("fashion-mnist", "FashionMNIST", tmp_path)
    assert data.train.shape == (60000, 1, 28, 28)
    assert data.test.shape == (10000, 1, 28, 28)
    train_labels, test_labels = labels_of(data)
    assert train_labels.bincount().tolist() == [6000] * 10
    assert test_labels.bincount().tolist() == [1000] * 10
    assert round(data.train.mean(dtype=torch.float64).item(), 4) == 0.2860


def test_real_static_mnist_is_a_draw_from_mnist(mnist: DataSet, tmp_path: Path) -> None:
    data = real("static-mnist", "binarized_mnist", tmp_path)
    _, test_labels = labels_of(mnist)
    assert data.validation is not None
    assert [len(data.train), len(data.validation), len(data.test)] == [50000, 10000, 10000]
    assert data.x_shape == (1, 28, 28)
    bits, gray = data.test, mnist.test[test_labels.argsort(stable=True)]
    # Sorted by digit, each digit in MNIST's order: black stays black and white stays white.
    assert not bits[gray == 0].any()
    assert bits[gray == 1].all()
    first = subset_after_shuffle(test_labels.sort().values, 1000).bincount()
    assert first.min() > 60, "after a shuffle every digit is in the first tenth"


def test_real_omniglot(tmp_path: Path) -> None:
    data = real("omniglot", "omniglot", tmp_path)
    assert data.train.shape == (19280, 1, 28, 28)
    assert data.test.shape == (13180, 1, 28, 28)
    train_labels, test_labels = labels_of(data)
    assert train_labels.bincount().tolist() == [20] * 964
    assert test_labels.bincount().tolist() == [20] * 659
    assert data.train.min() == 0
    assert data.train.max() <= 1
    assert data.train.mean() < 0.5, "there is more paper than ink"


def test_real_frey_faces(tmp_path: Path) -> None:
    data = real("frey-faces", "freyfaces", tmp_path)
    assert on_grid(data.train, 256)
    assert data.x_shape == (1, 28, 20)
    assert round(data.train.min().item() * 255) >= 8
    assert round(data.train.max().item() * 255) <= 238


# Gray levels


def test_binarise_has_the_gray_level_as_its_mean() -> None:
    x = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0]).expand(40_000, 5)
    bits = binarise(x, torch.Generator().manual_seed(0))
    assert bits.dtype == x.dtype
    assert set(bits.flatten().tolist()) == {0.0, 1.0}
    standard_error = (x[0] * (1 - x[0]) / len(x)).sqrt()
    assert ((bits.mean(0) - x[0]).abs() <= 4 * standard_error).all()


def test_draws_follow_their_generator() -> None:
    x = load("digits").test
    for draw in (binarise, partial(dequantise, levels=17)):
        first, again = (draw(x, generator=torch.Generator().manual_seed(1)) for _ in range(2))
        assert torch.equal(first, again)
        assert not torch.equal(first, draw(x, generator=torch.Generator().manual_seed(2)))


@pytest.mark.parametrize("bad", [-0.1, 1.1, float("nan")])
def test_gray_levels_outside_the_unit_interval_are_refused(bad: float) -> None:
    x = torch.tensor([0.0, bad])
    with pytest.raises(ValueError, match=r"x is not in \[0, 1\]"):
        binarise(x)
    with pytest.raises(ValueError, match=r"x is not in \[0, 1\]"):
        dequantise(x, 256)


def test_whole_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"x has type torch.uint8; pass gray levels in \[0, 1\]"):
        binarise(torch.ones(2, dtype=torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("levels", [2, 17, 49, 256])
@pytest.mark.parametrize("noise", ["lowest", "drawn", "highest"])
def test_dequantise_is_inverted_by_floor(
    levels: int, dtype: torch.dtype, noise: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    level = torch.arange(levels, dtype=dtype)
    if noise != "drawn":
        # The ends of what torch.rand draws; k + u would round to k + 1 at the upper one.
        end = 0.0 if noise == "lowest" else 1 - torch.finfo(dtype).eps / 2
        monkeypatch.setattr(torch, "rand", lambda *_, dtype, **__: torch.full((), end, dtype=dtype))
    y = dequantise((level / (levels - 1)).expand(100, levels), levels)
    assert y.dtype == dtype
    assert y.shape == (100, levels)
    assert (y >= 0).all()
    assert (y < 1).all()
    assert torch.equal((y * levels).floor(), level.expand(100, levels))


def test_dequantise_spreads_evenly() -> None:
    y = dequantise(torch.ones(40_000, dtype=torch.float64), 2, torch.Generator().manual_seed(0))
    noise = 2 * y - 1
    # A uniform variable has mean 1/2 and variance 1/12, and its square mean 1/3 and variance 4/45.
    assert abs(noise.mean().item() - 1 / 2) <= 4 * (1 / 12 / 40_000) ** 0.5
    assert abs(noise.square().mean().item() - 1 / 3) <= 4 * (4 / 45 / 40_000) ** 0.5


def test_dequantise_refuses_another_grid() -> None:
    digits = load("digits").test
    with pytest.raises(ValueError, match=r"x is not on the grid k / 255; pass levels=data_set.levels"):
        dequantise(digits, 256)
    with pytest.raises(ValueError, match="levels=1 leaves nothing"):
        dequantise(digits, 1)
    with pytest.raises(ValueError, match=r"torch.float16 cannot resolve levels=256; convert x to a wider type"):
        dequantise(digits.half(), 256)


def test_subset_after_shuffle_keeps_images_and_labels_matched() -> None:
    rows = torch.arange(100)
    part = subset_after_shuffle(rows, 10, seed=3)
    assert len(set(part.tolist())) == 10
    assert torch.equal(subset_after_shuffle(2 * rows, 10, seed=3), 2 * part)
    assert not torch.equal(subset_after_shuffle(rows, 10, seed=4), part)
    assert torch.equal(subset_after_shuffle(rows, 20, seed=3)[:10], part)
    assert subset_after_shuffle(rows, 100).sort().values.tolist() == list(range(100))


@pytest.mark.parametrize("size", [0, -1, 4])
def test_subset_after_shuffle_refuses_other_sizes(size: int) -> None:
    with pytest.raises(ValueError, match=f"size={size} is not between 1 and the number of rows, 3"):
        subset_after_shuffle(torch.zeros(3), size)
