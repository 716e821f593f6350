"""Annealed importance sampling, and bounds on log p(x) from both sides, for pairs whose latents are all real."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_vae.likelihood.ais.hmc import HMC, tuned_steps
from pyro_vae.likelihood.ais.path import AnnealingPath, Start
from pyro_vae.likelihood.ais.temperatures import Schedule, sigmoidal_schedule
from pyro_vae.pair.inspection import inspect
from pyro_vae.pair.modes import device_of, evaluation
from pyro_vae.pair.pair import Pair
from pyro_vae.pair.weights import weight_sums
from pyro_vae.predict.generate import generate
from pyro_vae.runtime.random_state import own_random_state

__all__ = [
    "AnnealedLogLikelihood",
    "BidirectionalLogLikelihood",
    "annealed_log_likelihood",
    "bidirectional_log_likelihood",
]

# Chains side by side at most: the states, gradients and decoded means of all of them are in memory.
CHAINS = 4096


class AnnealedLogLikelihood(NamedTuple):
    """Annealed estimate of ``quantity`` per datum, in nats.

    Args:
        per_datum: the estimate, in expectation at most the quantity, (B,).
        standard_error: its Monte Carlo error by the delta method, (B,); NaN for one chain.
        ess: effective number of chains, (B,).
        acceptance: mean acceptance probability of the transitions, (B,).
        num_chains: C.
        num_temperatures: T.
        quantity: name of the quantity, e.g. "log p(x)".
    """

    per_datum: Tensor
    standard_error: Tensor
    ess: Tensor
    acceptance: Tensor
    num_chains: int
    num_temperatures: int
    quantity: str

    @property
    def mean(self) -> float:
        """The data's mean."""
        return float(self.per_datum.mean())

    def __repr__(self) -> str:
        return (
            f"{self.quantity} = {self.mean:.3f} nats by annealing (mean over {len(self.per_datum)} data; "
            f"{self.num_chains} chains of {self.num_temperatures} temperatures, acceptance "
            f"{float(self.acceptance.mean()):.2f})"
        )


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

    Args:
        pair: any pair whose latent sites are real-valued, except those that the guide fixes to a point mass.
        batch: ``x`` (B, …) and the pair's conditions.
        num_temperatures: T.
        num_chains: C, chains per datum; their weights are averaged.
        start: p_0.
        schedule: the inverse temperatures.
        leapfrog_steps: per transition.
        seed: of the draws; fresh entropy without one.
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
    betas = _check(num_temperatures, num_chains, leapfrog_steps, start, schedule)
    parts = []
    with _drawing(pair, batch, seed):
        for chunk in _chunks(pair, batch, num_chains):
            path = AnnealingPath(pair, chunk, num_chains, start)
            sampler = HMC(path, leapfrog_steps)
            steps = tuned_steps(sampler, path.draw(), betas)
            parts.append((_forward(sampler, path.draw(), betas, steps), sampler.acceptance))
            if progress is not None:
                progress(sum(part[0].shape[1] for part in parts), len(batch[0]))
    sums = weight_sums(torch.cat([part[0] for part in parts], 1).cpu())
    return AnnealedLogLikelihood(
        sums.log_mean,
        sums.standard_error,
        sums.ess,
        torch.cat([part[1] for part in parts]).cpu(),
        num_chains,
        num_temperatures,
        quantity,
    )


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
            forward = _forward(sampler, path.draw(), betas, steps)
            backward = _backward(sampler, path.posterior_draw(simulated.latents, rows), betas, steps)
            lower.append(torch.logsumexp(forward, 0) - math.log(num_chains))
            upper.append(math.log(num_chains) - torch.logsumexp(-backward, 0))
    below, above, width = torch.cat(lower).cpu(), torch.cat(upper).cpu(), math.log(2 / delta)
    return BidirectionalLogLikelihood(simulated.x, below, above, below - width, above + width, delta, quantity)


def _forward(sampler: HMC, z: Tensor, betas: Tensor, steps: Tensor) -> Tensor:
    """Return log-weights (C, B) of chains from p_0 to the posterior."""
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
