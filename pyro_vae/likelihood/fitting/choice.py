"""Which proposal a datum's draws come from, and how many of them."""

from __future__ import annotations

import abc
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_vae.inspection import Inspection
from pyro_vae.likelihood.ais.proposal import AnnealedProposal
from pyro_vae.likelihood.captured import Calls
from pyro_vae.likelihood.fitting.density import Density, Draws
from pyro_vae.likelihood.fitting.mixture import Mixture, MixtureProposal
from pyro_vae.likelihood.fitting.modes import Mode, find_modes, refined
from pyro_vae.likelihood.proposals import PILOT, GuideProposal, Proposal
from pyro_vae.likelihood.psis import pareto_tail, tail_size, trust_threshold
from pyro_vae.likelihood.weights import SOURCES
from pyro_vae.pair.weights import Rounding, weight_sums
from pyro_vae.runtime.memory import counted_bytes

__all__ = ["CALLS_OF_A_FIT", "Auto", "Choice", "Chosen", "Plain"]

# A pilot's k̂ up to which a proposal is taken, below the threshold of trust: the estimate has other draws.
ENOUGH = 0.5
# The k̂ of a hundred draws from which the guide is given up.
HOPELESS = 0.8
# The k̂ of a pilot from which a proposal is no start for chains either.
LOST = 1.5
# A guide whose few draws say so many nats more than a pilot finds what that misses.
CLEAR = 1.0
# The prior's draws are few and far from most posteriors. They show a mode that no start led to, by a large weight.
PRIOR = 0.05
# Several modes are rarely all: then the prior has a larger share.
SEVERAL, PRIOR_OF_SEVERAL = 4, 0.4
# The guide's share beside components.
GUIDE = 0.1
# Gradients up to this, in units of a width, are those of a Gaussian posterior, up to rounding.
GAUSSIAN = 1e-2
# Widths and degrees of freedom of the components. All reach beyond the modes: a posterior's tails are longer than a
# pilot shows. In L dimensions a Gaussian's radius spreads by a share 1/√(2L): widths are in these units above 1.
FIRST, OTHERS = (1.0, math.inf), ((1.5, math.inf), (1.0, 7.0), (2.0, 5.0))
# Up to so many latents Student's t is tried first: there it costs few draws, and has the tails of most posteriors.
FEW, FIRST_OF_FEW = 10, (0.5, 7.0)
# Draws at least where a tolerance asks for few: below, k̂ means little. A pilot's spread is a rough one: twice the draws
# that it asks for are taken.
FEWEST, SAFETY = 100, 2.0
# Calls of programs that a fit makes, roughly.
CALLS_OF_A_FIT = 40
# Chains of an annealed estimate at most.
CHAINS = 100


class _Pilot(NamedTuple):
    """k̂ of a pilot's weights, ∞ where they have none, their variance over their squared mean, and their log-mean."""

    shape: float
    variance: float
    log_mean: float


class Chosen(NamedTuple):
    """The proposal of one datum.

    Args:
        proposal: to draw from.
        parts: tensors that its log-weights need after the datum and its conditions.
        source: number of its kind in :data:`SOURCES`.
        num_particles: draws.
        least_shape: k̂ that the datum has at least: that of a pilot which knew of modes that this proposal lacks.
    """

    proposal: Proposal
    parts: tuple[Tensor, ...]
    source: int
    num_particles: int
    least_shape: float = -math.inf


