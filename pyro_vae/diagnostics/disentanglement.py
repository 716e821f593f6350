"""Disentanglement of known factors of variation: the mutual information gap and the β-VAE metric.

Both depend on their estimator, which is part of the definition here. Do not compare numbers of another estimator.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyro_vae.inspection import inspect
from pyro_vae.inspection.arrays import takes_arrays
from pyro_vae.pair.modes import chunks, evaluation, to_pair
from pyro_vae.pair.pair import Pair
from pyro_vae.pair.site import Site
from pyro_vae.pair.trace import run_guide
from pyro_vae.runtime.memory import CHUNK
from pyro_vae.runtime.threads import one_at_a_time

__all__ = ["MutualInformationGap", "beta_vae_metric", "latent_means", "mutual_information_gap", "votes_of"]


class MutualInformationGap(NamedTuple):
    """The mutual information gap, MIG.

    Args:
        gap: mean over factors, 0 to 1.
        per_factor: the gap of each factor, (F,).
        information: I(z_l; v_k), (L, F), in nats.
        entropy: H(v_k), (F,), in nats.
    """

    gap: float
    per_factor: Tensor
    information: Tensor
    entropy: Tensor


@one_at_a_time
@takes_arrays
def latent_means(pair: Pair, *batch: Tensor, site: str = "z") -> Tensor:
    """Return the guide's mean of a latent vector for each datum, the code for the metrics.

    Args:
        pair: any pair.
        batch: ``x`` (N, …) and the pair's conditions.
        site: the latent's name.

    Returns:
        (N, L).

    Raises:
        ValueError: for bad data, and for a site that the guide lacks, that is no vector, or has no closed-form mean.

    >>> import pyro_vae as pv
    >>> latent_means(pv.models.VAE((4,), pv.StandardNormal(3)), torch.randn(8, 4)).shape
    torch.Size([8, 3])
    """
    guide = inspect(pair, batch).trace.guide
    if site not in guide:
        raise ValueError(f"the guide has no site '{site}'; it has {sorted(guide)}")
    with evaluation(pair):
        means = [
            _mean(run_guide(pair, *chunk, num_particles=1)[site]).flatten(0, -2)
            for chunk in chunks(to_pair(pair, batch), CHUNK)
        ]
    return torch.cat(means).clone()


@one_at_a_time
def mutual_information_gap(codes: Tensor, factors: Tensor, bins: int = 20) -> MutualInformationGap:
    """Return the gap in information about a factor between the best latent and the second best.

    MIG = (1/F) Σ_k [I(z_(1); v_k) − I(z_(2); v_k)] / H(v_k)

    The estimator cuts the range of each latent into ``bins`` intervals of equal width, and computes information from
    the table of counts. The gap is 1 for a code that copies each factor to a separate latent. It is 0 if two latents
    are equally informative about each factor, or none is.

    Args:
        codes: (N, L), e.g. :func:`latent_means`.
        factors: indices of the factors' values, (N, F) int64.
        bins: intervals per latent, at least 2.

    Returns:
        :class:`MutualInformationGap`.

    Raises:
        ValueError: for shapes that do not match, codes that are not finite, a factor with one value, bins < 2.

    Reference:
        Chen, Li, Grosse and Duvenaud (2018), Isolating sources of disentanglement in VAEs, NeurIPS; Locatello et al.
        (2019), Challenging common assumptions, ICML, for the estimator by bins of means.

    >>> factors = torch.cartesian_prod(torch.arange(3), torch.arange(4))
    >>> round(mutual_information_gap(-factors.flip(-1).double(), factors).gap, 6)
    1.0
    """
    _check(codes, factors)
    if bins < 2:
        raise ValueError(f"bins is {bins}; it must be at least 2")
    cells = _cut(codes.double(), bins)
    entropy = torch.stack([_entropy(column) for column in factors.unbind(-1)])
    information = torch.stack(
        [
            torch.stack([_entropy(c) + _entropy(v) - _entropy(c * (int(v.max()) + 1) + v) for v in factors.unbind(-1)])
            for c in cells.unbind(-1)
        ]
    )
    best = torch.cat([information, information.new_zeros(1, len(entropy))]).topk(2, 0).values
    per_factor = (best[0] - best[1]) / entropy
    return MutualInformationGap(float(per_factor.mean()), per_factor, information, entropy)


@one_at_a_time
def beta_vae_metric(
    codes: Tensor, factors: Tensor, *, num_votes: int = 500, num_pairs: int = 64, seed: int | None = 0
) -> float:
    """Return the accuracy of a linear classifier that finds the factor shared by pairs of data from their codes.

    A vote fixes one factor k, draws ``num_pairs`` pairs of data that agree in it, and averages |z − z'| over them. The
    classifier predicts k. The estimator trains a logistic regression on ``num_votes`` votes per factor, with
    standardised features, and scores it on as many new votes. Chance is 1/F. A code that copies each factor to a
    separate latent scores 1.

    Args:
        codes: (N, L), e.g. :func:`latent_means`.
        factors: indices of the factors' values, (N, F) int64.
        num_votes: votes per factor, in training and again in scoring.
        num_pairs: pairs per vote.
        seed: of the votes; fresh entropy for None.

    Returns:
        The share of correct votes, 0 to 1.

    Raises:
        ValueError: for shapes that do not match, codes that are not finite, a factor with one value, counts below one.

    Reference:
        Higgins et al. (2017), β-VAE, ICLR.

    >>> factors = torch.cartesian_prod(torch.arange(3), torch.arange(4))
    >>> beta_vae_metric(factors.double(), factors, num_votes=50)
    1.0
    """
    from sklearn.linear_model import LogisticRegression

    _check(codes, factors)
    if num_votes < 1 or num_pairs < 1:
        raise ValueError(f"num_votes is {num_votes}, num_pairs {num_pairs}; both must be at least 1")
    if factors.shape[1] < 2:
        raise ValueError("the metric tells factors from one another: it needs at least 2")
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    sets = []
    for _ in range(2):
        votes = [votes_of(codes.double().cpu(), v.cpu(), num_votes, num_pairs, generator) for v in factors.unbind(-1)]
        sets.append(torch.cat(votes))
    mean, scale = sets[0].mean(0), sets[0].std(0)
    # A constant latent has features that differ by rounding alone; a division would blow that up.
    train, test = ((features - mean) / torch.where(scale > 1e-12 * mean, scale, 1.0) for features in sets)
    labels = torch.arange(factors.shape[1]).repeat_interleave(num_votes)
    classifier = LogisticRegression(max_iter=2000).fit(train.numpy(), labels.numpy())
    return float(classifier.score(test.numpy(), labels.numpy()))


def votes_of(codes: Tensor, values: Tensor, num_votes: int, num_pairs: int, generator: torch.Generator) -> Tensor:
    """Draw the votes of :func:`beta_vae_metric` for one factor.

    Args:
        codes: (N, L).
        values: the factor's values, (N,).
        num_votes: number of votes.
        num_pairs: pairs per vote.
        generator: for the draws.

    Returns:
        Mean absolute differences of pairs that agree in the factor, (num_votes, L).
    """
    first = torch.randint(len(codes), (num_votes * num_pairs,), generator=generator)
    order, counts = values.argsort(), values.bincount()
    starts = counts.cumsum(0) - counts
    shared = values[first]
    place = (torch.rand(len(first), generator=generator, dtype=torch.float64) * counts[shared]).long()
    second = order[starts[shared] + place]
    return (codes[first] - codes[second]).abs().reshape(num_votes, num_pairs, -1).mean(1)


def _mean(site: Site) -> Tensor:
    name, q = site.name, site.fn
    if q.event_dim != 1:
        raise ValueError(f"the guide's site '{name}' is no vector but has events of shape {tuple(q.event_shape)}")
    try:
        mean: Tensor = q.mean
        return mean
    except NotImplementedError as error:
        raise ValueError(
            f"the guide's site '{name}' ({site.family}) has no mean in closed form: average "
            f"pv.posterior(pair, x).latents['{name}'] over its draws"
        ) from error


def _cut(codes: Tensor, bins: int) -> Tensor:
    low, high = codes.amin(0), codes.amax(0)
    width = torch.where(high > low, high - low, 1.0)
    return ((codes - low) / width * bins).long().clamp(max=bins - 1)


def _entropy(index: Tensor) -> Tensor:
    shares = index.bincount().double() / len(index)
    return -torch.special.xlogy(shares, shares).sum()


def _check(codes: Tensor, factors: Tensor) -> None:
    if codes.dim() != 2 or factors.dim() != 2 or len(codes) != len(factors):
        raise ValueError(f"codes have shape {tuple(codes.shape)}, factors {tuple(factors.shape)}; (N, L) and (N, F)")
    if factors.dtype != torch.int64 or bool((factors < 0).any()):
        raise ValueError(f"factors are {factors.dtype}: indices of values, int64 and not negative")
    if not bool(torch.isfinite(codes).all()):
        raise ValueError("codes has NaN or infinite values")
    for k, column in enumerate(factors.unbind(-1)):
        if bool((column == column[0]).all()):
            raise ValueError(f"factor {k} takes one value only, and nothing can be learned about it: leave it out")
