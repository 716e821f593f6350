"""The captured step has the eager step's numbers for every pair."""

from __future__ import annotations

import copy
import gc
import inspect
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.objectives.bounds import elbo, iwae
from pyro_vae.training.captured_step import captured_step
from pyro_vae.training.step import NonFiniteLossError, eager_step
from tests.support.capture_cases import (
    CASES,
    assert_captured_is_eager,
    assert_same,
    batches,
    binary,
    run,
    small_vae,
)

# Every pair


def test_every_pair_of_the_package_is_covered() -> None:
    pairs = {c for c in vars(pv.models).values() if inspect.isclass(c) and issubclass(c, pv.Pair)}
    missing = pairs - {type(make()) for make in CASES.values()}
    assert not missing, f"give CASES a small {missing}, or recipes.RECIPES its options"


@pytest.mark.parametrize("name", CASES)
def test_pyros_elbo(name: str) -> None:
    pair = CASES[name]()
    assert_captured_is_eager(pair, Trace_ELBO(), batches(pair, (6, 6)), betas=(0.0, 0.3, 0.7))


@pytest.mark.parametrize("name", CASES)
def test_objectives(name: str) -> None:
    pair = CASES[name]()
    assert_captured_is_eager(pair, iwae, batches(pair, (6, 6)), num_particles=3, clip_norm=0.5)


# The guide's order of sites, or their dependence on one another, makes TraceMeanField_ELBO warn for the others.
MEAN_FIELD = [
    n for n in CASES if n == "linear" or n.startswith("vae") or (n.startswith("srvae") and "gaussian" not in n)
]


@pytest.mark.parametrize("name", MEAN_FIELD[::3])
def test_closed_divergences(name: str) -> None:
    assert_captured_is_eager(CASES[name](), TraceMeanField_ELBO(), betas=(0.5, 1.0))


@pytest.mark.parametrize(
    "loss",
    [
        Trace_ELBO(num_particles=3),
        Trace_ELBO(num_particles=3, vectorize_particles=True),
        TraceMeanField_ELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=1),
        RenyiELBO(num_particles=2),
        TraceGraph_ELBO(),
    ],
)
def test_other_elbos_and_particles(loss: Any) -> None:
    assert_captured_is_eager(CASES["vae-mixture"]() if type(loss) is Trace_ELBO else small_vae(), loss)


class Clusters(pv.Pair):
    """c ~ w, x ~ N(μ_c, 1): the guide's c is summed over."""

    x_shape = (5,)

    def __init__(self) -> None:
        super().__init__()
        self.means = nn.Parameter(torch.randn(3, 5))
        self.network = nn.Linear(5, 3)

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(logits=x.new_zeros(3)))
            pyro.sample("x", dist.Normal(self.means[c], 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("c", dist.Categorical(logits=self.network(x)), infer={"enumerate": "parallel"})


def test_enumeration() -> None:
    assert_captured_is_eager(Clusters(), TraceEnum_ELBO(max_plate_nesting=1))


def test_one_particle_is_the_elbo() -> None:
    assert_captured_is_eager(small_vae(), elbo)


# Kinds of flows differ in their transforms, which the tests above have recorded already.
TRAJECTORIES = [n for n in CASES if "likelihood" not in n and "scale" not in n and not n.startswith("flow-vae-")]


@pytest.mark.parametrize("name", TRAJECTORIES)
def test_trajectories_stay_together(name: str) -> None:
    # Every third batch is short.
    pair = CASES[name]()
    options: Any = {"data": batches(pair), "steps": 200}
    ours = run(captured_step, pair, Trace_ELBO(), **options)
    theirs = run(eager_step, pair, Trace_ELBO(), **options)
    assert_same(ours, theirs, rtol=1e-7)


def test_single_precision() -> None:
    torch.set_default_dtype(torch.float32)
    pair = small_vae()
    ours, theirs = (run(make, pair, Trace_ELBO(), batches(pair)) for make in (captured_step, eager_step))
    assert_same(ours, theirs, rtol=1e-5)


# What a network may hold


def test_dropout() -> None:
    encoder = nn.Sequential(nn.Linear(5, 6), nn.Dropout(0.5), nn.Linear(6, 4))
    assert_captured_is_eager(small_vae(encoder=encoder), Trace_ELBO())


def test_recurrent_layers() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru, self.head = nn.GRU(1, 3, batch_first=True), nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.gru(x.unsqueeze(-1))[0][:, -1])

    assert_captured_is_eager(small_vae(encoder=Recurrent()), Trace_ELBO())


def test_batch_norm() -> None:
    encoder = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 4))
    assert_captured_is_eager(small_vae(encoder=encoder), Trace_ELBO())


def test_training_flags_are_separate_recordings() -> None:
    encoder = nn.Sequential(nn.Linear(5, 6), nn.Dropout(0.5), nn.BatchNorm1d(6), nn.Linear(6, 4))
    results = []
    for make in (captured_step, eager_step):
        pair = copy.deepcopy(small_vae(encoder=encoder))
        pair.load_state_dict({name: torch.ones_like(value) / 2 for name, value in pair.state_dict().items()})
        step = make(pair, Trace_ELBO(), torch.optim.SGD(pair.parameters(), lr=1e-3))
        torch.manual_seed(0)
        losses = [step(binary(6, 5)) for training in (True, False, True, False) if pair.train(training) is pair]
        results.append(losses)
    assert results[0] == pytest.approx(results[1], rel=1e-10)


