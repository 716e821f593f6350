"""Things that people pass as data: taken where their meaning is clear, else one sentence with the way to do it."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.sparse
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import pyro_vae as pv
from pyro_vae.models import LinearGaussianVAE


class Frame:
    """A table as pandas makes them: an array of its numbers, and the kind of each column."""

    def __init__(self, values: Any, **kinds: str) -> None:
        self.values, self.dtypes = values, {name: SimpleNamespace(kind=kind) for name, kind in kinds.items()}

    def to_numpy(self) -> Any:
        return self.values


class Rows(Dataset[Any]):
    def __len__(self) -> int:
        return 6

    def __getitem__(self, i: int) -> Tensor:
        return torch.zeros(3)


X = torch.zeros(6, 3)
THINGS: dict[str, tuple[Callable[[], Any], str]] = {
    "array of text": (lambda: np.full((6, 3), "a"), r"entries of type <U1, no numbers"),
    "masked array": (lambda: np.ma.masked_less(np.zeros((6, 3)), 1), r"has masked entries: fill them"),
    "table of text": (
        lambda: Frame(np.array([["a", 1]] * 6, dtype=object), text="O", number="f"),
        r"type object in the columns \['text'\], no numbers",
    ),
    "sparse counts": (
        lambda: scipy.sparse.csr_matrix(np.eye(6, 3)),
        r"csr_matrix of scipy: pass a dense array, .*toarray",
    ),
    "loader": (lambda: DataLoader(TensorDataset(X), batch_size=2), r"DataLoader of torch: pass the tensors behind it"),
    "data set": (Rows, r"Rows of .*: pass its rows as tensors"),
    "list of lists": (lambda: [[0.0, 1.0, 2.0]] * 6, r"list: pass one tensor"),
    "nothing": (lambda: None, r"is None: pass a tensor"),
    "text": (lambda: "data.csv", r"str: pass a tensor"),
    "dict": (lambda: {"x": X}, r"dict: pass a tensor"),
    "number": (lambda: 3.0, r"float: pass a tensor with one row"),
    "sparse": (lambda: X.to_sparse(), r"sparse or nested tensor: pass a dense one"),
    "meta": (lambda: X.to("meta"), r"on meta: pass real numbers"),
    "complex": (lambda: X.to(torch.complex64), r"complex64 on cpu: pass real numbers"),
    "scalar": (lambda: torch.tensor(1.0), r"a single number: pass a tensor with one row"),
}
TAKERS: dict[str, Callable[[pv.Pair, Any], object]] = {
    "fit": lambda pair, x: pv.fit(pair, x, epochs=1, progress=False),
    "log_likelihood": lambda pair, x: pv.log_likelihood(pair, x, num_particles=2, progress=False),
    "posterior": lambda pair, x: pv.posterior(pair, x, num_particles=30),
    "reconstruct": lambda pair, x: pv.reconstruct(pair, x),
    "collapse_report": lambda pair, x: pv.collapse_report(pair, x),
}


@pytest.mark.parametrize("taker", TAKERS)
@pytest.mark.parametrize("thing", THINGS)
def test_other_kinds_of_data_are_refused_with_the_way_to_pass_them(thing: str, taker: str) -> None:
    make, message = THINGS[thing]
    with pytest.raises(ValueError, match=message) as refusal:
        TAKERS[taker](LinearGaussianVAE(3, 1), make())
    assert "\n" not in str(refusal.value)


def test_a_data_set_of_tensors_trains_as_its_tensors() -> None:
    x, finals = torch.randn(12, 3), []
    torch.manual_seed(0)
    state = LinearGaussianVAE(3, 1).state_dict()
    for data in (x, TensorDataset(x)):
        pair = LinearGaussianVAE(3, 1)
        pair.load_state_dict(state)
        pv.fit(pair, data, epochs=2, batch_size=4, progress=False)
        finals.append(torch.cat([p.detach().flatten() for p in pair.parameters()]))
    assert torch.equal(*finals)


class Shifted(pv.Pair):
    """z ~ N(0, 1), x ~ N(z + c, 1) given a number c for each datum."""

    x_shape = (1,)

    def __init__(self) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(()))

    def model(self, x: Tensor, c: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z + c.unsqueeze(-1) + self.loc, 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor, c: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((x - c.unsqueeze(-1)) / 2, 0.5**0.5).to_event(1))


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        (np.full(6, np.nan), r"the condition 'c' has 6 NaN or infinite values"),
        (np.full(6, "a"), r"(the condition 'c'|data) has entries of type <U1"),
        (None, r"the condition 'c' is None"),
        (torch.tensor([0.0, torch.nan, 0, 0, 0, 0]), r"the condition 'c' has 1 NaN or infinite value, .*index \(1,\)"),
        (torch.tensor(1.0), r"the condition 'c' is a single number"),
    ],
)
@pytest.mark.parametrize(
    "take",
    [
        lambda pair, x, c: pv.fit(pair, (x, c), epochs=1, progress=False),
        lambda pair, x, c: pv.log_likelihood(pair, x, c, num_particles=2, progress=False),
    ],
    ids=["fit", "log_likelihood"],
)
def test_a_condition_is_called_by_its_name(take: Any, condition: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        take(Shifted(), torch.zeros(6, 1), condition)
