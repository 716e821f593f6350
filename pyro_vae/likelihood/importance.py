"""Log-likelihoods by importance sampling, per datum and with their Monte Carlo error, for any pair."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from pyro_vae.capture.program import Capture, check_capture
from pyro_vae.inspection import Inspection
from pyro_vae.inspection.arrays import takes_arrays
from pyro_vae.likelihood.blocks import Blocks, data_hashes, single
from pyro_vae.likelihood.captured import Calls, LogWeights, captured_blocks
from pyro_vae.likelihood.estimate import LogLikelihood
from pyro_vae.likelihood.fitting.choice import CALLS_OF_A_FIT, Auto, Choice, Chosen, Plain
from pyro_vae.likelihood.fitting.flat import unfit
from pyro_vae.likelihood.posterior import guided
from pyro_vae.likelihood.proposals import GuideProposal, PriorProposal
from pyro_vae.likelihood.psis import tail_size
from pyro_vae.likelihood.saved_chunks import SavedChunks, evaluation_key
from pyro_vae.likelihood.weights import WeightStream, WeightSummary
from pyro_vae.pair.modes import chunks, device_of, evaluation, to_pair
from pyro_vae.pair.pair import Pair
from pyro_vae.pair.trace import run_model, site_of_x
from pyro_vae.runtime.memory import CHUNK, MEBIBYTE, block_size, counted_bytes, working_set
from pyro_vae.runtime.progress import Progress, progress_bar
from pyro_vae.runtime.random_state import derived_seed, fresh_seed, own_random_state, seed_generators
from pyro_vae.runtime.scalars import whole
from pyro_vae.runtime.threads import one_at_a_time

__all__ = ["ProposalName", "log_likelihood", "naive_log_likelihood"]

ProposalName: TypeAlias = Literal["auto", "guide", "prior"]


@one_at_a_time
@takes_arrays
def log_likelihood(
    pair: Pair,
    *batch: Tensor,
    num_particles: int = 1000,
    memory: int = 512 * MEBIBYTE,
    seed: int | None = None,
    progress: Progress = True,
    run_dir: str | Path | None = None,
    capture: Capture = "auto",
    proposal: ProposalName | Callable[..., Any] = "auto",
    tolerance: float | None = None,
) -> LogLikelihood:
    """Estimate log p(x) per datum by importance sampling from a proposal that settles it.

    L_K = log (1/K) Σ_k p(x, z_k) / r(z_k | x),   z_k ~ r(z | x);   E L_K ≤ log p(x), and E L_K rises with K

    A pilot run looks whether the guide settles a datum. If not, the proposal r has Gaussians fitted at the modes of its
    posterior, see :class:`~pyro_vae.likelihood.fitting.mixture.MixtureProposal`. If their pilot fails too, chains are
    annealed from them to the posterior. The pilots' draws are thrown away. A mode of which neither the guide's nor the
    prior's draws have a trace is missed, and no k̂ shows it. ``proposal="guide"`` draws from the guide alone: the
    literature's protocol, by which published figures are compared.

    The pair runs in evaluation mode; the pair and the caller's random state are left as they were. Log-densities are
    summed over entries, sites and particles in float64.

    With a seed, a datum's estimate depends on the pair, the datum, its conditions, K and the seed only. It is bitwise
    the same for every ``memory``, number of processes and order of the data, and beside any other data. Compiled
    recordings give it up to rounding, and so does another number of threads or type of device. Equal data get equal
    draws, so the errors of exact duplicates are fully correlated; for independent repetitions use other seeds.

    Each datum is computed alone, in blocks of particles. The pair therefore sees batches of one.

    Args:
        pair: any pair.
        batch: ``x`` (B, …) and the pair's conditions.
        num_particles: K.
        memory: most bytes that tensors take at once; the need of one block is measured. It never changes the estimate.
            A block takes at most 32 MiB on a CPU and 256 MiB on a CUDA device, unless one particle takes more.
        seed: of the draws; fresh entropy by default.
        progress: whether to draw a progress bar, which appears after a second; or a function, called with the data done
            and the data in all.
        run_dir: folder to save finished chunks of 128 data in; it needs a seed. Call again with the same arguments to
            resume an interrupted evaluation. The result is bitwise equal to an uninterrupted one, unless it is compiled
            and the two processes time matmuls differently.
        capture: "auto" replays a recording of the pair's programs from 1000 blocks on, with the same bits. It compiles
            the recording for long estimates, of about 64 GiB of tensors in all. It warns of a program that it cannot
            record. True always compiles, or raises; False always uses Pyro's eager pass.
        proposal: "auto"; "guide"; "prior"; or another guide of your own, a Pyro program that is called as the pair's
            guide is and samples the same latents. A fit takes tens of milliseconds to seconds a datum, the longer the
            more latents. It needs at most 300 continuous latents, none of them masked, and K ≥ 25; else "auto" is
            "guide", and the result says why.
        tolerance: error per datum in nats. A pilot then tells how many draws a datum needs, K at most. A budget shared
            among data would let an estimate depend on the others.

    Returns:
        :class:`LogLikelihood`.

    Raises:
        ValueError: for bad data; for K < 1; for a tolerance that is not positive; for a proposal that does not sample
            the model's latents; for a budget below one block, with the least that works; for a datum whose weights are
            all zero, or one of them infinite or NaN, with its index and the site to blame; for ``run_dir``
            without a seed, and for a damaged or foreign file in it.

    Reference:
        Burda, Grosse and Salakhutdinov (2016), Importance weighted autoencoders, ICLR.

    >>> import torch, pyro_vae as pv
    >>> pair, x = pv.models.LinearGaussianVAE(5, 2), torch.zeros(3, 5)
    >>> ll = log_likelihood(pair, x, num_particles=10)
    >>> bool(torch.allclose(ll.per_datum, pair.exact_log_likelihood(x).double(), rtol=1e-4)), ll.quantity
    (True, 'log p(x)')
    """
    settings = _Settings(num_particles, memory, seed, progress, run_dir, capture, tolerance)
    return _estimate(pair, batch, proposal, settings)


@one_at_a_time
@takes_arrays
def naive_log_likelihood(
    pair: Pair,
    *batch: Tensor,
    num_particles: int = 1000,
    memory: int = 512 * MEBIBYTE,
    seed: int | None = None,
    progress: Progress = True,
    run_dir: str | Path | None = None,
) -> LogLikelihood:
    """Estimate log p(x) per datum by draws from the prior, the baseline for every other estimate.

    log (1/K) Σ_k p(x | z_k),   z_k ~ p(z)

    Args:
        pair, batch, num_particles, memory, seed, progress, run_dir: as for :func:`log_likelihood`.

    Returns:
        :class:`LogLikelihood`; of log p(x) whatever the guide.

    Reference:
        Document 002, equation (1).
    """
    return _estimate(pair, batch, "prior", _Settings(num_particles, memory, seed, progress, run_dir, False, None))


@dataclass(frozen=True)
class _Settings:
    """Arguments of an estimate."""

    num_particles: int
    memory: int
    seed: int | None
    progress: Progress
    run_dir: str | Path | None
    capture: Capture
    tolerance: float | None

    def __post_init__(self) -> None:
        for name in ("num_particles", "memory", "seed"):
            # None is no seed.
            if name != "seed" or self.seed is not None:
                object.__setattr__(self, name, whole(getattr(self, name), name))

    def check(self) -> None:
        check_capture(self.capture)
        if self.num_particles < 1:
            raise ValueError(f"num_particles is {self.num_particles}; it counts draws per datum and must be at least 1")
        if self.tolerance is not None and not self.tolerance > 0:
            raise ValueError(f"tolerance is {self.tolerance}; it is an error in nats per datum and must be positive")
        if self.run_dir is not None and self.seed is None:
            raise ValueError("run_dir keeps the chunks of one seed, so that they can be continued: pass seed=0, say")


def _estimate(
    pair: Pair, batch: tuple[Tensor, ...], proposal: ProposalName | Callable[..., Any], settings: _Settings
) -> LogLikelihood:
    inspection = guided(pair, batch, proposal if callable(proposal) else "guide")
    settings.check()
    pair, batch = inspection.pair, to_pair(inspection.pair, batch)
    with evaluation(pair), own_random_state(0, device_of(pair)):
        calls = Calls(pair, settings.capture, CALLS_OF_A_FIT * len(batch[0]))
        choice = _choice(proposal, inspection, calls, settings)
        num_scored = _num_scored(inspection, batch)
        saved = _saved(choice, inspection, batch, settings)
        parts = _summaries(_Estimator(choice, batch, settings), settings, saved)
    summary = WeightSummary(*(torch.cat(fields, -1) for fields in zip(*parts, strict=True)))
    return LogLikelihood(
        per_datum=summary.log_mean,
        standard_error=summary.standard_error,
        ess=summary.ess,
        num_particles=settings.num_particles,
        quantity=choice.main.quantity(inspection),
        discrete=inspection.is_discrete,
        # A pair whose x repeats itself, e.g. a symmetric matrix, knows how many of its entries are free.
        num_dimensions=getattr(pair, "num_dimensions", batch[0][0].numel()),
        pareto_k=summary.pareto_k,
        smoothed=summary.smoothed,
        curve=summary.curve,
        curve_standard_error=summary.curve_standard_error,
        num_scored=num_scored,
        beside=choice.main.beside(inspection),
        draws=summary.draws.long(),
        source=summary.source.long(),
        tolerance=settings.tolerance,
        unfit=_unfit(inspection, settings) if proposal == "auto" else "",
    )


def _choice(
    proposal: ProposalName | Callable[..., Any], inspection: Inspection, calls: Calls, settings: _Settings
) -> Choice:
    limits = (inspection, calls, settings.num_particles, settings.tolerance)
    if callable(proposal):
        return Plain("own", GuideProposal(inspection), *limits)
    if proposal == "prior":
        return Plain("prior", PriorProposal(inspection), *limits)
    if proposal == "auto":
        if not _unfit(inspection, settings):
            return Auto(*limits)
    elif proposal != "guide":
        raise ValueError(f"proposal is {proposal!r}; it must be 'auto', 'guide', 'prior' or a program like the guide")
    return Plain("guide", GuideProposal(inspection), *limits)


def _unfit(inspection: Inspection, settings: _Settings) -> str:
    """Return why no proposal is fitted; empty if one is."""
    if tail_size(settings.num_particles) == 0:
        return f"{settings.num_particles} draws tell no k̂, and settle no datum"
    return unfit(inspection.trace)


def _num_scored(inspection: Inspection, batch: tuple[Tensor, ...]) -> Tensor | None:
    """Return the number of entries of each datum that the likelihood's mask leaves scored, None without a mask."""
    if inspection.x.scored is None:
        return None
    counts = []
    for chunk in chunks(batch, CHUNK):
        site = site_of_x(run_model(inspection.pair, *chunk, num_particles=1), chunk[0])
        scored = site.scored_value
        assert scored is not None
        counts.append(scored[0].reshape(len(chunk[0]), -1).double().mean(1).cpu())
    return torch.cat(counts) * getattr(inspection.pair, "num_dimensions", batch[0][0].numel())


