"""Log-likelihoods by importance sampling, per datum and with their Monte Carlo error, for any pair."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_vae.likelihood.captured import Capture, LogWeights, check_capture, recorded_chunks
from pyro_vae.likelihood.estimate import LogLikelihood
from pyro_vae.likelihood.saved_chunks import KeptChunks, evaluation_key
from pyro_vae.likelihood.weights import WeightStream, WeightSummary
from pyro_vae.pair.inspection import inspect
from pyro_vae.pair.modes import device_of, evaluation, to_pair
from pyro_vae.pair.pair import Pair
from pyro_vae.pair.site import Site
from pyro_vae.pair.terms import LogTerms
from pyro_vae.pair.trace import log_terms, run_model, trace_pair
from pyro_vae.runtime.memory import MEBIBYTE, chunk_sizes
from pyro_vae.runtime.progress import Progress, progress_bar
from pyro_vae.runtime.random_state import derived_seed, fresh_seed, own_random_state

__all__ = ["log_likelihood", "naive_log_likelihood"]


def log_likelihood(
    pair: Pair,
    *batch: Tensor,
    num_particles: int = 1000,
    memory: int = 512 * MEBIBYTE,
    seed: int | None = None,
    progress: Progress = True,
    run_dir: str | Path | None = None,
    capture: Capture = "auto",
) -> LogLikelihood:
    """Estimate log p(x) per datum by importance sampling from the guide.

    L_K = log (1/K) Σ_k p(x, z_k) / q(z_k | x),   z_k ~ q(z | x);   E L_K ≤ log p(x), and E L_K rises with K

    The weights are accumulated in float64 over chunks of particles and data; no more than ``memory`` is held at once.
    The pair is evaluated in evaluation mode and left as it was, as is the caller's random state. Each chunk of data
    draws from a seed of its own, so that an evaluation which is interrupted goes on, where ``run_dir`` keeps its
    finished chunks, by the same call, and gives bit for bit what an unbroken one gives; up to rounding where its chunks
    are compiled, since another process may choose another library for the products.

    Args:
        pair: any pair.
        batch: ``x`` (B, …) and the pair's conditions.
        num_particles: K.
        memory: bytes that the tensors of a chunk may take, as measured on ever larger chunks; on a CPU fewer are taken
            where larger chunks would only run slower. A seeded estimate depends on it, since every chunk has its draws.
        seed: of the draws; fresh entropy without one, so that repeated calls differ.
        progress: whether to draw a progress bar, which appears after a second; or a function, called with data done and
            data in all.
        run_dir: folder that keeps finished chunks, each for this pair, its parameters, data, K, memory and seed alone;
            it needs a seed. None keeps no file.
        capture: whether full chunks replay a compiled recording of the pair's programs, with the same draws and, up to
            rounding, the same numbers. "auto" compiles where 2000 chunks of 32 MiB or more are to come, and
            warns, once, of what it cannot record; True always compiles, and raises instead; False is Pyro's eager pass.
            Which products are faster is timed once per process: between two of them numbers may differ by rounding.

    Returns:
        :class:`LogLikelihood`.

    Raises:
        ValueError: for bad data, K < 1, a budget too small for one datum and one particle, with the least that works;
            for a datum whose weights are all zero, or one of them infinite or NaN, with its index and the site to
            blame; for ``run_dir`` without a seed, and a damaged or foreign file in it.

    Reference:
        Burda, Grosse and Salakhutdinov (2016), Importance weighted autoencoders, ICLR.

    >>> import torch, pyro_vae as pv
    >>> pair, x = pv.models.LinearGaussianVAE(5, 2), torch.zeros(3, 5)
    >>> ll = log_likelihood(pair, x, num_particles=10)
    >>> bool(torch.allclose(ll.per_datum, pair.exact_log_likelihood(x).double(), rtol=1e-4)), ll.quantity
    (True, 'log p(x)')
    """

    settings = _Settings(num_particles, memory, seed, progress, run_dir, naive=False, capture=capture)
    return _estimate(pair, batch, lambda chunk, size: _weights(log_terms(pair, *chunk, num_particles=size)), settings)


def naive_log_likelihood(
    pair: Pair,
    *batch: Tensor,
    num_particles: int = 1000,
    memory: int = 512 * MEBIBYTE,
    seed: int | None = None,
    progress: Progress = True,
    run_dir: str | Path | None = None,
) -> LogLikelihood:
    """Estimate log p(x) per datum by draws from the prior: the baseline that shows why the others exist.

    log (1/K) Σ_k p(x | z_k),   z_k ~ p(z)

    Args:
        pair, batch, num_particles, memory, seed, progress, run_dir: as for :func:`log_likelihood`.

    Returns:
        :class:`LogLikelihood`; of log p(x) whatever the guide.

    Reference:
        Document 002, equation (1).
    """

    def log_weights(chunk: tuple[Tensor, ...], size: int) -> Tensor:
        sites = run_model(pair, *chunk, num_particles=size).values()
        return torch.stack([site.log_prob for site in sites if site.is_observed]).sum(0)

    return _estimate(pair, batch, log_weights, _Settings(num_particles, memory, seed, progress, run_dir, naive=True))


class _Settings(NamedTuple):
    """What a user asks of an estimate; ``naive`` for draws from the prior."""

    num_particles: int
    memory: int
    seed: int | None
    progress: Progress
    run_dir: str | Path | None
    naive: bool
    capture: Capture = False


def _estimate(pair: Pair, batch: tuple[Tensor, ...], log_weights: LogWeights, settings: _Settings) -> LogLikelihood:
    check_capture(settings.capture)
    inspection = inspect(pair, batch)
    num_particles = settings.num_particles
    if num_particles < 1:
        raise ValueError(f"num_particles is {num_particles}; it counts draws per datum and must be at least 1")
    if settings.run_dir is not None and settings.seed is None:
        raise ValueError("run_dir keeps the chunks of one seed, so that they can be continued: pass seed=0, say")
    batch = to_pair(pair, batch)
    with evaluation(pair):
        parts = _summaries(pair, batch, log_weights, settings)
    summary = WeightSummary(*(torch.cat(fields, -1) for fields in zip(*parts, strict=True)))
    return LogLikelihood(
        per_datum=summary.log_mean,
        standard_error=summary.standard_error,
        ess=summary.ess,
        num_particles=num_particles,
        quantity=inspection.prior_quantity if settings.naive else inspection.quantity,
        discrete=inspection.is_discrete,
        # A pair whose x repeats itself, as a symmetric matrix does, says how many of its entries are free.
        num_dimensions=getattr(pair, "num_dimensions", batch[0][0].numel()),
        pareto_k=summary.pareto_k,
        smoothed=summary.smoothed,
        curve=summary.curve,
        curve_standard_error=summary.curve_standard_error,
    )


def _summaries(
    pair: Pair, batch: tuple[Tensor, ...], log_weights: LogWeights, settings: _Settings
) -> list[WeightSummary]:
    """Return what the weights of each chunk of data say, those that a run folder keeps among them."""
    num_particles, device, count = settings.num_particles, device_of(pair), len(batch[0])
    seed = fresh_seed() if settings.seed is None else settings.seed

    def weigh(chunk: tuple[Tensor, ...], sizes: list[int]) -> WeightStream:
        weights = WeightStream(len(chunk[0]), num_particles, device)
        for size in sizes:
            weights.add(log_weights(chunk, size))
        return weights

    data, particles = chunk_sizes(lambda chunk, size: weigh(chunk, [size]), batch, num_particles, settings.memory)
    sizes = [min(particles, num_particles - start) for start in range(0, num_particles, particles)]
    kept = _kept(pair, batch, log_weights, settings, (data, particles))
    recorded = partial(recorded_chunks, num_particles=num_particles, memory=settings.memory, capture=settings.capture)
    parts: list[WeightSummary] = []
    computed = 0
    try:
        with progress_bar(settings.progress, "log-likelihood", count) as update:
            for start in range(0, count, data):
                rows = range(start, min(start + data, count))
                summary = kept.read(rows) if kept is not None else None
                if summary is None:
                    if not computed:
                        # Not before a chunk is missing: recording and compiling take seconds.
                        log_weights = recorded(pair, log_weights, batch, (data, particles))
                    computed += 1
                    chunk = tuple(tensor[rows.start : rows.stop] for tensor in batch)
                    # A chunk's draws depend on nothing that came before it.
                    drawing = derived_seed(seed, "log-likelihood", start)
                    with own_random_state(drawing, device):
                        summary = weigh(chunk, sizes).summary()
                    if not summary.log_mean.isfinite().all():
                        with own_random_state(drawing, device):
                            raise ValueError(_what_is_wrong(pair, chunk, sizes, summary, start, settings.naive))
                    if kept is not None:
                        kept.write(rows, summary)
                parts.append(summary)
                update(rows.stop)
    except KeyboardInterrupt as interrupt:
        done = min(len(parts) * data, count)
        how = f"; {kept.folder} keeps them: the same call goes on from there" if kept is not None and done else ""
        interrupt.add_note(f"interrupted with {done} of {count} data evaluated{how}")
        raise
    return parts


def _kept(
    pair: Pair, batch: tuple[Tensor, ...], log_weights: LogWeights, settings: _Settings, chunk: tuple[int, int]
) -> KeptChunks | None:
    if settings.run_dir is None:
        return None
    with own_random_state(0, device_of(pair)):
        probe = log_weights(tuple(tensor[:2] for tensor in batch), 2)
    kind = "naive" if settings.naive else "importance"
    numbers = (kind, settings.num_particles, str(settings.seed), str(settings.capture), *chunk, device_of(pair).type)
    return KeptChunks(Path(settings.run_dir), evaluation_key(pair, batch, probe, numbers), settings.num_particles)


def _weights(terms: LogTerms) -> Tensor:
    """Return log-weights (K, B), NaN where the guide's density is infinite: such a draw would count as impossible."""
    return torch.where(terms.log_guide.isposinf(), math.nan, terms.log_weights)


