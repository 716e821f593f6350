"""Hamiltonian Monte Carlo on many chains at once."""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

__all__ = ["HMC", "State", "tuned_steps"]

# The acceptance that costs least per independent draw in many dimensions (Beskos et al., 2013, Bernoulli 19).
TARGET_ACCEPTANCE = 0.65
# A change of log step per transition of this many times the error in acceptance settles within a few dozen transitions.
GAIN = 0.5
# Every step is jittered by this much: a trajectory as long as a target's period would return to its start.
JITTER = 0.2
# The pilot run's temperatures, and its moves at the first one. They correct a first step that is off by a factor of 20.
PILOT = 100
WARM_UP = 20


class Path(Protocol):
    """The log-densities log p_0 and log p(x, ·) at chains' states, and the gradient of (1 − β) log p_0 + β log p."""

    def log_densities(self, z: Tensor) -> tuple[Tensor, Tensor]: ...

    def with_gradient(self, z: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor]: ...


class State(NamedTuple):
    """Positions (C, B, L), and both log-densities there, (C, B), in nats."""

    z: Tensor
    log_start: Tensor
    log_joint: Tensor

    def log_density(self, beta: float) -> Tensor:
        """Return (1 − β) log p_0(z) + β log p(x, z), (C, B)."""
        return (1 - beta) * self.log_start + beta * self.log_joint


class HMC:
    """Move chains so that each leaves (1 − β) log p_0 + β log p(x, ·) invariant.

    Args:
        path: the two densities.
        leapfrog_steps: per transition.

    Reference:
        Neal (2011), MCMC using Hamiltonian dynamics, Handbook of Markov chain Monte Carlo, chapter 5.
    """

    def __init__(self, path: Path, leapfrog_steps: int) -> None:
        self.path, self.leapfrog_steps = path, leapfrog_steps
        self.last_acceptance = torch.tensor(torch.nan)
        self._sum, self._moves = torch.tensor(0.0), 0

    def forget(self) -> None:
        """Restart the count of acceptance."""
        self._sum, self._moves = torch.zeros_like(self._sum), 0

    @property
    def acceptance(self) -> Tensor:
        """Mean acceptance probability per datum since the last ``forget``, (B,); NaN before a move."""
        return self._sum / self._moves if self._moves else torch.full_like(self._sum, torch.nan)

    def at(self, z: Tensor) -> State:
        """Return the state at positions (C, B, L)."""
        return State(z, *self.path.log_densities(z))

    def move(self, state: State, beta: float, step: Tensor) -> State:
        """Propose one trajectory per chain and accept or reject it.

        Args:
            state: of all chains.
            beta: inverse temperature.
            step: leapfrog step size per datum, (B,).

        Returns:
            The next state.
        """
        shape = state.log_start.shape
        jitter = 1 + JITTER * (2 * torch.rand(shape, dtype=state.z.dtype, device=state.z.device) - 1)
        size = (step * jitter).unsqueeze(-1)
        momentum = torch.randn_like(state.z)
        gradient = self.path.with_gradient(state.z, beta)[2]
        proposal, moving = state, momentum + size / 2 * gradient
        for i in range(self.leapfrog_steps):
            z = proposal.z + size * moving
            *densities, gradient = self.path.with_gradient(z, beta)
            proposal = State(z, *densities)
            moving = moving + (size if i < self.leapfrog_steps - 1 else size / 2) * gradient
        kinetic = ((momentum**2).sum(-1) - (moving**2).sum(-1)) / 2
        # A trajectory that has run off is rejected.
        log_ratio = (proposal.log_density(beta) - state.log_density(beta) + kinetic).nan_to_num(nan=-torch.inf)
        chosen = torch.rand(shape, dtype=log_ratio.dtype, device=log_ratio.device).log() < log_ratio
        self.last_acceptance = log_ratio.clamp(max=0).exp().mean(0)
        self._sum, self._moves = self._sum.to(log_ratio.device) + self.last_acceptance, self._moves + 1
        return State(
            torch.where(chosen.unsqueeze(-1), proposal.z, state.z),
            torch.where(chosen, proposal.log_start, state.log_start),
            torch.where(chosen, proposal.log_joint, state.log_joint),
        )


def tuned_steps(sampler: HMC, z: Tensor, betas: Tensor) -> Tensor:
    """Return step sizes per temperature and datum, (T + 1, B), from a pilot run that is thrown away.

    The pilot visits about a hundred temperatures. Step sizes do not depend on the draws of the run that follows.

    Args:
        sampler: of the path.
        z: draws of p_0, (C, B, L).
        betas: inverse temperatures, (T + 1,).
    """
    every = max(1, (len(betas) - 1) // PILOT)
    visited = torch.arange(0, len(betas), every)
    log_step = z.new_full((z.shape[1],), -0.25 * math.log(16 * z.shape[-1]))
    state, kept = sampler.at(z), []
    for t in [0] * WARM_UP + visited.tolist():
        state = sampler.move(state, float(betas[t]), log_step.exp())
        log_step = log_step + GAIN * (sampler.last_acceptance - TARGET_ACCEPTANCE)
        kept.append(log_step)
    sampler.forget()
    nearest = (torch.arange(len(betas)) / every).round().long().clamp(max=len(visited) - 1)
    return torch.stack(kept[WARM_UP:])[nearest.to(z.device)].exp()