def _saved(
    choice: Choice, inspection: Inspection, batch: tuple[Tensor, ...], settings: _Settings
) -> SavedChunks | None:
    if settings.run_dir is None:
        return None
    numbers = (settings.num_particles, str(settings.seed), str(settings.capture), CHUNK, batch[0].device.type)
    key = evaluation_key(inspection, batch, (choice.name, str(settings.tolerance), *numbers))
    return SavedChunks(Path(settings.run_dir), key, settings.num_particles)


def _summaries(estimator: _Estimator, settings: _Settings, saved: SavedChunks | None) -> list[WeightSummary]:
    """Return the statistics of each chunk of data, computed or saved."""
    count, parts = len(estimator.batch[0]), list[WeightSummary]()
    try:
        with progress_bar(settings.progress, "log-likelihood", count) as update:
            for start in range(0, count, CHUNK):
                rows = range(start, min(start + CHUNK, count))
                summary = saved.read(rows) if saved is not None else None
                if summary is None:
                    summary = estimator.summary(rows)
                    if saved is not None:
                        saved.write(rows, summary)
                parts.append(summary)
                update(rows.stop)
    except KeyboardInterrupt as interrupt:
        done = min(len(parts) * CHUNK, count)
        resume = f"; {saved.folder} keeps them: the same call goes on from there" if saved is not None and done else ""
        interrupt.add_note(f"interrupted with {done} of {count} data evaluated{resume}")
        raise
    return parts