class Choice(abc.ABC):
    """Choose the proposal and the number of draws for each datum.

    A pilot's draws decide. They are thrown away, so that E L_K ≤ log p(x) stays true of the estimate's own.

    Args:
        inspection: of the pair.
        calls: runs the pair's programs.
        num_particles: most draws of a datum.
        tolerance: error in nats that the draws of a datum should reach; None for as many draws as may be.
    """

    name: str
    """Name for the keys of saved chunks."""

    def __init__(self, inspection: Inspection, calls: Calls, num_particles: int, tolerance: float | None) -> None:
        self.inspection, self.calls = inspection, calls
        self.num_particles, self.tolerance = num_particles, tolerance
        x = inspection.batch[0]
        self.rounding = Rounding(torch.finfo(x.dtype if x.is_floating_point() else torch.float32).eps)

    @property
    @abc.abstractmethod
    def main(self) -> Proposal:
        """The proposal whose quantity the estimate has."""

    @abc.abstractmethod
    def __call__(self, datum: tuple[Tensor, ...]) -> Chosen:
        """Return the proposal of a datum.

        Args:
            datum: one datum and its conditions, on the pair's device.
        """

    def nbytes(self, datum: tuple[Tensor, ...]) -> int:
        """Return the bytes that choosing a datum's proposal takes; 0 without a fit."""
        return 0

    def pilot(self, proposal: Proposal, batch: tuple[Tensor, ...]) -> _Pilot:
        """Return what a few draws of a proposal tell."""
        return self.told(*self.calls(proposal.pilot, *batch))

    def told(self, log_weights: Tensor) -> _Pilot:
        """Return what log-weights (K,) tell of their proposal."""
        count = len(log_weights)
        largest = log_weights.nan_to_num(nan=math.inf).topk(tail_size(count) + 1).values.cpu()
        shape, _ = pareto_tail(largest, count, self.rounding)
        sums = weight_sums(log_weights.unsqueeze(-1))
        ess = float(sums.ess)
        variance = count / ess - 1 if ess > 0 else math.inf
        return _Pilot(math.inf if math.isnan(shape) else shape, variance, float(sums.log_mean))

    def draws(self, pilot: _Pilot) -> int:
        """Return the number of draws by which a proposal should reach the tolerance: K halved some times."""
        if self.tolerance is None or pilot.shape > trust_threshold(PILOT):
            return self.num_particles
        count, needed = self.num_particles, max(FEWEST, SAFETY * pilot.variance / self.tolerance**2)
        while count // 2 >= needed:
            count //= 2
        return count


class Plain(Choice):
    """One proposal for all data.

    Args:
        name: of the kind of proposal, one of :data:`SOURCES`.
        main: the proposal.
        inspection, calls, limits: as for :class:`Choice`.
    """

    def __init__(self, name: str, main: Proposal, inspection: Inspection, calls: Calls, *limits: Any) -> None:
        super().__init__(inspection, calls, *limits)
        self._main, self.name = main, name

    @property
    def main(self) -> Proposal:
        return self._main

    def __call__(self, datum: tuple[Tensor, ...]) -> Chosen:
        count = self.num_particles if self.tolerance is None else self.draws(self.pilot(self.main, datum))
        return Chosen(self.main, (), SOURCES.index(self.name), count)


