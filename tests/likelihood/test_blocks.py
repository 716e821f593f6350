"""A seeded estimate is the same bits for every budget, order and company of the data, and number of processes."""

from __future__ import annotations

from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.likelihood.blocks import Blocks, data_hashes, single
from pyro_vae.likelihood.shared import shared_log_likelihood
from pyro_vae.likelihood.weights import WeightStream
from pyro_vae.models import VAE
from pyro_vae.networks.mlp import MLP
from pyro_vae.runtime.distributed import Processes

# The estimator itself, from the pair's own guide.
log_likelihood = partial(pv.log_likelihood, proposal="guide")

FIELDS = ("per_datum", "standard_error", "ess", "pareto_k", "smoothed", "curve", "curve_standard_error")
# Not a multiple of a block's size, and more than 25, so that there are tails.
PARTICLES = 61


def image_vae(dtype: torch.dtype) -> VAE:
    shape = (5, 5)
    networks: dict[str, Any] = {"encoder": MLP([shape], 6, (33,)), "decoder": MLP([(3,)], 25, (33,))}
    return VAE(shape, pv.StandardNormal(3), pv.Bernoulli(), **networks).to(dtype)


class Conditional(pv.Pair):
    """z ~ N(0, I), x ~ N(f(z, c), 1), z | x, c from a network."""

    x_shape = (7,)

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(9, 6), nn.Linear(5, 7)

    def model(self, x: Tensor, c: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
            whole = torch.cat([z, c.expand(*z.shape[:-1], 2)], -1)
            pyro.sample("x", dist.Normal(self.decoder(whole), 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor, c: Tensor) -> None:
        with pyro.plate("data", len(x)):
            loc, raw = self.encoder(torch.cat([x, c], -1)).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, raw.exp()).to_event(1))


