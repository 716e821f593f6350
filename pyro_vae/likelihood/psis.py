"""The tail of importance weights: Pareto k̂, a diagnostic of an estimate's reliability, and the smoothed sum."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_vae.pair.weights import Rounding

__all__ = ["fit_pareto", "pareto_tail", "tail_size", "trust_threshold"]

# The fit needs five tail weights; at this K they are a fifth of all.
FEWEST = 25
# A weakly informative prior on k̂, worth ten weights at ½, stabilises it for short tails.
PRIOR_WEIGHTS, PRIOR_SHAPE = 10, 0.5


def tail_size(num_particles: int) -> int:
    """Return the size of the tail, M = ⌈min(K/5, 3 √K)⌉ of the largest weights; 0 below K = 25.

    >>> tail_size(5000)
    213
    """
    if num_particles < FEWEST:
        return 0
    return math.ceil(min(num_particles / 5, 3 * math.sqrt(num_particles)))


def trust_threshold(num_particles: int) -> float:
    """Return min(1 − 1/log10 K, 0.7), the k̂ up to which an estimate from K weights is reliable; NaN below K = 25.

    Reference:
        Vehtari, Simpson, Gelman, Yao and Gabry (2024), Pareto smoothed importance sampling, JMLR 25.

    >>> trust_threshold(5000), round(trust_threshold(100), 3)
    (0.7, 0.5)
    """
    return min(1 - 1 / math.log10(num_particles), 0.7) if num_particles >= FEWEST else math.nan


def fit_pareto(excesses: Tensor) -> tuple[float, float]:
    """Return shape k and scale σ of the generalised Pareto distribution of excesses over a threshold.

    p(y) = (1/σ) (1 + k y / σ)^(−1/k − 1).   With θ = −k/σ the likelihood is maximal over k at
    k(θ) = mean log(1 − θ y). θ is its posterior mean on a grid; the quartile of the excesses sets a weak prior.

    Args:
        excesses: positive, ascending, (M,), float64.

    Returns:
        k and σ; k is shrunk towards ½ as by ten more observations.

    Reference:
        Zhang and Stephens (2009), A new and efficient estimation method for the generalized Pareto distribution,
        Technometrics 51; Vehtari et al. (2024), appendix C, for the prior on k.

    >>> k, scale = fit_pareto(-torch.log1p(-(torch.arange(500, dtype=torch.float64) + 0.5) / 500))
    >>> abs(k) < 0.02, abs(scale - 1) < 0.02
    (True, True)
    """
    count = len(excesses)
    grid = 30 + math.isqrt(count)
    quartile = excesses[int(count / 4 + 0.5) - 1]
    spread = 1 - torch.sqrt(grid / (torch.arange(1, grid + 1, dtype=excesses.dtype) - 0.5))
    theta = 1 / excesses[-1] + spread / (3 * quartile)
    shapes = torch.log1p(-theta.unsqueeze(-1) * excesses).mean(-1)
    log_likelihood = count * (torch.log(-theta / shapes) - shapes - 1)
    weights = log_likelihood.softmax(0)
    # Grid points of no weight only add their rounding.
    weights = torch.where(weights >= 10 * torch.finfo(weights.dtype).eps, weights, 0.0)
    mean = (theta * weights).sum() / weights.sum()
    shape = torch.log1p(-mean * excesses).mean()
    scale = -shape / mean
    shrunk = (count * shape + PRIOR_WEIGHTS * PRIOR_SHAPE) / (count + PRIOR_WEIGHTS)
    return float(shrunk), float(scale)


def pareto_tail(log_tail: Tensor, num_particles: int, rounding: Rounding) -> tuple[float, float]:
    """Return k̂ of one datum's weights, and the change of the log of their tail's sum by smoothing.

    The M largest weights less the next one are fitted by a generalised Pareto distribution; smoothing puts its
    quantiles at (i − ½)/M in their place, none above the largest weight.

    Args:
        log_tail: the M + 1 largest log-weights, (M + 1,), nats.
        num_particles: K.
        rounding: of the log-weights.

    Returns:
        k̂, and log Σ smoothed − log Σ raw over the tail, in nats. Weights that are equal up to rounding have no tail:
        k̂ = −∞, no change. Below K = 25, and without a finite weight, k̂ is NaN, with no change. Four or fewer weights
        above the next one, as ties leave them, give +∞, as in ArviZ.

    Reference:
        Vehtari, Simpson, Gelman, Yao and Gabry (2024), Pareto smoothed importance sampling, JMLR 25.
    """
    if tail_size(num_particles) == 0:
        return math.nan, 0.0
    ordered = log_tail.double().sort().values
    top = float(ordered[-1])
    if not math.isfinite(top):
        return math.nan, 0.0
    if top - float(ordered[0]) <= rounding.nats(top):
        return -math.inf, 0.0
    # Below the smallest float the cutoff is that float: excesses keep their digits.
    cutoff = max(float(ordered[0]) - top, math.log(torch.finfo(torch.float64).tiny))
    relative = ordered[1:] - top
    tied, above = relative[relative <= cutoff], relative[relative > cutoff]
    if len(above) < 5:
        return math.inf, 0.0
    shape, scale = fit_pareto(above.exp() - math.exp(cutoff))
    if not math.isfinite(shape):
        return shape, 0.0
    quantiles = (torch.arange(len(above), dtype=torch.float64) + 0.5) / len(above)
    exceedance = -torch.log1p(-quantiles)
    stretched = exceedance if shape == 0 else torch.expm1(shape * exceedance) / shape
    smoothed = torch.log(scale * stretched + math.exp(cutoff)).clamp(max=0)
    return shape, float(torch.logsumexp(torch.cat([tied, smoothed]), 0) - torch.logsumexp(relative, 0))