def _what_is_wrong(
    pair: Pair, chunk: tuple[Tensor, ...], sizes: list[int], summary: WeightSummary, start: int, naive: bool
) -> str:
    """Draw a chunk's weights once more and say at which site its first bad datum's go wrong."""
    bad = (~summary.log_mean.isfinite()).nonzero().flatten().tolist()
    datum, others = bad[0], f" ({len(bad)} such data among the {len(chunk[0])} of its chunk)" if len(bad) > 1 else ""
    name, where = f"datum {start + datum}{others}", f"pv.site_terms(pair, x[{start + datum}:{start + datum + 1}])"
    impossible: set[str] | None = None
    for size in sizes:
        never = set()
        for site, log_density in _densities(pair, chunk, size, naive).items():
            values = log_density.expand(size, len(chunk[0]))[:, datum]
            if values.isnan().any():
                return f"a weight of {name} is NaN: {site} has log-density NaN; look at {where}"
            if values.isposinf().any():
                return (
                    f"a weight of {name} is infinite or has no meaning: {site} has an infinite density; keep its scale "
                    "above zero, and the data away from where its density has a pole (dequantise them)"
                )
            if values.isneginf().all():
                never.add(site)
        impossible = never if impossible is None else impossible & never
    blamed = f"{', '.join(sorted(impossible))} rules them out" if impossible else "a site rules each of them out"
    return (
        f"all {sum(sizes)} weights of {name} are zero: no draw explains it, {blamed}; train the pair further, or look "
        f"at {where}"
    )


def _densities(pair: Pair, chunk: tuple[Tensor, ...], size: int, naive: bool) -> dict[str, Tensor]:
    """Return log-densities by site, the guide's first, as an estimate draws them."""
    programs: dict[str, Mapping[str, Site]]
    if naive:
        sites = run_model(pair, *chunk, num_particles=size)
        programs = {"model": {name: site for name, site in sites.items() if site.is_observed}}
    else:
        trace = trace_pair(pair, *chunk, num_particles=size)
        programs = {"guide": trace.guide, "model": trace.model}
    return {
        f"the {program}'s site '{name}'": site.log_prob
        for program, sites in programs.items()
        for name, site in sites.items()
    }
