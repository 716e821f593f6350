"""Annealed importance sampling, and bounds on log p(x) from both sides, for pairs whose latents are all real."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from scipy.stats import t as student
from torch import Tensor

from pyro_vae.inspection import inspect
from pyro_vae.inspection.arrays import takes_arrays
from pyro_vae.likelihood.ais.hmc import HMC, tuned_steps
from pyro_vae.likelihood.ais.path import AnnealingPath, Start
from pyro_vae.likelihood.ais.temperatures import Schedule, sigmoidal_schedule
from pyro_vae.pair.modes import device_of, evaluation
from pyro_vae.pair.pair import Pair
from pyro_vae.pair.weights import WeightSums, weight_sums
from pyro_vae.predict.generate import generate
from pyro_vae.runtime.random_state import own_random_state
from pyro_vae.runtime.scalars import whole
from pyro_vae.runtime.threads import one_at_a_time

__all__ = [
    "AnnealedLogLikelihood",
    "BidirectionalLogLikelihood",
    "annealed_log_likelihood",
    "bidirectional_log_likelihood",
    "forward",
]

# Chains side by side at most: the states, gradients and decoded means of all of them are in memory.
CHAINS = 4096
# Two-sided 95 % of a normal distribution.
NORMAL_95 = 0.975, 1.96
# With fewer effective chains than this the spread of the weights does not tell the error.
FEWEST_EFFECTIVE = 4.0
# Estimates from the guide and from the prior disagree if they differ by this many errors.
DISAGREEMENT = 3.0


class AnnealedLogLikelihood(NamedTuple):
    """Annealed estimate of ``quantity`` per datum, in nats.

    ``per_datum`` ± 1.96 ``standard_error`` is meant to cover the quantity with a probability of 95 %, provided that
    chains reach every mode of the posterior. No error tells of a mode that no chain has reached.

    Args:
        per_datum: the estimate, in expectation at most the quantity, (B,).
        standard_error: its Monte Carlo error, (B,). By the delta method, widened by Student's quantile at the
            effective number of chains less one, and by an excess of the prior's chains. ∞ below 4 effective chains
            that are not all of them, and where ``disagrees``; NaN for one chain.
        ess: effective number of chains, (B,).
        acceptance: mean acceptance probability of the transitions, (B,).
        num_chains: C.
        num_temperatures: T.
        quantity: name of the quantity, e.g. "log p(x)".
        disagrees: whether as many chains from the prior gave a larger estimate by three errors of both, (B,); False
            with ``start="prior"``.
    """

    per_datum: Tensor
    standard_error: Tensor
    ess: Tensor
    acceptance: Tensor
    num_chains: int
    num_temperatures: int
    quantity: str
    disagrees: Tensor

    @property
    def mean(self) -> float:
        """The data's mean."""
        return float(self.per_datum.mean())

    @property
    def mean_monte_carlo_error(self) -> float:
        """Monte Carlo error of the mean; ∞ or NaN if that of a datum is."""
        return float(self.standard_error.square().sum().sqrt() / len(self.standard_error))

    def __repr__(self) -> str:
        count = len(self.per_datum)
        lines = [
            f"{self.quantity} = {self.mean:.3f} ± {self.mean_monte_carlo_error:.3f} nats by annealing (mean over "
            f"{count} data ± Monte Carlo error; {self.num_chains} chains of {self.num_temperatures} temperatures, "
            f"acceptance {float(self.acceptance.mean()):.2f}, effective chains: median {float(self.ess.median()):.1f}, "
            f"least {float(self.ess.min()):.1f})"
        ]
        if unknown := int((self.standard_error.isinf() & ~self.disagrees).sum()):
            lines.append(
                f"  too few chains carry the weight of {unknown} data to know their error: raise num_chains or "
                "num_temperatures"
            )
        if missed := int(self.disagrees.sum()):
            lines.append(f"  chains from the prior give more for {missed} data: use start='prior'")
        return "\n".join(lines)


