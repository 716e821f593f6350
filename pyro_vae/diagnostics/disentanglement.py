"""How far known factors of variation lie apart in a code: the mutual information gap and the β-VAE metric.

Both depend on their estimator, which is therefore part of their definition here; figures found by
another estimator do not compare.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyro_vae.pair.checks import check_batch
from pyro_vae.pair.modes import evaluation, to_pair
from pyro_vae.pair.pair import Pair
from pyro_vae.pair.site import Site
from pyro_vae.pair.trace import trace_pair
from pyro_vae.runtime.memory import CHUNK

__all__ = ["MutualInformationGap", "beta_vae_metric", "latent_means", "mutual_information_gap"]


class MutualInformationGap(NamedTuple):
    """``gap``: MIG, from 0 to 1; ``per_factor`` (F,): each factor's; ``information`` (L, F): I(z_l; v_k) in nats;
    ``entropy`` (F,): H(v_k) in nats."""

    gap: float
    per_factor: Tensor
    information: Tensor
    entropy: Tensor


def latent_means(pair: Pair, *batch: Tensor, site: str = "z") -> Tensor:
    """Return the guide's mean of a latent vector for each datum: the code that the metrics look at.

    Args:
        pair: any pair.
        batch: ``x`` (N, …) and the pair's conditions.
        site: the latent's name.

    Returns:
        (N, L).

    Raises:
        ValueError: for bad data, and a site that the guide lacks, that is no vector, or whose mean has no closed form.

    >>> import pyro_vae as pv
    >>> latent_means(pv.models.VAE((4,), pv.StandardNormal(3)), torch.randn(8, 4)).shape
    torch.Size([8, 3])
    """
    check_batch(pair, batch)
    batch, means = to_pair(pair, batch), []
    with evaluation(pair):
        for rows in torch.arange(len(batch[0]), device=batch[0].device).split(CHUNK):
            sites = trace_pair(pair, *(tensor[rows] for tensor in batch)).guide
            if site not in sites:
                raise ValueError(f"the guide has no site '{site}'; it has {sorted(sites)}")
            means.append(_mean(sites[site]).flatten(0, -2))
    return torch.cat(means).clone()


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


def mutual_information_gap(codes: Tensor, factors: Tensor, bins: int = 20) -> MutualInformationGap:
    """Return how much more the best latent tells about a factor than the second best does.

    MIG = (1/F) Σ_k [I(z_(1); v_k) − I(z_(2); v_k)] / H(v_k)

    Estimator: each latent is cut into ``bins`` intervals of equal width between its least and greatest value, and all
    information is that of the resulting table of counts. It is 1 for a code that copies each factor to a latent of its
    own, and 0 where two latents know each factor equally well, or none does.

    Args:
        codes: (N, L), such as :func:`latent_means`.
        factors: indices of the factors' values, (N, F) int64.
        bins: intervals per latent, at least 2.

    Returns:
        :class:`MutualInformationGap`.

    Raises:
        ValueError: for shapes that do not match, codes that are not finite, a factor with one value, bins < 2.

    Reference:
        Chen, Li, Grosse and Duvenaud (2018), Isolating sources of disentanglement in VAEs, NeurIPS; the estimator by
        bins of means is that of Locatello et al. (2019), Challenging common assumptions, ICML.

    >>> factors = torch.cartesian_prod(torch.arange(3), torch.arange(4))
    >>> round(mutual_information_gap(-factors.flip(-1).double(), factors).gap, 6)
    1.0
    """
    _check(codes, factors)
    if bins < 2:
        raise ValueError(f"bins is {bins}; at least 2 tell anything apart")
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


def beta_vae_metric(
    codes: Tensor, factors: Tensor, *, num_votes: int = 500, num_pairs: int = 64, seed: int | None = 0
) -> float:
    """Return how well a linear classifier tells which factor pairs of data share, from how their codes differ.

    A vote fixes one factor k, draws ``num_pairs`` pairs of data that agree in it, and averages |z − z'| over them; the
    classifier is to find k. Estimator: ``num_votes`` votes per factor to train a logistic regression on, features
    standardised by their own mean and deviation, and as many fresh ones to score it on. Chance is 1/F; a code that
    copies each factor to a latent of its own scores 1.

    Args:
        codes: (N, L), such as :func:`latent_means`.
        factors: indices of the factors' values, (N, F) int64.
        num_votes: votes per factor, in training and again in scoring.
        num_pairs: pairs per vote.
        seed: of the votes; fresh entropy for None.

    Returns:
        The share of votes that are right.

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
        votes = [_votes(codes.double().cpu(), v.cpu(), num_votes, num_pairs, generator) for v in factors.unbind(-1)]
        sets.append(torch.cat(votes))
    mean, scale = sets[0].mean(0), sets[0].std(0)
    # A latent that never moves has features that are equal up to rounding, which a division would blow up.
    train, test = ((features - mean) / torch.where(scale > 1e-12 * mean, scale, 1.0) for features in sets)
    labels = torch.arange(factors.shape[1]).repeat_interleave(num_votes)
    classifier = LogisticRegression(max_iter=2000).fit(train.numpy(), labels.numpy())
    return float(classifier.score(test.numpy(), labels.numpy()))


def _votes(codes: Tensor, values: Tensor, num_votes: int, num_pairs: int, generator: torch.Generator) -> Tensor:
    """Return mean absolute differences of pairs that agree in a factor, (votes, L)."""
    first = torch.randint(len(codes), (num_votes * num_pairs,), generator=generator)
    order, counts = values.argsort(), values.bincount()
    starts = counts.cumsum(0) - counts
    shared = values[first]
    place = (torch.rand(len(first), generator=generator, dtype=torch.float64) * counts[shared]).long()
    second = order[starts[shared] + place]
    return (codes[first] - codes[second]).abs().reshape(num_votes, num_pairs, -1).mean(1)


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
            raise ValueError(f"factor {k} takes one value only, so that nothing can be learned about it: leave it out")