class Auto(Choice):
    """The guide where it settles a datum, else Gaussians fitted at its posterior's modes, else annealing from those.

    Modes are looked for from draws of the guide and of the prior. A guide that settles a datum of one mode is kept. The
    pilots choose the widths of the Gaussians, Student's t in their place, and the shares of guide and prior.

    Args:
        inspection: of the pair, whose latents are continuous: see :func:`~pyro_vae.likelihood.fitting.flat.unfit`.
        calls, limits: as for :class:`Choice`.
    """

    name = "auto"

    def __init__(self, inspection: Inspection, calls: Calls, *limits: Any) -> None:
        super().__init__(inspection, calls, *limits)
        self.density = Density(inspection, calls)
        self.mixture = MixtureProposal(inspection, self.density)
        self.guide = GuideProposal(inspection)
        self.annealed = AnnealedProposal(inspection, self.density)

    @property
    def main(self) -> Proposal:
        return self.mixture

    def __call__(self, datum: tuple[Tensor, ...]) -> Chosen:
        # Gradients need ordinary tensors, also where the caller evaluates in inference mode.
        with torch.inference_mode(False), torch.no_grad():
            datum = tuple(tensor.clone() for tensor in datum)
            draws = self.density.draws(datum)
            search = find_modes(self.density, datum, draws)
            chosen = self._chosen(datum, draws, search.modes)
            # Weights do not tell of modes that no draw comes near.
            return chosen if search.is_whole else chosen._replace(least_shape=math.inf)

    def _chosen(self, datum: tuple[Tensor, ...], draws: Draws, modes: list[Mode]) -> Chosen:
        """Return the proposal of a datum with these modes."""
        alone, guide = self._guide(datum, draws)
        kept = alone._replace(num_particles=self.draws(guide))
        if not modes:
            return kept
        # A guide misses a mode of whose density its own draws know nothing.
        is_one = len(modes) == 1 and not modes[0].log_evidence > guide.log_mean + CLEAR
        if is_one and guide.shape <= ENOUGH:
            return kept
        best, pilot = self._fitted(datum, modes)
        # Its weights do not tell of a mode that it does not know.
        is_one = len(modes) == 1 and not pilot.log_mean > guide.log_mean + CLEAR
        if is_one and guide.shape <= pilot.shape:
            return kept
        if pilot.shape > trust_threshold(PILOT):
            if pilot.shape > LOST or not pilot.log_mean > guide.log_mean - CLEAR:
                # The components miss what the guide finds; chains from them would, too. The guide misses what they
                # find in turn.
                return kept if is_one else kept._replace(least_shape=pilot.shape)
            return Chosen(self.annealed, best, SOURCES.index("annealed"), min(self.num_particles, CHAINS))
        return Chosen(self.mixture, best, SOURCES.index("fitted"), self.draws(pilot))

    def nbytes(self, datum: tuple[Tensor, ...]) -> int:
        with torch.inference_mode(False), torch.no_grad():
            datum = tuple(tensor.clone() for tensor in datum)
            points = self.density.like.repeat(CHAINS, 1)
            runs = (lambda: self(datum), lambda: self.density.with_prior(datum, points))
            return max(counted_bytes(run, datum[0].device) for run in runs)

    def _guide(self, datum: tuple[Tensor, ...], draws: Draws) -> tuple[Chosen, _Pilot]:
        """Return the guide as a proposal, with a share of the prior unless its weights are equal, and its pilot."""
        source = SOURCES.index("guide")
        if not self.density.is_guide_scored:
            return Chosen(self.guide, (), source, 0), self.pilot(self.guide, datum)
        mixture = Mixture.of([], self.density.like, guide=1.0)
        pilot = self.told(draws.log_weights)
        # A few draws may tell that many would not do.
        if pilot.shape <= HOPELESS:
            pilot = self.pilot(self.mixture, (*datum, *mixture))
        if -math.inf < pilot.shape <= ENOUGH:
            mixture = Mixture.of([], self.density.like, guide=1.0 - PRIOR, prior=PRIOR)
            pilot = self.pilot(self.mixture, (*datum, *mixture))
        return Chosen(self.mixture, mixture, source, 0), pilot

    def _fitted(self, datum: tuple[Tensor, ...], modes: list[Mode]) -> tuple[Mixture, _Pilot]:
        """Return the mixture with components at modes that does best."""
        if all(mode.left < GAUSSIAN for mode in modes):
            exactly = Mixture.of(modes, self.density.like)
            pilot = self.pilot(self.mixture, (*datum, *exactly))
            if pilot.shape == -math.inf and self._is_whole(datum, modes, exactly):
                return exactly, pilot
        first = FIRST_OF_FEW if len(self.density.like) <= FEW else FIRST
        found = [self._widened(datum, modes, *first)]
        if found[0][1].shape > ENOUGH:
            # More draws tell more; a shape that only just passes is taken then: the least of many is so by luck.
            if found[0][1].shape <= LOST:
                modes = refined(self.density, datum, modes)
            for candidate in OTHERS:
                found.append(self._widened(datum, modes, *candidate))
                if found[-1][1].shape <= trust_threshold(PILOT):
                    break
        return min(found, key=lambda each: each[1].shape)

    def _widened(
        self, datum: tuple[Tensor, ...], modes: list[Mode], reach: float, degrees: float
    ) -> tuple[Mixture, _Pilot]:
        """Return a mixture with components of some width and tails at modes, and its pilot."""
        like = self.density.like
        width = 1 + reach / math.sqrt(2 * len(like))
        prior = PRIOR if len(modes) < SEVERAL else PRIOR_OF_SEVERAL
        guide = GUIDE if self.density.is_guide_scored else 0.0
        mixture = Mixture.of(modes, like, width=width, degrees=degrees, guide=guide, prior=prior)
        return mixture, self.pilot(self.mixture, (*datum, *mixture))

    def _is_whole(self, datum: tuple[Tensor, ...], modes: list[Mode], exactly: Mixture) -> bool:
        """Whether the prior's draws show no mode beside those of a proposal with equal weights."""
        half = Mixture.of(modes, self.density.like, prior=0.5)
        log_p, log_weights = (self.calls(self.mixture.pilot, *datum, *mixture)[0] for mixture in (exactly, half))
        # Half of the draws are of the posterior, if that is all of it: no weight is above 2 p(x).
        return bool((log_weights <= log_p[0] + math.log(2) + 1e-3).all())
