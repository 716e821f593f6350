"""Log-likelihoods by importance sampling, per datum and with their Monte Carlo error, for any pair."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from pyro import poutine
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pyro_vae.checks import check_batch, check_support
from pyro_vae.pair import (
    Pair,
    check_measures,
    device_of,
    evaluation,
    log_terms,
    particle_dim,
    particle_plate,
    point_masses,
    sample_sites,
    site_log_prob,
    to_pair,
    trace_pair,
)
from pyro_vae.psis import trust_threshold
from pyro_vae.randomness import own_random_state
from pyro_vae.weights import WeightStream, WeightSummary

__all__ = ["LogLikelihood", "log_likelihood", "naive_log_likelihood", "quantity_of"]

MEBIBYTE = 2**20
# Data per chunk at most, and the bytes that a chunk on a CPU takes where more are allowed: larger ones run slower, by a
# factor of two at 512 MiB, since every tensor is then fetched from fresh pages of memory.
CHUNK = 128
CPU_WORKING_SET = 64 * MEBIBYTE


class LogLikelihood(NamedTuple):
    """An estimated log-likelihood, per datum, in nats.

    ``per_datum`` (B,) is L_K = log (1/K) Σ_k w_k, in expectation at most the ``quantity`` it estimates;
    ``standard_error`` (B,) its Monte Carlo error by the delta method, NaN for K = 1; ``ess`` (B,) the effective sample
    size (Σ w)² / Σ w². ``quantity`` says what was estimated: "log p(x)", "lower bound on log p(x)" where the guide
    fixes a discrete site to a point mass, or a joint density such as "log p(x, y)" where it fixes a continuous one.

    ``pareto_k`` (B,) is the shape k̂ of the weights' tail: the error is not to be trusted above ``threshold``. It is −∞
    for weights that are equal up to rounding, and NaN for K < 25. ``smoothed`` (B,) is L_K with the tail
    Pareto-smoothed. ``curve`` (J, B) holds L_1, L_2, L_4, … up to the largest power of two within K, each the mean over
    disjoint blocks of the same draws, so that its later entries rest on fewer blocks.
    """

    per_datum: Tensor
    standard_error: Tensor
    ess: Tensor
    num_particles: int
    quantity: str
    discrete: bool
    num_dimensions: int
    pareto_k: Tensor
    smoothed: Tensor
    curve: Tensor

    @property
    def mean(self) -> float:
        """The data's mean log-likelihood."""
        return float(self.per_datum.mean())

    @property
    def mean_standard_error(self) -> float:
        """The mean's standard error as an estimate for the population that the data are a sample of; NaN for one."""
        if len(self.per_datum) < 2:
            return math.nan
        return float(self.per_datum.std() / math.sqrt(len(self.per_datum)))

    @property
    def mean_monte_carlo_error(self) -> float:
        """The part of the mean's error that more particles would remove."""
        return float((self.standard_error**2).sum().sqrt() / len(self.per_datum))

    @property
    def threshold(self) -> float:
        """The k̂ above which a datum's estimate is not to be trusted, min(1 − 1/log10 K, 0.7); NaN for K < 25."""
        return trust_threshold(self.num_particles)

    @property
    def share_above_threshold(self) -> float:
        """The share of data whose k̂ is above the threshold; NaN for K < 25."""
        if math.isnan(self.threshold):
            return math.nan
        return float((self.pareto_k > self.threshold).double().mean())

    @property
    def worst(self) -> Tensor:
        """The data by index, (B,), from the largest k̂ to the smallest."""
        return self.pareto_k.argsort(descending=True, stable=True)

    @property
    def has_bits(self) -> bool:
        """Whether bits per dimension mean something: a mass on discrete data, of x alone."""
        return self.discrete and self.quantity.endswith("log p(x)")

    @property
    def bits_per_dimension(self) -> float:
        """−log p(x) / (D log 2), for a probability mass on discrete data; see ``has_bits``.

        Raises:
            ValueError: for a density, whose value depends on the data's unit, and for a joint density.
        """
        if not self.quantity.endswith("log p(x)"):
            raise ValueError(f"bits per dimension are of p(x) alone; this is {self.quantity}")
        if not self.discrete:
            raise ValueError(
                "bits per dimension need a probability mass: use a discretised likelihood on the data's own levels"
            )
        return -self.mean / (self.num_dimensions * math.log(2))

    def __repr__(self) -> str:
        return (
            f"{self.quantity} = {self.mean:.3f} ± {self.mean_standard_error:.3f} nats "
            f"(mean over {len(self.per_datum)} data ± standard error; Monte Carlo part ± "
            f"{self.mean_monte_carlo_error:.3f}, K = {self.num_particles})"
        )