class _Estimator:
    """Log-weights of data from the proposals that are chosen for them, in blocks, and their statistics.

    Raises:
        ValueError: for a budget below one block.
    """

    def __init__(self, choice: Choice, batch: tuple[Tensor, ...], settings: _Settings) -> None:
        self.choice, self.batch, self.settings = choice, batch, settings
        self.device, self.pair = batch[0].device, choice.inspection.pair
        self.seed = fresh_seed() if settings.seed is None else settings.seed
        first = self._chosen(0, *self._hashes(range(1)))
        if (taken := choice.nbytes(single(batch, 0))) > settings.memory:
            raise ValueError(
                f"a proposal fitted to one datum takes {taken} bytes, more than memory, {settings.memory}: raise it to "
                f"at least {-(-taken // MEBIBYTE)} MiB, or use proposal='guide'"
            )
        self._sources: dict[str, tuple[Blocks, LogWeights]] = {}
        self.rounding = choice.main.rounding(choice.inspection)
        self.blocks, _ = self._source(first, single(batch, 0))
        self.side_by_side = self._side_by_side(settings.memory)

    def _hashes(self, rows: range) -> list[str]:
        return data_hashes(tuple(tensor[rows.start : rows.stop] for tensor in self.batch))

    def _chosen(self, row: int, datum_hash: str) -> Chosen:
        """Return the proposal of a datum."""
        seed_generators(derived_seed(self.seed, "fit", datum_hash), self.device)
        return self.choice(single(self.batch, row))

    def _source(self, chosen: Chosen, datum: tuple[Tensor, ...]) -> tuple[Blocks, LogWeights]:
        """Return the blocks of K draws of a proposal, and what gives their log-weights."""
        proposal, most = chosen.proposal, self.settings.num_particles
        if proposal.name not in self._sources:
            log_weights: LogWeights = proposal.log_weights
            if proposal.records:
                batch = (*datum, *chosen.parts)
                blocks = Blocks(
                    self.seed, most, *block_size(lambda size: proposal.log_weights(batch, size), most, self.device)
                )
                # All data, also where a part is saved: a resumed estimate then makes the same choice.
                count = len(self.batch[0])
                log_weights = captured_blocks(self.pair, log_weights, blocks, count, self.settings.capture)
            else:
                blocks = Blocks(self.seed, most, most, 0)
            self._sources[proposal.name] = blocks, log_weights
        blocks, log_weights = self._sources[proposal.name]
        count = chosen.num_particles
        return replace(blocks, num_particles=count, size=min(blocks.size, count)), log_weights

    def _side_by_side(self, memory: int) -> int:
        """Return the number of data whose weights are accumulated together; their bits do not depend on it."""
        size = self.blocks.size

        def accumulate() -> WeightSummary:
            stream = WeightStream(1, self.blocks.num_particles, self.device)
            stream.add(torch.zeros(size, 1, dtype=torch.float64, device=self.device))
            return stream.summary()

        taken = counted_bytes(accumulate, self.device)
        least = self.blocks.nbytes + taken
        if least > memory:
            particles = "one particle" if size == 1 else f"{size} particles"
            raise ValueError(
                f"one datum and {particles} take {least} bytes, more than memory, {memory}: raise it to {least} at "
                f"least ({-(-least // MEBIBYTE)} MiB)"
            )
        return max(1, min(CHUNK, min(memory - self.blocks.nbytes, working_set(self.device)) // taken))

    def summary(self, rows: range) -> WeightSummary:
        """Return the statistics of these data's weights.

        Raises:
            ValueError: for a datum without an estimate, with the site to blame.
        """
        hashes = self._hashes(rows)
        chosen = [self._chosen(row, datum_hash) for row, datum_hash in zip(rows, hashes, strict=True)]
        columns: dict[int, WeightSummary] = {}
        kinds = sorted({(each.proposal.name, each.num_particles) for each in chosen})
        for kind in kinds:
            alike = [i for i, each in enumerate(chosen) if (each.proposal.name, each.num_particles) == kind]
            for start in range(0, len(alike), self.side_by_side):
                part = alike[start : start + self.side_by_side]
                of_part = [rows[i] for i in part], [hashes[i] for i in part], [chosen[i] for i in part]
                summary = self._weigh(*of_part)
                columns.update((i, summary.column(j)) for j, i in enumerate(part))
        ordered = [columns[i] for i in range(len(chosen))]
        summary = WeightSummary(*(torch.cat(fields, -1) for fields in zip(*ordered, strict=True)))
        bad = (~summary.log_mean.isfinite()).nonzero().flatten().tolist()
        if bad:
            others = f" ({len(bad)} such data among the {len(rows)} of its chunk)" if len(bad) > 1 else ""
            raise ValueError(self._reason(rows[bad[0]], others))
        return summary

    def _weigh(self, rows: list[int], hashes: list[str], chosen: list[Chosen]) -> WeightSummary:
        """Return the statistics of data that have as many draws of one proposal."""
        data = [single(self.batch, row) for row in rows]
        blocks, log_weights = self._source(chosen[0], data[0])
        stream = WeightStream(len(rows), blocks.num_particles, self.device, self.rounding)
        for drawn in zip(*map(blocks.seeds, hashes), strict=True):
            weights = []
            for datum, each, (size, seed) in zip(data, chosen, drawn, strict=True):
                seed_generators(seed, self.device)
                weights.append(log_weights((*datum, *each.parts), size).expand(size, 1))
            stream.add(torch.cat(weights, 1))
        sources, least = torch.tensor([(each.source, each.least_shape) for each in chosen], dtype=torch.float64).mT
        return stream.summary(sources, least).up_to(self.settings.num_particles)

    def _reason(self, row: int, others: str) -> str:
        """Draw a bad datum's weights again and say at which site they go wrong."""
        name, look = f"datum {row}{others}", f"pv.site_terms(pair, x[{row}:{row + 1}])"
        never: list[set[str]] = []
        for densities in self._densities(row):
            for site, values in densities.items():
                if values.isnan().any():
                    return f"a weight of {name} is NaN: {site} has log-density NaN; look at {look}"
                if values.isposinf().any():
                    return (
                        f"a weight of {name} is infinite or has no meaning: {site} has an infinite density; keep its "
                        "scale above zero, and the data away from where its density has a pole (dequantise them)"
                    )
            never.append({site for site, values in densities.items() if values.isneginf().all()})
        impossible = set.intersection(*never)
        count = self._chosen(row, *self._hashes(range(row, row + 1))).num_particles
        blamed = f"{', '.join(sorted(impossible))} rules them out" if impossible else "a site rules each of them out"
        return (
            f"all {count} weights of {name} are zero: no draw explains it, {blamed}; train "
            f"the pair further, or look at {look}"
        )

    def _densities(self, row: int) -> Iterator[dict[str, Tensor]]:
        """Yield the log-densities of a datum's sites, block by block."""
        (datum_hash,) = self._hashes(range(row, row + 1))
        datum, chosen = single(self.batch, row), self._chosen(row, datum_hash)
        blocks, _ = self._source(chosen, datum)
        for size, seed in blocks.seeds(datum_hash):
            seed_generators(seed, self.device)
            yield chosen.proposal.site_log_densities((*datum, *chosen.parts), size)
