"""Modes of a datum's posterior, and their curvature."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_vae.likelihood.fitting.density import Density, Draws

__all__ = ["MODES", "Mode", "Search", "find_modes", "refined"]

# Modes at most.
MODES = 8
# Starts of the search: the mean of the guide's draws, some of them, some of the prior's, and of the prior's chosen by
# their weights p(x | z), which lie near modes in few dimensions.
GUIDES, PRIORS, CHOSEN = 1, 2, 6
# Where there are several modes, more starts of the prior's look for others, so many at once until they find none. Up to
# so many latents they do in any case: modes hide there too, and points are cheap.
AGAIN, FEW_LATENTS = 32, 10
# Quasi-Newton steps at most, and the nats that a step must promise: Newton steps and averages follow.
CLIMBS, PROMISE = 60, 0.2
# Newton steps at the end, and the shares of a step that are tried at once; a step that gains less needs no more.
POLISHES, SHARES, SMALL = 4, (1.0, 0.5, 0.2, 0.05, 0.01), 0.3
# Rounds of averages over a Gaussian's draws, and their number. A round that loses so many nats is the last.
ROUNDS, AVERAGED, LOSS = 4, 96, 2.0
# Times as many draws where a pilot calls for them.
MORE = 4
# One round changes no precision by more than these factors.
LEAST, MOST = 0.3, 4.0
# Averages are taken over few modes, those of the most evidence: each of so many nats less than the best at most.
FEW, WORTH = 3, 3.0
# Modes nearer than this in units of their width are one: two equal Gaussians have two modes from a distance of 2 on. A
# mode of so little evidence, in nats, adds nothing.
APART, LITTLE = 2.0, 20.0
# The curvature is never taken to be below this share of its largest.
FLOOR = 1e-8


class Mode(NamedTuple):
    """A Gaussian at a mode of log p(x, z(u)) |∂z/∂u|.

    Args:
        point: its mean, (L,), float64.
        axes: eigenvectors of its precision Λ, (L, L), float64.
        lengths: its eigenvalues, positive, (L,), float64.
        log_evidence: rough logarithm of the mass that it stands for, in nats.
        left: size of the gradient that it leaves, in units of its width; 0 for a Gaussian posterior, and if unknown.
    """

    point: Tensor
    axes: Tensor
    lengths: Tensor
    log_evidence: Tensor
    left: float = 0.0

    @property
    def factor(self) -> Tensor:
        """F with F Fᵀ = Λ⁻¹, (L, L)."""
        return self.axes / self.lengths.sqrt()

    @property
    def whitener(self) -> Tensor:
        """F⁻¹, (L, L)."""
        return self.lengths.sqrt().unsqueeze(-1) * self.axes.mT

    def is_near(self, point: Tensor) -> bool:
        """Whether a point is this mode, up to a share of its width."""
        return bool((self.whitener @ (point - self.point)).norm() <= APART)


class Search(NamedTuple):
    """Modes that were found.

    Args:
        modes: the one of most evidence first.
        is_whole: False if the last starts still found others, or there are more than a mixture has places.
    """

    modes: list[Mode]
    is_whole: bool


def find_modes(density: Density, datum: tuple[Tensor, ...], draws: Draws) -> Search:
    """Return Gaussians at the modes that ascent from several starts reaches.

    Args:
        density: of the pair.
        datum: one datum and its conditions.
        draws: of guide and prior, to start from.
    """
    modes, is_whole = _all_reached(density, datum, draws)
    most = modes[0].log_evidence if modes else -math.inf
    count = sum(bool(mode.log_evidence > most - WORTH) for mode in modes[:FEW])
    averaged = [_averaged(density, datum, mode) for mode in modes[:count]]
    # A search that runs away ends where the density is flat, and holds no mass.
    worth = [mode for mode in averaged if mode.log_evidence.isfinite()]
    others = [mode for mode in modes[count:] if mode.log_evidence > most - LITTLE]
    if not worth or max(mode.log_evidence for mode in worth) < draws.log_weights.mean() - LOSS:
        # Where scales depend on latents, modes hold no mass. The guide knows where it is.
        guided = _averaged(density, datum, _of(draws.guides), 2 * ROUNDS)
        worth = [mode for mode in (guided, *worth) if mode.log_evidence > guided.log_evidence - LITTLE]
        others = []
    return Search(sorted(worth, key=lambda mode: -float(mode.log_evidence)) + others, is_whole)


def _all_reached(density: Density, datum: tuple[Tensor, ...], draws: Draws) -> tuple[list[Mode], bool]:
    """Return the modes that starts lead to, by evidence, at most as many as there are places; whether these are all.

    A mode whose basin has a share s of the prior's mass is missed by n starts with probability (1 − s)ⁿ. Ten starts
    miss one quadrant of four in a quarter of all searches, forty in one of 25 000.
    """
    starts, scale = _starts(draws)
    modes = _reached(density, datum, starts, scale, [])
    is_whole = True
    if len(modes) > 1 or starts.shape[-1] <= FEW_LATENTS:
        for more in draws.priors[PRIORS:].split(AGAIN):
            new = _reached(density, datum, more, scale, modes)
            modes, is_whole = _worthy([*modes, *new]), not new
            if is_whole or len(modes) > MODES:
                break
    return modes[:MODES], is_whole and len(modes) <= MODES


def _worthy(modes: Sequence[Mode]) -> list[Mode]:
    """Return the modes that are no more than LITTLE below the first, by evidence."""
    ordered = sorted(modes, key=lambda mode: -float(mode.log_evidence))
    return [mode for mode in ordered if mode.log_evidence > ordered[0].log_evidence - LITTLE]


def _reached(
    density: Density, datum: tuple[Tensor, ...], starts: Tensor, scale: Tensor, known: Sequence[Mode]
) -> list[Mode]:
    """Return the modes of some evidence, beside known ones, that ascent reaches; one more than places at most."""
    points, values, inverse = _climb(density, datum, starts, scale)
    # The determinant of the last quasi-Newton matrix is a rough one.
    rough = values + 0.5 * torch.linalg.slogdet(inverse)[1]
    modes: list[Mode] = []
    for i in rough.nan_to_num(nan=-math.inf).argsort(descending=True).tolist():
        if len(known) + len(modes) > MODES or not bool(values[i].isfinite()):
            break
        if any(mode.is_near(points[i]) for mode in (*known, *modes)):
            continue
        mode = _polished(density, datum, points[i])
        if mode is not None and not any(other.is_near(mode.point) for other in (*known, *modes)):
            modes.append(mode)
    worthy = _worthy([*known, *modes])
    return [mode for mode in modes if any(mode is other for other in worthy)]


def refined(density: Density, datum: tuple[Tensor, ...], modes: Sequence[Mode]) -> list[Mode]:
    """Return modes after further averages, over more draws, for those of much evidence."""
    most, count = max(mode.log_evidence for mode in modes), MORE * AVERAGED
    return [
        _averaged(density, datum, mode, count=count) if i < FEW and mode.log_evidence > most - WORTH else mode
        for i, mode in enumerate(modes)
    ]


def _of(draws: Tensor) -> Mode:
    """Return the Gaussian of the mean and the variances of draws (N, L)."""
    lengths = draws.var(0).clamp(min=1e-12).reciprocal()
    return Mode(draws.mean(0), torch.eye(len(lengths), dtype=draws.dtype, device=draws.device), lengths, lengths.sum())


def _starts(draws: Draws) -> tuple[Tensor, Tensor]:
    """Return points to start from (N, L), and the guide's widths (L,)."""
    guides, priors, log_lik = draws.guides, draws.priors, draws.log_lik
    # Adding Gumbel noise and taking the largest draws without replacement in proportion to the weights.
    noisy = log_lik.nan_to_num(nan=-math.inf) - torch.empty_like(log_lik).exponential_().log()
    chosen = priors[noisy.topk(CHOSEN).indices]
    starts = torch.cat([guides.mean(0, keepdim=True), guides[:GUIDES], priors[:PRIORS], chosen])
    return starts, guides.std(0).clamp(min=1e-4, max=1.0)