def log_likelihood(
    pair: Pair,
    *batch: Tensor,
    num_particles: int = 1000,
    memory: int = 512 * MEBIBYTE,
    seed: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> LogLikelihood:
    """Estimate log p(x) per datum by importance sampling from the guide.

    L_K = log (1/K) Σ_k p(x, z_k) / q(z_k | x),   z_k ~ q(z | x);   E L_K ≤ log p(x), and E L_K rises with K

    The weights are accumulated in float64 over chunks of particles and data; no more than ``memory`` is held at once.
    The pair is evaluated in evaluation mode and left as it was, as is the caller's random state.

    Args:
        pair: any pair.
        batch: ``x`` (B, …) and the pair's conditions.
        num_particles: K.
        memory: bytes that the tensors of a chunk may take, as measured on ever larger chunks; on a CPU fewer are taken
            where larger chunks would only run slower. A seeded estimate depends on it, since chunks draw in turn.
        seed: of the draws; fresh entropy without one, so that repeated calls differ.
        progress: called with data done and data in all.

    Returns:
        :class:`LogLikelihood`.

    Raises:
        ValueError: for bad data, K < 1, and a budget too small for one datum and one particle.

    Reference:
        Burda, Grosse and Salakhutdinov (2016), Importance weighted autoencoders, ICLR.

    >>> import torch, pyro_vae as pv
    >>> pair, x = pv.models.LinearGaussianVAE(5, 2), torch.zeros(3, 5)
    >>> ll = log_likelihood(pair, x, num_particles=10)
    >>> bool(torch.allclose(ll.per_datum, pair.exact_log_likelihood(x).double(), rtol=1e-4)), ll.quantity
    (True, 'log p(x)')
    """

    def log_weights(chunk: tuple[Tensor, ...], size: int) -> Tensor:
        return log_terms(pair, *chunk, num_particles=size).log_weights

    return _estimate(pair, batch, log_weights, num_particles, memory, seed, progress, naive=False)


def naive_log_likelihood(
    pair: Pair,
    *batch: Tensor,
    num_particles: int = 1000,
    memory: int = 512 * MEBIBYTE,
    seed: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> LogLikelihood:
    """Estimate log p(x) per datum by draws from the prior: the baseline that shows why the others exist.

    log (1/K) Σ_k p(x | z_k),   z_k ~ p(z)

    Args:
        pair, batch, num_particles, memory, seed, progress: as for :func:`log_likelihood`.

    Returns:
        :class:`LogLikelihood`; of log p(x) whatever the guide.

    Reference:
        Document 002, equation (1).
    """
    dim = particle_dim(pair)

    def log_weights(chunk: tuple[Tensor, ...], size: int) -> Tensor:
        with particle_plate(pair, size):
            model = poutine.trace(type(pair).model).get_trace(pair, *chunk)
        observed = [site_log_prob(s, dim) for s in sample_sites(model).values() if s["is_observed"]]
        return torch.stack(observed).sum(0)

    return _estimate(pair, batch, log_weights, num_particles, memory, seed, progress, naive=True)


def quantity_of(pair: Pair, *batch: Tensor) -> str:
    """Say what the pair's log-weights estimate, from its sites.

    Args:
        pair: any pair.
        batch: a few data and their conditions.

    Returns:
        "log p(x)"; "lower bound on log p(x)" where the guide puts a point mass on a discrete site; the joint density,
        "log p(x, y)", where it puts one on a continuous site ``y``.
    """
    return _describe(pair, batch)[0]


def _describe(pair: Pair, batch: tuple[Tensor, ...], *, naive: bool = False) -> tuple[str, bool]:
    """Return the quantity and whether every observed site is discrete."""
    batch = to_pair(pair, tuple(tensor[:1] for tensor in batch))
    with evaluation(pair), own_random_state(0, device_of(pair)):
        guide, model = trace_pair(pair, *batch)
        check_measures(guide, model)
    sites = sample_sites(model)
    discrete = all(site["fn"].support.is_discrete for site in sites.values() if site["is_observed"])
    observed = [name for name, site in sites.items() if site["is_observed"]]
    # Draws from the prior fix no site, whatever the guide does.
    fixed = set() if naive else point_masses(guide)
    joint = [name for name in sites if name in fixed and not sites[name]["fn"].support.is_discrete]
    target = f"log p({', '.join([*observed, *joint])})"
    return (f"lower bound on {target}" if fixed and not joint else target), discrete


def _estimate(
    pair: Pair,
    batch: tuple[Tensor, ...],
    log_weights: Callable[[tuple[Tensor, ...], int], Tensor],
    num_particles: int,
    memory: int,
    seed: int | None,
    progress: Callable[[int, int], None] | None,
    *,
    naive: bool,
) -> LogLikelihood:
    check_batch(pair, batch)
    check_support(pair, batch, "x")
    if num_particles < 1:
        raise ValueError(f"num_particles is {num_particles}; it counts draws per datum and must be at least 1")
    device, batch = device_of(pair), to_pair(pair, batch)
    quantity, discrete = _describe(pair, batch, naive=naive)
    count, parts = len(batch[0]), []

    def stream(chunk: tuple[Tensor, ...], sizes: list[int]) -> WeightStream:
        weights = WeightStream(len(chunk[0]), num_particles, device)
        for size in sizes:
            weights.add(log_weights(chunk, size))
        return weights

    with evaluation(pair), own_random_state(seed, device):
        data, particles = chunk_sizes(lambda chunk, size: stream(chunk, [size]), batch, num_particles, memory)
        for rows in torch.arange(count, device=device).split(data):
            chunk = tuple(tensor[rows] for tensor in batch)
            parts.append(stream(chunk, _split_into(num_particles, particles)).summary())
            if progress is not None:
                progress(int(rows[-1]) + 1, count)
    summary = WeightSummary(*(torch.cat(fields, -1) for fields in zip(*parts, strict=True)))
    first = summary.log_mean
    if (bad := ~torch.isfinite(first)).any():
        i = int(bad.nonzero()[0])
        raise ValueError(
            f"all {num_particles} weights of datum {i} are {'NaN' if first[i].isnan() else 'zero or infinite'} "
            f"({int(bad.sum())} data in all): no draw of the guide explains it; train the pair further, or look at "
            f"pv.site_terms(pair, x[{i}:{i + 1}])"
        )
    return LogLikelihood(
        per_datum=summary.log_mean,
        standard_error=summary.standard_error,
        ess=summary.ess,
        num_particles=num_particles,
        quantity=quantity,
        discrete=discrete,
        num_dimensions=batch[0][0].numel(),
        pareto_k=summary.pareto_k,
        smoothed=summary.smoothed,
        curve=summary.curve,
    )


def _split_into(total: int, size: int) -> list[int]:
    return [min(size, total - start) for start in range(0, total, size)]


def chunk_sizes(
    log_weights: Callable[[tuple[Tensor, ...], int], Any], batch: tuple[Tensor, ...], num_particles: int, memory: int
) -> tuple[int, int]:
    """Return how many data and particles a chunk may hold so that its tensors stay within ``memory`` bytes.

    The peak is measured, never guessed from a smaller chunk's growth: an encoder may set it at few particles and the
    decoder at many. A chunk of n times the size takes at most n times the bytes, so that no measurement overshoots.

    Raises:
        ValueError: when one datum and one particle already take more.
    """

    def peak(data: int, particles: int) -> int:
        chunk = tuple(tensor[:data] for tensor in batch)
        return max(1, _peak_memory(partial(log_weights, chunk, particles), chunk[0].device))

    least = peak(1, 1)
    if least > memory:
        raise ValueError(
            f"one datum and one particle take {least / MEBIBYTE:.3f} MiB, more than memory, "
            f"{memory / MEBIBYTE:.3f} MiB: raise it"
        )
    target = memory if batch[0].device.type == "cuda" else max(least, min(memory, CPU_WORKING_SET))
    data = max(1, min(CHUNK, len(batch[0]), target // least))
    particles, measured = 1, peak(data, 1)
    while particles < num_particles:
        # A tenth is left for what an allocation is rounded up to.
        larger = min(num_particles, int(0.9 * target * particles / measured))
        if larger <= particles:
            break
        grown = larger >= 1.5 * particles
        particles, measured = larger, peak(data, larger) if grown else measured
        if not grown:
            break
    return data, particles


def _peak_memory(run: Callable[[], Any], device: torch.device) -> int:
    with own_random_state(0, device):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            run()
            return torch.cuda.max_memory_allocated(device) - before
        with _CountBytes() as counter:
            run()
        return counter.peak


class _CountBytes(TorchDispatchMode):
    """Follow how many bytes of tensors made inside are alive, and the most there were: torch counts none on a CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                # What comes in unseen was made outside, a parameter say; a view of it takes nothing.
                self._count(tensor.untyped_storage(), outside=True)
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage, *, outside: bool = False) -> None:
        key = storage._cdata
        if key in self.seen:
            return
        self.seen.add(key)
        size = 0 if outside else storage.nbytes()
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.alive -= size