class Averaged(nn.Linear):
    """Assign a buffer anew at every call, rather than in place."""

    def __init__(self) -> None:
        super().__init__(5, 4)
        self.register_buffer("average", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        h = super().forward(x)
        self.average = 0.9 * self.average + 0.1 * h.detach().mean(0)
        return h + self.average


def test_assigned_buffers() -> None:
    assert_captured_is_eager(small_vae(encoder=Averaged()), Trace_ELBO())


class Twice(nn.Module):
    """Give two parameters one gradient tensor, a third an expanded one, a fourth none, and use a fifth twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.unused = (nn.Parameter(torch.randn(4)) for _ in range(3))
        self.shift = nn.Parameter(torch.randn(()))
        self.first = nn.Linear(5, 5)
        self.second = self.first
        self.frozen = nn.Linear(5, 4).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(self.second(self.first(x))) + (self.a + self.b) + self.shift.expand(4)


def test_gradients_have_memory_of_their_own() -> None:
    assert_captured_is_eager(small_vae(encoder=Twice()), Trace_ELBO(num_particles=2))


def test_batches_may_be_views() -> None:
    pair = small_vae()
    wide = binary(12, 10)
    assert_captured_is_eager(pair, Trace_ELBO(), [(wide[:6, :5],), (wide[:6, 5:].contiguous(),), (wide[::2, ::2],)])


class Tempered(nn.Linear):
    temperature = 1.0

    def __init__(self) -> None:
        super().__init__(5, 4)
        self.temperature = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / self.temperature


def test_numbers_that_change_are_seen() -> None:
    first = small_vae(encoder=Tempered())
    results = []
    for make in (captured_step, eager_step):
        pair = copy.deepcopy(first)
        step = make(pair, Trace_ELBO(), torch.optim.SGD(pair.parameters(), lr=1e-3))
        torch.manual_seed(0)
        losses = []
        for temperature in (1.0, 2.0, 1.0, 0.5):
            pair.q_z.network.temperature = temperature
            losses.append(step(binary(6, 5)))
        results.append(losses)
    assert results[0] == pytest.approx(results[1], rel=1e-10)


class Lazy(nn.Linear):
    """Set its bias from the first batch, as ActNorm does."""

    def __init__(self) -> None:
        super().__init__(5, 4)
        self.ready = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.ready:
            with torch.no_grad():
                self.bias.copy_(-super().forward(x).mean(0))
            self.ready = True
        return super().forward(x)


def test_a_first_batch_may_set_the_layer() -> None:
    assert_captured_is_eager(small_vae(encoder=Lazy()), Trace_ELBO())


# What a step leaves


def test_an_average_sees_the_gradient_of_the_sum() -> None:
    start, results = small_vae(), []
    for make in (captured_step, eager_step):
        pair, seen = copy.deepcopy(start), list[Any]()

        def average(total: Any, size: int, pair: pv.Pair = pair, seen: list[Any] = seen) -> tuple[Any, int]:
            seen.append((float(total), size, [None if p.grad is None else p.grad.clone() for p in pair.parameters()]))
            return total, size

        step = make(pair, Trace_ELBO(), torch.optim.SGD(pair.parameters(), lr=0.1), average=average)
        torch.manual_seed(0)
        loss = step(binary(6, 5), beta=0.5)
        assert loss == pytest.approx(seen[0][0] / 6, rel=1e-12)
        results.append(seen[0])
    (ours, size, gradients), (theirs, _, expected) = results
    assert (ours, size) == (theirs, 6)
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True) if a is not None and b is not None)
    assert [g is None for g in gradients] == [g is None for g in expected]


def test_a_gradient_that_is_not_finite_moves_nothing() -> None:
    class Root(nn.Linear):
        # The square root of zero is finite, its slope is not.
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + (0 * self.weight.sum()).sqrt()

    pair = small_vae(encoder=Root(5, 4))
    step = captured_step(pair, Trace_ELBO(), torch.optim.SGD(pair.parameters(), lr=0.1))
    before = copy.deepcopy(pair.state_dict())
    with pytest.raises(NonFiniteLossError, match=r"the loss is \d+\.\d+, the norm of its gradient nan"):
        step(binary(6, 5))
    assert all(torch.equal(before[name], value) for name, value in pair.state_dict().items())


def test_later_steps_hold_no_more_tensors() -> None:
    pair, x = small_vae(), binary(6, 5)
    step = captured_step(pair, Trace_ELBO(), torch.optim.Adam(pair.parameters()))

    def held(steps: int) -> int:
        for i in range(steps):
            step(x, beta=1 / (i + 1))
        gc.collect()
        return sum(type(thing) in (Tensor, nn.Parameter) for thing in gc.get_objects())

    # The first steps record with and without β and make the optimiser's state.
    held(3)
    assert held(1) == held(100)
    assert all(p.grad is None for p in pair.parameters())