def _climb(density: Density, datum: tuple[Tensor, ...], points: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return points after quasi-Newton ascent (BFGS) from each, their values, and inverse Hessians' approximations."""
    first = torch.diag_embed((scale**2).expand_as(points))
    inverse, size, is_first = first.clone(), points.new_ones(len(points)), points.new_ones(len(points)).bool()
    value, slope = density(datum, points)
    for _ in range(CLIMBS):
        step = (inverse @ slope.unsqueeze(-1)).squeeze(-1)
        gain = (step * slope).sum(-1)
        active = (gain > PROMISE) & (size > 1e-6) & value.isfinite()
        if not bool(active.any()):
            break
        move = torch.where(active, size, 0.0).unsqueeze(-1) * step
        trial, trial_slope = density(datum, points + move)
        better = active & (trial >= value + 1e-4 * size * gain)
        change = slope - trial_slope
        inverse = torch.where((better & is_first)[:, None, None], _rescaled(inverse, move, change), inverse)
        inverse = torch.where(better[:, None, None], _updated(inverse, move, change), inverse)
        # A parabola through the values places the next trial.
        lack = (size * gain - (trial - value)).clamp(min=1e-12)
        shrunk = (0.5 * size * gain / lack).nan_to_num(nan=0.1).clamp(0.1, 0.5)
        size = torch.where(better, 1.0, torch.where(active, size * shrunk, size))
        points = torch.where(better.unsqueeze(-1), points + move, points)
        value, slope = torch.where(better, trial, value), torch.where(better.unsqueeze(-1), trial_slope, slope)
        is_first = is_first & ~better
    return points, value, inverse


def _rescaled(inverse: Tensor, move: Tensor, change: Tensor) -> Tensor:
    """Return an inverse Hessian scaled so that it fits the first step (Nocedal and Wright, 2006, equation 6.20)."""
    curved = (move * change).sum(-1)
    factor = curved / (change * (inverse @ change.unsqueeze(-1)).squeeze(-1)).sum(-1)
    return torch.where((curved > 0) & factor.isfinite(), factor, 1.0)[:, None, None] * inverse


def _updated(inverse: Tensor, move: Tensor, change: Tensor) -> Tensor:
    """Return the BFGS update of inverse Hessians; unchanged where the density is not concave along the move."""
    curved = (move * change).sum(-1)
    along = (inverse @ change.unsqueeze(-1)).squeeze(-1)
    outer, crossed = move.unsqueeze(-1) * move.unsqueeze(-2), along.unsqueeze(-1) * move.unsqueeze(-2)
    weight = (1 + (change * along).sum(-1) / curved) / curved
    new = inverse + weight[:, None, None] * outer - (crossed + crossed.mT) / curved[:, None, None]
    is_sound = (curved > 1e-10 * move.norm(dim=-1) * change.norm(dim=-1)) & new.flatten(1).isfinite().all(-1)
    return torch.where(is_sound[:, None, None], new, inverse)


def _polished(density: Density, datum: tuple[Tensor, ...], point: Tensor) -> Mode | None:
    """Return the mode that Newton steps reach, with its curvature; None if that is not finite, or there is none."""
    share = point.new_tensor(SHARES).unsqueeze(-1)
    for _ in range(POLISHES):
        value, slope, curvature = density.curvature(datum, point)
        if not bool(curvature.isfinite().all()) or not bool(value.isfinite()):
            return None
        lengths, axes = _spectrum(curvature)
        step = axes @ ((axes.mT @ slope) / lengths)
        gain = 0.5 * float(step @ slope)
        evidence = value + 0.5 * (math.log(2 * math.pi) - lengths.log()).sum()
        if gain < SMALL:
            return Mode(point + step, axes, lengths, evidence + gain)
        values = density(datum, point + share * step)[0].nan_to_num(nan=-math.inf)
        best = int(values.argmax())
        if values[best] <= value:
            break
        point = point + SHARES[best] * step
    # A flat tail promises much and gives nothing: no mode.
    return Mode(point, axes, lengths, evidence) if gain < WORTH else None


def _averaged(
    density: Density, datum: tuple[Tensor, ...], mode: Mode, rounds: int = ROUNDS, count: int = AVERAGED
) -> Mode:
    """Return the Gaussian of the best ELBO near a mode's, by its draws.

    There the mean gradient is zero and Λ = −E ∇² log p. By Price's theorem the Hessian's mean is one of gradients:
    −E ∇² log p = Λ − E [Λ (u − μ) r(u)ᵀ], with r(u) = ∇ log p + Λ (u − μ), what the Gaussian leaves. A Gaussian
    posterior leaves nothing, and no noise. At the mode of a network with kinks, the Hessian tells little of the width.

    Reference:
        Opper and Archambeau (2009), The variational Gaussian approximation revisited, Neural Computation 21; Khan and
        Nielsen (2018), Fast yet simple natural-gradient descent for variational inference in complex models, ISITA.
    """
    size, best = len(mode.point), mode
    for i in range(rounds + 1):
        half = mode.point.new_empty(max(count, 2 * size) // 2, size).normal_()
        noise = torch.cat([half, -half])
        value, slope = density(datum, mode.point + noise @ mode.factor.mT)
        # In units of the Gaussian's width.
        left = slope @ mode.factor + noise
        # The ELBO; a Gaussian posterior leaves each draw the same.
        evidence = (value + 0.5 * noise.square().sum(-1)).mean()
        evidence = evidence + 0.5 * (math.log(2 * math.pi) - mode.lengths.log()).sum()
        mode = mode._replace(log_evidence=evidence, left=float(left.abs().max()))
        if i == 0 or mode.log_evidence > best.log_evidence:
            best = mode
        elif not mode.log_evidence > best.log_evidence - LOSS:
            break
        if i == rounds:
            break
        change, shift = _shrunk(-noise.unsqueeze(-1) * left.unsqueeze(-2)), _shrunk(left)
        sizes, axes = torch.linalg.eigh(0.5 * (change + change.mT))
        if not bool(sizes.isfinite().all()):
            break
        axes = mode.whitener.mT @ (axes * (1 + sizes).clamp(LEAST, MOST).sqrt())
        lengths, axes = _spectrum(axes @ axes.mT)
        step = axes @ ((axes.mT @ (mode.whitener.mT @ shift)) / lengths)
        mode = Mode(mode.point + step, axes, lengths, mode.log_evidence)
    return best


def _shrunk(samples: Tensor) -> Tensor:
    """Return the mean of samples (N, …), shrunk towards zero by as much of it as is noise (James and Stein, 1961)."""
    mean = samples.mean(0)
    squared = mean.square().sum()
    noise = (samples.square().sum() / len(samples) - squared) / len(samples)
    return mean * (1 - noise / squared).nan_to_num(nan=0.0).clamp(0.0, 1.0)


def _spectrum(curvature: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sizes of a matrix's eigenvalues, floored, and its axes."""
    values, axes = torch.linalg.eigh(curvature)
    sizes = values.abs()
    return sizes.clamp(min=1e-12).maximum(FLOOR * sizes.amax(-1, keepdim=True)), axes
