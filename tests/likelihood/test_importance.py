"""Log-likelihoods against exact ones: values, errors, bounds, and that evaluating changes nothing."""

from __future__ import annotations

import copy
import math
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.inspection import inspect
from pyro_vae.models import SRVAE, VAE, LinearGaussianMixtureVAE, LinearGaussianVAE, LinearTwoStageVAE
from pyro_vae.runtime.memory import CountBytes, block_size, chunk_sizes
from tests.support.off_guides import WrongScale
from tests.support.repetitions import repetitions

# The estimator itself, from the pair's own guide.
log_likelihood = partial(pv.log_likelihood, proposal="guide")

# Cholesky factors of small, well-conditioned matrices: rounding stays below 1e-11 relative.
ROUNDING = {"rtol": 1e-10, "atol": 1e-10}


def exact_pairs() -> list[Any]:
    prior = pv.MixtureOfGaussians(3, 2, weights=torch.rand(3) + 0.2)
    return [
        LinearGaussianVAE(5, 2),
        LinearGaussianMixtureVAE(5, prior),
        LinearTwoStageVAE(6, 2, copy.deepcopy(prior), 2),
    ]


def exact(pair: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        return pair.exact_log_likelihood(x)


@pytest.mark.parametrize("particles", [1, 2, 50])
@pytest.mark.parametrize("index", range(3))
def test_exact_pairs_are_evaluated_exactly(index: int, particles: int) -> None:
    pair = exact_pairs()[index]
    x = torch.randn(9, *pair.x_shape)
    ll = log_likelihood(pair, x, num_particles=particles, seed=0)
    torch.testing.assert_close(ll.per_datum, exact(pair, x), **ROUNDING)
    assert (ll.per_datum.dtype, ll.per_datum.shape, ll.num_particles) == (torch.float64, (9,), particles)
    torch.testing.assert_close(ll.ess, torch.full((9,), float(particles)), **ROUNDING)
    if particles == 1:
        assert ll.standard_error.isnan().all()
    else:
        # The root of a difference of two numbers that agree to 1e-14.
        assert (ll.standard_error < 1e-6).all()
    assert ll.mean == pytest.approx(float(exact(pair, x).mean()), rel=1e-10)
    assert ll.mean_standard_error == pytest.approx(float(ll.per_datum.std()) / 3, rel=1e-12)


@pytest.mark.parametrize("factor", [0.5, 1.5])
def test_bounds_are_ordered_and_their_gap_is_the_divergence(factor: float) -> None:
    pair, x = WrongScale(factor), torch.randn(400, 3)
    means, errors = [], []
    for particles in (1, 4, 32):
        # The data are independent given the exact value, so that the gaps' spread gives the error of their mean.
        gaps = log_likelihood(pair, x, num_particles=particles, seed=particles).per_datum - exact(pair, x)
        means.append(float(gaps.mean()))
        errors.append(float(gaps.std()) / 20)
    assert abs(means[0] + pair.gap()) <= 4 * errors[0]
    assert means[0] <= means[1] + 4 * math.hypot(errors[0], errors[1])
    assert means[1] <= means[2] + 4 * math.hypot(errors[1], errors[2])
    assert means[2] <= 4 * errors[2]
    # So much apart that the order is not one of noise.
    assert means[2] - means[0] > 4 * math.hypot(errors[0], errors[2])


def test_the_standard_error_is_the_spread_of_repeated_estimates() -> None:
    pair, repeats = WrongScale(1.4), 300
    x = repetitions(torch.randn(1, 3), repeats)
    ll = log_likelihood(pair, x, num_particles=400, seed=0)
    spread = float(ll.per_datum.std())
    claimed = float((ll.standard_error**2).mean().sqrt())
    # A standard deviation of n values has relative error 1/√(2n), 0.041; the delta method's bias is of order 1/K.
    assert abs(spread / claimed - 1) <= 4 * (2 * repeats) ** -0.5 + 1 / 400
    torch.testing.assert_close(ll.mean_monte_carlo_error, claimed / repeats**0.5, **ROUNDING)


def test_the_mean_weight_is_unbiased() -> None:
    pair, repeats = WrongScale(1.4), 2000
    x = repetitions(torch.randn(1, 3), repeats)
    for estimate in (log_likelihood, pv.naive_log_likelihood):
        ratios = torch.exp(estimate(pair, x, num_particles=10).per_datum - exact(pair, x[:1]))
        assert abs(float(ratios.mean()) - 1) <= 4 * float(ratios.std()) / repeats**0.5


def test_the_naive_estimate_ignores_the_guide() -> None:
    pair, x = WrongScale(0.01), torch.randn(5, 3)
    first = pv.naive_log_likelihood(pair, x, num_particles=20, seed=0)
    pair.factor = 3.0
    assert torch.equal(first.per_datum, pv.naive_log_likelihood(pair, x, num_particles=20, seed=0).per_datum)
    assert first.quantity == "log p(x)"


def test_one_datum_has_no_standard_error_of_the_mean() -> None:
    pair, x = LinearGaussianVAE(4, 2), torch.randn(1, 4)
    ll = log_likelihood(pair, x, num_particles=5, seed=0)
    assert math.isnan(ll.mean_standard_error)
    assert "nats (one datum)" in repr(ll)


# What was estimated


def srvae(transition: Any, **kwargs: Any) -> SRVAE:
    return SRVAE((1, 4, 4), 2, pv.StandardNormal(2), transition, levels=17, **kwargs)


@pytest.mark.parametrize(
    ("transition", "quantity"),
    [("delta", "log p(x, y)"), ("gaussian", "log p(x)"), ("discretised", "lower bound on log p(x)")],
)
def test_the_quantity_is_named_by_the_reading(transition: str, quantity: str) -> None:
    pair, x = srvae(transition), torch.rand(3, 1, 4, 4)
    ll = log_likelihood(pair, x, num_particles=2, seed=0)
    assert ll.quantity == inspect(pair, (x,)).quantity == quantity
    assert repr(ll).startswith(f"{quantity} = ")
    # The data's likelihood is a density in all three.
    with pytest.raises(ValueError, match="bits per dimension"):
        _ = ll.bits_per_dimension


def test_bits_of_a_joint_density_are_refused_with_the_reason() -> None:
    ll = log_likelihood(srvae("delta"), torch.rand(2, 1, 4, 4), num_particles=2, seed=0)
    with pytest.raises(ValueError, match=r"of p\(x\) alone; this is log p\(x, y\)"):
        _ = ll.bits_per_dimension
    ll = log_likelihood(LinearGaussianVAE(4, 2), torch.randn(2, 4), num_particles=2, seed=0)
    with pytest.raises(ValueError, match="need a probability mass"):
        _ = ll.bits_per_dimension


def test_bits_of_fair_coins_are_one_per_dimension() -> None:
    pair = VAE((6,), pv.StandardNormal(2), pv.Bernoulli(), decoder=nn.Linear(2, 6))
    for parameter in pair.p_x.parameters():
        nn.init.zeros_(parameter)
    ll = pv.naive_log_likelihood(pair, torch.randint(0, 2, (5, 6)).double(), num_particles=3, seed=0)
    assert ll.bits_per_dimension == pytest.approx(1.0, rel=1e-12)
    assert ll.num_dimensions == 6


def test_bits_of_the_discretised_reading_are_of_a_mass() -> None:
    pair = srvae("discretised", likelihood=pv.DiscretisedLogistic(17))
    x = torch.randint(0, 17, (3, 1, 4, 4)) / 16
    ll = log_likelihood(pair, x, num_particles=2, seed=0)
    assert ll.bits_per_dimension == pytest.approx(-ll.mean / (16 * math.log(2)), rel=1e-12)


# Memory


def linear_vae() -> VAE:
    encoder, decoder = nn.Linear(20, 8), nn.Linear(4, 20)
    return VAE((20,), pv.StandardNormal(4), encoder=encoder, decoder=decoder)


def least_memory(pair: pv.Pair, x: Tensor, num_particles: int) -> int:
    """Return the least budget, from the error that names it."""
    with pytest.raises(ValueError, match="raise it to") as error:
        log_likelihood(pair, x, num_particles=num_particles, memory=1)
    return int(str(error.value).split("raise it to ")[1].split()[0])


@pytest.mark.parametrize("share", [1, 3, 30])
@pytest.mark.parametrize("make", [linear_vae, lambda: LinearGaussianVAE(20, 4)])
def test_the_peak_stays_within_the_budget(make: Any, share: int) -> None:
    pair, x = make(), torch.randn(150, 20)
    memory = share * least_memory(pair, x, 60)
    with CountBytes() as counter:
        log_likelihood(pair, x, num_particles=60, memory=memory, seed=0)
    # Beside the blocks there are the data (20 numbers each), their sums and rows (fewer than 20 more).
    assert counter.peak <= memory + 40 * 8 * len(x)


def test_a_wide_encoder_does_not_hide_what_particles_take(monkeypatch: pytest.MonkeyPatch) -> None:
    # The encoder decides the peak at few particles, the decoder at many.
    monkeypatch.setattr("pyro_vae.runtime.memory.CPU_WORKING_SET", 100_000)
    encoder = nn.Sequential(nn.Linear(20, 2000), nn.Linear(2000, 8))
    pair = VAE((20,), pv.StandardNormal(4), encoder=encoder, decoder=nn.Linear(4, 20))
    x = torch.randn(5, 20)
    memory = least_memory(pair, x, 400)
    with CountBytes() as counter:
        log_likelihood(pair, x, num_particles=400, memory=memory, seed=0)
    assert counter.peak <= memory + 40 * 8 * len(x)
    # Nor does it make blocks small: the decoder's particles fill a good part of the working set.
    size, taken = block_size(lambda size: log_weights(pair, x[:1], size), 400, x.device)
    assert 50_000 < taken <= 100_000
    assert size >= 50


def log_weights(pair: pv.Pair, x: Tensor, size: int) -> Tensor:
    with torch.no_grad():
        return pv.log_terms(pair, x, num_particles=size).log_weights


def test_blocks_are_even_and_know_no_budget() -> None:
    # A particle of 3 MiB: ten fit into 32 MiB.
    made = lambda size: torch.zeros(size, 3 * 2**17)  # noqa: E731
    sizes = {k: block_size(made, k, torch.device("cpu")) for k in (1, 10, 11, 25, 100)}
    assert {k: size for k, (size, _) in sizes.items()} == {1: 1, 10: 10, 11: 6, 25: 9, 100: 10}
    assert all(taken == size * 3 * 2**20 for size, taken in sizes.values())
    # One particle may be too large for the working set.
    assert block_size(lambda size: torch.zeros(size, 5 * 2**20), 7, torch.device("cpu")) == (1, 40 * 2**20)


def test_only_what_is_made_inside_is_counted() -> None:
    weight = nn.Parameter(torch.randn(100, 100))
    with torch.no_grad(), CountBytes() as counter:
        for _ in range(3):
            made = torch.ones(10, 100) @ weight.t()
            del made
    # Two matrices of 10 × 100 are alive at once, the ones and the product; the transposed weight is a view.
    assert counter.peak == 2 * 10 * 100 * 8


def test_a_larger_budget_takes_larger_chunks() -> None:
    pair, x = linear_vae(), (torch.randn(150, 20),)

    def weights(chunk: tuple[Tensor, ...], size: int) -> Tensor:
        with torch.no_grad():
            return pv.log_terms(pair, *chunk, num_particles=size).log_weights

    sizes = [chunk_sizes(weights, x, 300, memory) for memory in (60_000, 600_000, 6_000_000)]
    work = [data * particles for data, particles in sizes]
    assert work == sorted(set(work))


def test_too_small_a_budget_is_refused() -> None:
    with pytest.raises(ValueError, match=r"one datum and 1000 particles take .*memory.*: raise it"):
        log_likelihood(LinearGaussianVAE(5, 2), torch.randn(3, 5), memory=100, seed=0)


# Work


def shapes_seen(pair: nn.Module, names: dict[str, int]) -> dict[str, list[tuple[int, ...]]]:
    """Record the batch shape of every call of these parts, whose inputs have so many event dimensions."""
    seen: dict[str, list[tuple[int, ...]]] = {name: [] for name in names}

    def record(name: str, events: int) -> Any:
        return lambda _, inputs: seen[name].append(tuple(inputs[-1].shape[: inputs[-1].dim() - events]))

    for name, events in names.items():
        pair.get_submodule(name).register_forward_pre_hook(record(name, events))
    return seen


def shapes_of_inspection(pair: pv.Pair, x: Tensor) -> list[tuple[int, ...]]:
    """Return the batch shapes of the decoder's calls in one inspection of the pair."""
    seen = shapes_seen(pair, {"p_x.network": 1})["p_x.network"]
    inspect(pair, (x,))
    return list(seen)


@pytest.mark.parametrize("transition", [None, "delta", "discretised", "gaussian"])
def test_the_encoder_runs_once_per_block(transition: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if transition is None:
        pair, names = linear_vae(), {"q_z.network": 1, "p_x.network": 1}
        x, bytes_at_once = torch.randn(40, 20), 20_000
    else:
        pair, names = srvae(transition), {"q_z.network": 3, "q_u.network": 3, "p_x.network": 1}
        x, bytes_at_once = torch.randint(0, 17, (40, 1, 4, 4)) / 16, 400_000
    monkeypatch.setattr("pyro_vae.runtime.memory.CPU_WORKING_SET", bytes_at_once)
    inspected = shapes_of_inspection(pair, x)
    seen, before, choice = shapes_seen(pair, names), {}, []

    def record(*arguments: Any) -> tuple[int, int]:
        choice.append(block_size(*arguments))
        before.update({name: len(calls) for name, calls in seen.items()})
        return choice[0]

    monkeypatch.setattr("pyro_vae.likelihood.importance.block_size", record)
    log_likelihood(pair, x, num_particles=101, seed=0, capture=False)
    ((size, _),) = choice
    sizes = [min(size, 101 - start) for start in range(0, 101, size)]
    assert 1 < len(sizes) < 101, "the working set must cut K, or nothing is shown"
    blocks = [(size, 1) for size in sizes for _ in range(40)]
    assert seen["q_z.network"][before["q_z.network"] :] == [(1,)] * len(blocks)
    assert sorted(seen["p_x.network"][before["p_x.network"] :]) == sorted(blocks)
    if transition is not None:
        # In reading "gaussian" y is drawn, and every particle has its q(u | y), all in one call.
        own = blocks if transition == "gaussian" else [(1,)] * len(blocks)
        assert sorted(seen["q_u.network"][before["q_u.network"] :]) == sorted(own)
    # Before them the pair is inspected once, and runs on one datum to measure a few rising sizes.
    facts, measured = inspected, seen["p_x.network"][len(inspected) : before["p_x.network"]]
    assert seen["p_x.network"][: len(facts)] == facts
    assert measured[0] == (1, 1)
    assert all(before[0] < after[0] <= size and after[1] == 1 for before, after in pairwise(measured))
    assert len(measured) <= 4


@pytest.mark.parametrize("saved", [False, True])
def test_one_particle_is_measured_once(saved: bool, tmp_path: Path) -> None:
    pair, x = linear_vae(), torch.randn(5, 20)
    inspected = shapes_of_inspection(pair, x)
    seen = shapes_seen(pair, {"p_x.network": 1})["p_x.network"]
    log_likelihood(pair, x, num_particles=1, seed=0, run_dir=tmp_path if saved else None)
    # One inspection, the measurement, and five blocks: a run folder's key needs no further run.
    assert seen == [*inspected, (1, 1), *[(1, 1)] * 5]


# What is left


@pytest.mark.parametrize("estimate", [log_likelihood, pv.naive_log_likelihood])
def test_nothing_is_changed(estimate: Any) -> None:
    pair = VAE((4,), pv.StandardNormal(2), pv.Gaussian(pv.BatchOptimalScale()))
    pair.q_z.eval()
    flags = {name: module.training for name, module in pair.named_modules()}
    before = {name: value.clone() for name, value in pair.state_dict().items()}
    rng, validation = torch.get_rng_state(), pyro.settings.get("validate_distributions_pyro")
    first = estimate(pair, torch.randn(5, 4, generator=torch.Generator().manual_seed(0)), num_particles=3, seed=0)
    assert torch.equal(rng, torch.get_rng_state())
    assert {name: module.training for name, module in pair.named_modules()} == flags
    assert all(torch.equal(before[name], value) for name, value in pair.state_dict().items())
    assert all(parameter.grad is None for parameter in pair.parameters())
    assert pyro.settings.get("validate_distributions_pyro") == validation
    torch.rand(3)
    again = estimate(pair, torch.randn(5, 4, generator=torch.Generator().manual_seed(0)), num_particles=3, seed=0)
    assert torch.equal(first.per_datum, again.per_datum)


def test_flags_come_back_after_an_error() -> None:
    pair = LinearGaussianVAE(5, 2)
    with pytest.raises(ValueError, match="memory"):
        log_likelihood(pair, torch.randn(3, 5), memory=100, seed=0)
    assert pair.training


def test_seeds_are_draws_of_their_own() -> None:
    pair, x = WrongScale(1.4), torch.randn(5, 3)
    first, second = (log_likelihood(pair, x, num_particles=3, seed=seed).per_datum for seed in (0, 1))
    assert not torch.equal(first, second)


def test_the_batch_optimal_scale_is_frozen() -> None:
    pair = VAE((4,), pv.StandardNormal(2), pv.Gaussian(pv.BatchOptimalScale()))
    pv.fit(pair, torch.randn(64, 4), epochs=1, batch_size=32, progress=False)
    x = torch.randn(6, 4)
    other = torch.cat([x[:1], 100 * x[1:]])
    ours, theirs = (log_likelihood(pair, data, num_particles=8, seed=0).per_datum for data in (x, other))
    # The first datum's draws are the same in both, its scale must be too.
    torch.testing.assert_close(ours[0], theirs[0], **ROUNDING)
    assert (theirs[1:] < ours[1:]).all()


# Refusals


@pytest.mark.parametrize("estimate", [log_likelihood, pv.naive_log_likelihood])
def test_bad_arguments_are_refused(estimate: Any) -> None:
    pair = LinearGaussianVAE(5, 2)
    with pytest.raises(ValueError, match="num_particles is 0"):
        estimate(pair, torch.randn(3, 5), num_particles=0)
    with pytest.raises(ValueError, match="1 NaN or infinite value"):
        estimate(pair, torch.tensor([[0.0, 0, 0, math.nan, 0]]))
    with pytest.raises(ValueError, match=r"expects \(N, 5\)"):
        estimate(pair, torch.randn(3, 4))
    with pytest.raises(ValueError, match="holds no data"):
        estimate(pair, torch.randn(0, 5))
    with pytest.raises(ValueError, match=r"use x.to\(torch.float64\)"):
        estimate(pair, torch.randn(3, 5).float())


def test_seeded_calls_repeat_and_others_differ() -> None:
    pair, x = pv.models.VAE((4,), pv.StandardNormal(2)), torch.randn(3, 4)
    seeded, again, fresh, other = (
        log_likelihood(pair, x, num_particles=5, seed=seed).per_datum for seed in (1, 1, None, None)
    )
    assert torch.equal(seeded, again)
    assert not torch.equal(fresh, other)
