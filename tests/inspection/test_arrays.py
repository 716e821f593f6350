"""Arrays, frames and data sets give the bits of the tensors that they stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.utils.data import Subset, TensorDataset, random_split

import pyro_vae as pv
from pyro_vae.models import LinearGaussianVAE

X = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).float()


def mapped(folder: Path) -> Any:
    np.save(folder / "x.npy", X.numpy())
    return np.load(folder / "x.npy", mmap_mode="r")


STAND_INS: dict[str, Any] = {
    "float32": lambda _: X.numpy(),
    "float64": lambda _: X.numpy().astype(np.float64),
    "float128": lambda _: X.numpy().astype(np.longdouble),
    "other byte order": lambda _: X.numpy().astype(">f4"),
    "reversed rows": lambda _: X.flip(0).numpy()[::-1],
    "columns of a Fortran array": lambda _: np.asfortranarray(np.repeat(X.numpy(), 2, axis=1))[:, ::2],
    "read-only": lambda _: np.broadcast_to(X.numpy(), (6, 3)),
    "file mapped for reading": mapped,
    "frame": lambda _: pandas.DataFrame(X.numpy(), columns=list("abc")),
    "frame of two kinds": lambda _: (
        pandas.DataFrame(X.numpy()).assign(**{"2": X[:, 2].double().numpy()}).iloc[:, [0, 1, 3]]
    ),
    "data set": lambda _: TensorDataset(X),
    "part of a data set": lambda _: Subset(Subset(TensorDataset(torch.cat([X, X + 1])), range(9)), list(range(6))),
}


@pytest.mark.parametrize("kind", STAND_INS)
def test_a_likelihood_is_that_of_the_tensor(kind: str, tmp_path: Path) -> None:
    pair = LinearGaussianVAE(3, 1).float()
    expected, found = (
        pv.log_likelihood(pair, x, num_particles=3, seed=0, progress=False).per_datum
        for x in (X, STAND_INS[kind](tmp_path))
    )
    assert torch.equal(expected, found)


@pytest.mark.parametrize("kind", STAND_INS)
def test_a_pair_trains_as_on_the_tensor(kind: str, tmp_path: Path) -> None:
    finals = []
    for x in (X, STAND_INS[kind](tmp_path)):
        torch.manual_seed(0)
        pair = LinearGaussianVAE(3, 1).float()
        pv.fit(pair, x, epochs=2, batch_size=4, seed=0, validation=x, progress=False)
        finals.append(torch.cat([p.detach().flatten() for p in pair.parameters()]))
    assert torch.equal(*finals)


class Coin(pv.Pair):
    """z ~ N(0, 1), a label given, x ~ Bernoulli."""

    x_shape = (2,)

    def __init__(self) -> None:
        super().__init__()
        self.shift = torch.nn.Parameter(torch.zeros(3, 2))

    def model(self, x: Tensor, label: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=z + self.shift[label]).to_event(1), obs=x)

    def guide(self, x: Tensor, label: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.mean(-1, keepdim=True), 1.0).to_event(1))


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint8, np.uint16, np.uint64])
def test_labels_stay_whole_numbers(kind: Any) -> None:
    pair, x, labels = Coin(), (X[:, :2] > 0).float(), torch.tensor([0, 1, 2, 0, 1, 2])
    pair.float()
    tensors = pv.posterior(pair, x, labels, num_particles=5, seed=0).log_weights
    arrays = pv.posterior(pair, x.numpy(), labels.numpy().astype(kind), num_particles=5, seed=0).log_weights
    assert torch.equal(tensors, arrays)


def test_a_data_set_of_two_tensors_is_x_and_its_condition() -> None:
    pair, x, labels = Coin().float(), (X[:, :2] > 0).float(), torch.tensor([0, 1, 2, 0, 1, 2])
    part, _ = random_split(TensorDataset(x, labels), [4, 2], torch.Generator().manual_seed(0))
    rows = torch.as_tensor(part.indices)
    expected = pv.log_likelihood(pair, x[rows], labels[rows], num_particles=3, seed=0, progress=False)
    assert torch.equal(
        expected.per_datum, pv.log_likelihood(pair, part, num_particles=3, seed=0, progress=False).per_datum
    )


def test_whole_numbers_beyond_int64_are_refused() -> None:
    with pytest.raises(ValueError, match="x holds whole numbers beyond int64"):
        pv.log_likelihood(LinearGaussianVAE(3, 1), np.full((6, 3), 2**64 - 1, dtype=np.uint64), num_particles=2)


def test_missing_entries_of_a_frame_are_counted_as_nan() -> None:
    frame = pandas.DataFrame({"a": [1.0, None], "b": [0.0, 1.0], "c": [0.0, 1.0]})
    with pytest.raises(ValueError, match=r"x has 1 NaN or infinite value, the first at index \(1, 0\)"):
        pv.log_likelihood(LinearGaussianVAE(3, 1), frame, num_particles=2)


def test_imputation_takes_a_mask_of_numpy() -> None:
    pair, seen = LinearGaussianVAE(3, 1).float(), X.abs() < 1
    settings: dict[str, Any] = {"num_samples": 2, "num_particles": 3, "sweeps": 1, "seed": 0}
    expected = pv.impute(pair, X, seen, **settings).samples
    assert torch.equal(expected, pv.impute(pair, X.numpy(), seen.numpy(), **settings).samples)


def test_numbers_beyond_the_pairs_dtype_are_not_called_infinite() -> None:
    with pytest.raises(ValueError, match=r"x holds numbers beyond torch\.float32, at most 3\.4e\+38: scale the data"):
        pv.log_likelihood(LinearGaussianVAE(3, 1).float(), np.full((6, 3), 1e200), num_particles=2)


@pytest.mark.parametrize("call", [pv.generate, pv.bidirectional_log_likelihood])
def test_a_condition_without_x_is_called_by_its_name(call: Any) -> None:
    with pytest.raises(ValueError, match=r"^the condition 'label' has entries of type <U1, no numbers"):
        call(Coin(), 6, np.full(6, "a"))


class Batch(NamedTuple):
    x: Any
    label: Any


def test_a_named_tuple_of_arrays_is_a_tuple() -> None:
    batch = Batch((X[:, :2] > 0).numpy().astype(float), np.zeros(6, int))
    tensors = (torch.from_numpy(batch.x), torch.from_numpy(batch.label))
    assert pv.testing.check_pair(Coin(), batch) == pv.testing.check_pair(Coin(), tensors)