class BidirectionalLogLikelihood(NamedTuple):
    """Bounds on log p(x) of data drawn from the model, in nats.

    E lower ≤ log p(x) ≤ E upper. For each datum, log p(x) lies in [low, high] = [lower − log(2/δ), upper + log(2/δ)]
    with probability at least 1 − δ. The raw bounds alone promise nothing about one run.

    Args:
        x: simulated data, (N, …).
        lower, upper: bounds in expectation, (N,).
        low, high: the interval, (N,).
        delta: δ.
        quantity: name of the quantity, "log p(x)" unless the model observes more.
    """

    x: Tensor
    lower: Tensor
    upper: Tensor
    low: Tensor
    high: Tensor
    delta: float
    quantity: str = "log p(x)"

    @property
    def gap(self) -> float:
        """The mean of upper − lower: the expected uncertainty about the mean log-likelihood."""
        return float((self.upper - self.lower).mean())

    def __repr__(self) -> str:
        return (
            f"{self.quantity} between {float(self.lower.mean()):.3f} and {float(self.upper.mean()):.3f} nats in "
            f"expectation (mean over {len(self.lower)} simulated data)"
        )


@one_at_a_time
@takes_arrays
def annealed_log_likelihood(
    pair: Pair,
    *batch: Tensor,
    num_temperatures: int = 1000,
    num_chains: int = 16,
    start: Start = "prior",
    schedule: Schedule = sigmoidal_schedule,
    leapfrog_steps: int = 10,
    seed: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> AnnealedLogLikelihood:
    """Estimate log p(x) per datum by annealed importance sampling.

    log w = Σ_t (β_t − β_{t−1}) [log p(x, z_t) − log p_0(z_t)],   p_0 the prior or the guide,   E w = p(x)

    Between the terms z moves by Hamiltonian Monte Carlo at β_t. A pilot run with other draws tunes the step sizes to
    accept 0.65 of the proposals. They are frozen afterwards, which keeps E w = p(x) exact.

    Chains from a guide may miss a mode that it does not cover. With ``start="guide"`` as many chains are therefore
    annealed from the prior too, at twice the cost, and ``disagrees`` says where they give more. The prior's chains may
    miss a narrow mode as well, which nothing here detects.

    Args:
        pair: any pair whose latent sites are real-valued, except those that the guide fixes to a point mass.
        batch: ``x`` (B, …) and the pair's conditions.
        num_temperatures: T.
        num_chains: C, chains per datum; their weights are averaged.
        start: p_0.
        schedule: the inverse temperatures.
        leapfrog_steps: per transition.
        seed: of the draws; fresh entropy without one. Calls with one seed share their noise: pass different seeds to
            calls whose errors you combine.
        progress: called with data done and data in all.

    Returns:
        :class:`AnnealedLogLikelihood`.

    Raises:
        ValueError: for bad data, numbers below 1, a schedule that does not rise from 0 to 1, and a latent site that is
            discrete or constrained, by name.

    Reference:
        Neal (2001), Annealed importance sampling, Statistics and Computing 11; Wu et al. (2017), ICLR.

    >>> import pyro_vae as pv
    >>> pair, x = pv.models.LinearGaussianVAE(3, 1), torch.zeros(2, 3)
    >>> annealed_log_likelihood(pair, x, num_temperatures=20, num_chains=4, leapfrog_steps=3).per_datum.shape
    torch.Size([2])
    """
    quantity = inspect(pair, batch).quantity
    num_temperatures, num_chains = whole(num_temperatures, "num_temperatures"), whole(num_chains, "num_chains")
    betas = _check(num_temperatures, num_chains, leapfrog_steps, start, schedule)
    parts = []
    with _drawing(pair, batch, seed):
        for chunk in _chunks(pair, batch, num_chains):
            log_weights, acceptance = _annealed(AnnealingPath(pair, chunk, num_chains, start), leapfrog_steps, betas)
            error = _error(weight_sums(log_weights))
            disagrees = torch.zeros_like(error, dtype=torch.bool)
            if start == "guide":
                other, _ = _annealed(AnnealingPath(pair, chunk, num_chains, "prior"), leapfrog_steps, betas)
                error, disagrees = _compared(error, weight_sums(log_weights), weight_sums(other))
            parts.append((log_weights, acceptance, error, disagrees))
            if progress is not None:
                progress(sum(part[0].shape[1] for part in parts), len(batch[0]))
    log_weights, acceptance, error, disagrees = (torch.cat(fields, -1).cpu() for fields in zip(*parts, strict=True))
    sums = weight_sums(log_weights)
    return AnnealedLogLikelihood(
        sums.log_mean, error, sums.ess, acceptance, num_chains, num_temperatures, quantity, disagrees
    )


@one_at_a_time
@takes_arrays
def bidirectional_log_likelihood(
    pair: Pair,
    num_data: int,
    *conditions: Tensor,
    num_temperatures: int = 1000,
    num_chains: int = 16,
    start: Start = "prior",
    schedule: Schedule = sigmoidal_schedule,
    leapfrog_steps: int = 10,
    delta: float = 0.05,
    seed: int | None = None,
) -> BidirectionalLogLikelihood:
    """Bound log p(x) from both sides on data simulated from the model.

    A simulated x comes with an exact posterior draw z. Annealing backwards from z gives E [1/w] = 1/p(x). Hence −log of
    the mean of 1/w is an upper bound in expectation. The log-mean of w of a forward run is a lower bound.

    Args:
        pair: any pair with real-valued latent sites, none of them a point mass in the guide.
        num_data: N, data to simulate.
        conditions: the model's conditions, N rows each.
        num_temperatures, num_chains, start, schedule, leapfrog_steps, seed: as for :func:`annealed_log_likelihood`.
        delta: δ, the probability with which a datum's interval may miss.

    Returns:
        :class:`BidirectionalLogLikelihood`.

    Raises:
        ValueError: as :func:`annealed_log_likelihood`; for δ outside (0, 1), and a point mass in the guide.

    Reference:
        Grosse, Ghahramani and Adams (2015), Sandwiching the marginal likelihood using bidirectional Monte Carlo,
        arXiv:1511.02543.

    >>> import pyro_vae as pv
    >>> pair = pv.models.LinearGaussianVAE(3, 1)
    >>> bounds = bidirectional_log_likelihood(pair, 5, num_temperatures=20, num_chains=4, leapfrog_steps=3)
    >>> bool((bounds.low < bounds.high).all())
    True
    """
    if not 0 < delta < 1:
        raise ValueError(f"delta is {delta}; the probability of a miss lies between 0 and 1")
    num_temperatures, num_chains = whole(num_temperatures, "num_temperatures"), whole(num_chains, "num_chains")
    betas = _check(num_temperatures, num_chains, leapfrog_steps, start, schedule)
    device = device_of(pair)
    with own_random_state(seed, device):
        simulation, annealing = (int(torch.randint(2**62, ())) for _ in range(2))
    simulated = generate(pair, num_data, *conditions, seed=simulation)
    batch = (simulated.x, *conditions)
    quantity = inspect(pair, batch, "the simulated x").prior_quantity
    lower, upper = [], []
    with _drawing(pair, batch, annealing):
        for rows in torch.arange(num_data).split(max(1, CHAINS // num_chains)):
            path = AnnealingPath(pair, tuple(tensor.to(device)[rows] for tensor in batch), num_chains, start)
            path.refuse_point_masses()
            sampler = HMC(path, leapfrog_steps)
            # Tuned on other draws than the posterior draw: the backward weights would depend on it twice.
            steps = tuned_steps(sampler, path.draw(), betas)
            ahead = forward(sampler, path.draw(), betas, steps)
            backward = _backward(sampler, path.posterior_draw(simulated.latents, rows), betas, steps)
            lower.append(torch.logsumexp(ahead, 0) - math.log(num_chains))
            upper.append(math.log(num_chains) - torch.logsumexp(-backward, 0))
    below, above, width = torch.cat(lower).cpu(), torch.cat(upper).cpu(), math.log(2 / delta)
    return BidirectionalLogLikelihood(simulated.x, below, above, below - width, above + width, delta, quantity)


def _annealed(path: AnnealingPath, leapfrog_steps: int, betas: Tensor) -> tuple[Tensor, Tensor]:
    """Return log-weights (C, B) of a forward run with tuned steps, and its acceptance (B,)."""
    sampler = HMC(path, leapfrog_steps)
    steps = tuned_steps(sampler, path.draw(), betas)
    return forward(sampler, path.draw(), betas, steps), sampler.acceptance


def _error(sums: WeightSums) -> Tensor:
    """Return an error of the log-mean, (B,), whose 1.96-fold covers as often as a normal one would."""
    if sums.num_weights == 1:
        return sums.standard_error
    # A few large weights estimate their own spread: Student's quantile has as many degrees as they leave.
    probability, normal = NORMAL_95
    degrees = (sums.ess - 1).clamp(min=1).cpu().numpy()
    widened = sums.standard_error * torch.from_numpy(student.ppf(probability, degrees)).to(sums.ess) / normal
    # Equal weights know their mean, however few they are.
    unknown = (sums.ess < FEWEST_EFFECTIVE) & (sums.ess < 0.99 * sums.num_weights)
    return torch.where(unknown, math.inf, widened)


def _compared(error: Tensor, guide: WeightSums, prior: WeightSums) -> tuple[Tensor, Tensor]:
    """Return the error of a run from the guide, beside one from the prior, and where the prior's gives too much.

    An excess above one error of both widens the error, since a mode may be missed. An excess of three makes it ∞.
    """
    excess = prior.log_mean - guide.log_mean
    both = torch.hypot(guide.standard_error, prior.standard_error).nan_to_num(nan=math.inf)
    # Equal weights have an error of rounding only.
    both = both + 1e-6 * guide.log_mean.abs().clamp(min=1)
    disagrees = excess > DISAGREEMENT * both
    error = torch.where(excess > both, torch.hypot(error, excess), error)
    return torch.where(disagrees, math.inf, error), disagrees


def forward(sampler: HMC, z: Tensor, betas: Tensor, steps: Tensor) -> Tensor:
    """Return log-weights (C, B) of chains from p_0 to the posterior.

    Args:
        sampler: of the path.
        z: independent draws of p_0, (C, B, L).
        betas: inverse temperatures, (T + 1,).
        steps: step sizes, (T + 1, B).
    """
    log_weights = torch.zeros(z.shape[:2], dtype=torch.float64, device=z.device)
    state = sampler.at(z)
    for t in range(1, len(betas)):
        log_weights += (betas[t] - betas[t - 1]) * (state.log_joint - state.log_start).double()
        # After the last weight a move would change nothing.
        if t < len(betas) - 1:
            state = sampler.move(state, float(betas[t]), steps[t])
    return log_weights


def _backward(sampler: HMC, z: Tensor, betas: Tensor, steps: Tensor) -> Tensor:
    """Return log-weights (C, B) along the same path in the other direction, from posterior draws."""
    log_weights = torch.zeros(z.shape[:2], dtype=torch.float64, device=z.device)
    state = sampler.at(z)
    for t in range(len(betas) - 1, 0, -1):
        log_weights += (betas[t] - betas[t - 1]) * (state.log_joint - state.log_start).double()
        if t > 1:
            state = sampler.move(state, float(betas[t - 1]), steps[t - 1])
    return log_weights


def _check(num_temperatures: int, num_chains: int, leapfrog_steps: int, start: str, schedule: Schedule) -> Tensor:
    for name, value in (
        ("num_temperatures", num_temperatures),
        ("num_chains", num_chains),
        ("leapfrog_steps", leapfrog_steps),
    ):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    if start not in ("prior", "guide"):
        raise ValueError(f"start is '{start}'; choose 'prior' or 'guide'")
    betas = schedule(num_temperatures)
    if betas.shape != (num_temperatures + 1,) or betas[0] != 0 or betas[-1] != 1 or (betas.diff() <= 0).any():
        raise ValueError("schedule must return num_temperatures + 1 numbers that rise from 0 to 1")
    return betas


def _chunks(pair: Pair, batch: tuple[Tensor, ...], num_chains: int) -> Iterator[tuple[Tensor, ...]]:
    device = device_of(pair)
    for rows in torch.arange(len(batch[0])).split(max(1, CHAINS // num_chains)):
        yield tuple(tensor[rows.to(tensor.device)].to(device) for tensor in batch)


@contextmanager
def _drawing(pair: Pair, batch: tuple[Tensor, ...], seed: int | None) -> Iterator[None]:
    device = device_of(pair)
    with evaluation(pair), torch.inference_mode(False), torch.no_grad(), own_random_state(seed, device):
        yield