CASES: dict[str, Any] = {
    "float64": lambda: (image_vae(torch.float64), (torch.rand(40, 5, 5).gt(0.5).double(),)),
    "float32": lambda: (image_vae(torch.float32), (torch.rand(40, 5, 5).gt(0.5).float(),)),
    "conditions": lambda: (Conditional(), (torch.randn(40, 7), torch.randn(40, 2))),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[pv.Pair, tuple[Tensor, ...]]:
    return CASES[request.param]()


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut the data into three chunks, and the particles of a datum into blocks, the last of them smaller.

    Of 40 data the full blocks are recorded, the last ones are eager, and so are all blocks of fewer data.
    """
    monkeypatch.setattr("pyro_vae.likelihood.importance.CHUNK", 16)
    monkeypatch.setattr("pyro_vae.likelihood.captured.BLOCKS_BEFORE_RECORDING", 100)
    monkeypatch.setattr("pyro_vae.runtime.memory.CPU_WORKING_SET", 30_000)


def assert_same(first: pv.LogLikelihood, second: pv.LogLikelihood, rows: Any = slice(None)) -> None:
    """Compare an estimate's rows, bit for bit, with another one."""
    for name in FIELDS:
        assert torch.equal(getattr(first, name)[..., rows], getattr(second, name)), name


ESTIMATES: dict[str, Any] = {
    "guide": partial(log_likelihood, num_particles=PARTICLES, seed=3),
    "guide, eager": partial(log_likelihood, num_particles=PARTICLES, seed=3, capture=False),
    "prior": partial(pv.naive_log_likelihood, num_particles=PARTICLES, seed=3),
}


@pytest.fixture(params=ESTIMATES)
def estimate(request: pytest.FixtureRequest) -> Any:
    return ESTIMATES[request.param]


def test_memory_is_no_part_of_the_mathematics(case: Any, estimate: Any) -> None:
    pair, batch = case
    with pytest.raises(ValueError, match=r"one datum and \d+ particles take .*: raise it to \d+ at least") as error:
        estimate(pair, *batch, memory=1)
    least = int(str(error.value).split("raise it to ")[1].split()[0])
    whole = estimate(pair, *batch)
    for memory in (least, least + 5_000, 10 * least, 2**40):
        assert_same(whole, estimate(pair, *batch, memory=memory))


def test_the_order_of_the_data_is_none_either(case: Any, estimate: Any) -> None:
    pair, batch = case
    whole, order = estimate(pair, *batch), torch.randperm(40)
    assert_same(whole, estimate(pair, *(tensor[order] for tensor in batch)), order)


@pytest.mark.parametrize("rows", [slice(0, 1), slice(12, 20), slice(39, 40)])
def test_data_alone_are_as_in_company(case: Any, estimate: Any, rows: slice) -> None:
    # 12 to 20 straddles the first chunk's end.
    pair, batch = case
    assert_same(estimate(pair, *batch), estimate(pair, *(tensor[rows] for tensor in batch)), rows)


def test_other_data_beside_them_change_nothing() -> None:
    pair, x = image_vae(torch.float64), torch.rand(40, 5, 5).gt(0.5).double()
    other = x.clone()
    other[:30] = 1 - other[:30]
    first, second = (log_likelihood(pair, data, num_particles=PARTICLES, seed=3).per_datum for data in (x, other))
    assert torch.equal(first[30:], second[30:])
    assert (first[:30] != second[:30]).all()


def test_equal_data_have_equal_draws() -> None:
    pair, x = image_vae(torch.float64), torch.rand(1, 5, 5).gt(0.5).double()
    # An expanded tensor, one row of memory for all data.
    ll = log_likelihood(pair, x.expand(40, 5, 5), num_particles=PARTICLES, seed=3)
    assert (ll.per_datum == ll.per_datum[0]).all()
    assert_same(ll, log_likelihood(pair, x, num_particles=PARTICLES, seed=3), slice(0, 1))
    # Conditions belong to the datum.
    pair, x, c = Conditional(), torch.randn(1, 7).expand(2, 7), torch.tensor([[1.0, 2.0], [1.0, 2.0 + 1e-15]])
    first, second = log_likelihood(pair, x, c, num_particles=PARTICLES, seed=3).per_datum
    assert first != second


@pytest.mark.parametrize("size", [2, 3])
def test_shares_of_processes_are_the_whole(case: Any, estimate: Any, size: int) -> None:
    pair, batch = case
    whole = estimate(pair, *batch)
    parts: list[dict[str, Tensor]] = []

    class Noted(Processes):
        """One of several processes, which notes its part instead of sending it."""

        def gather(self, value: Any) -> Any:
            parts.append(value)
            return [value]

    for rank in range(size):
        shared_log_likelihood(Noted(rank, size), partial(estimate, pair), *batch, seed=3)
    for name in FIELDS:
        assert torch.equal(torch.cat([part[name] for part in parts], -1), getattr(whole, name)), name


@pytest.mark.parametrize("particles", [1, 2, 3, 64, 100])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_stream_of_many_data_is_the_stream_of_each(particles: int, dtype: torch.dtype) -> None:
    # Odd numbers of columns, so that vector instructions leave a rest.
    for count in (1, 5, 37):
        log_weights = (20 * torch.randn(particles, count)).to(dtype)

        def summary(columns: Tensor) -> Any:
            stream = WeightStream(columns.shape[1], particles, columns.device)
            for block in columns.split(29):
                stream.add(block)
            return stream.summary()

        whole = summary(log_weights)
        for i in range(count):
            for all_of_them, one in zip(whole, summary(log_weights[:, i : i + 1].clone()), strict=True):
                assert torch.equal(all_of_them[..., i : i + 1].nan_to_num(), one.nan_to_num())


def test_a_hash_is_of_the_bytes_the_type_and_the_shape() -> None:
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    first, second = data_hashes((x,))
    assert first != second
    assert data_hashes((x.flip(0),)) == [second, first]
    others = [(x.float(),), (x.view(2, 2, 1),), (x, x), (x[:, :1], x[:, 1:]), (x.view(torch.int64),)]
    assert len({data_hashes(batch)[0] for batch in others} | {first}) == 6
    assert len(data_hashes((torch.tensor([True, False]),))) == 2


def test_blocks_have_seeds_of_their_own() -> None:
    blocks = Blocks(seed=1, num_particles=10, size=4, nbytes=0)
    assert [size for size, _ in blocks.seeds("a")] == [4, 4, 2]
    seeds = [seed for datum in ("a", "b") for _, seed in blocks.seeds(datum)]
    assert len(set(seeds)) == 6
    assert [*blocks.seeds("a")] != [*Blocks(2, 10, 4, 0).seeds("a")]


def test_a_single_datum_is_a_copy() -> None:
    x = torch.arange(6.0).view(3, 2)
    (row,) = single((x,), 1)
    assert torch.equal(row, x[1:2])
    assert row.data_ptr() % 64 == 0
