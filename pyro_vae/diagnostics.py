"""What a trained pair does with its latents: how much each carries, which lie idle, which components are used."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Categorical, Normal

from pyro_vae.checks import check_batch, check_support
from pyro_vae.distributions import GaussianMixture
from pyro_vae.evaluate import CHUNK
from pyro_vae.pair import (
    Pair,
    bare,
    device_of,
    evaluation,
    point_masses,
    sample_sites,
    site_log_prob,
    to_pair,
    trace_pair,
)
from pyro_vae.randomness import own_random_state

__all__ = ["CollapseReport", "SiteReport", "collapse_report"]

# A unit is active when its posterior mean varies over the data by more than this (Burda et al., 2016, section 5.2).
ACTIVE_VARIANCE = 0.01


class SiteReport(NamedTuple):
    """One latent site, averaged over data and draws; in nats.

    ``kl`` is E[log q(z | x) − log p(z | …)] and ``kl_standard_error`` its error as an average over data;
    ``kl_per_dimension`` (L,) splits it in closed form where both are diagonal Gaussians, else None. ``mean_variance``
    (L,) is the variance of the posterior mean over data and ``active`` (L,) where it exceeds 0.01; None for a discrete
    site. ``usage`` (C,) are mean responsibilities of a mixture prior's components, or the mean probabilities of a
    categorical site; ``perplexity`` is exp of their entropy, the number of components in use; None elsewhere.
    """

    kl: float
    kl_standard_error: float
    kl_per_dimension: Tensor | None
    mean_variance: Tensor | None
    active: Tensor | None
    usage: Tensor | None
    perplexity: float | None


class CollapseReport(NamedTuple):
    """``sites`` by name, and plain ``sentences`` on what they mean."""

    sites: dict[str, SiteReport]
    sentences: tuple[str, ...]

    def __repr__(self) -> str:
        return "\n".join(self.sentences)


def collapse_report(pair: Pair, *batch: Tensor, num_particles: int = 10, seed: int | None = None) -> CollapseReport:
    """Report what each latent site carries about the data.

    KL is closed per dimension for diagonal Gaussians, given the draws of earlier sites, and Monte Carlo elsewhere. The
    variance of the posterior mean is corrected for what a finite number of draws adds to it.

    Args:
        pair: any pair.
        batch: ``x`` (N, …), at least two data, and the pair's conditions.
        num_particles: K, draws per datum, at least two.
        seed: of the draws; fresh entropy without one.

    Returns:
        :class:`CollapseReport`; sites that the guide fixes to a point mass are data and left out.

    Raises:
        ValueError: for bad data, fewer than two data or particles.

    Reference:
        Burda, Grosse and Salakhutdinov (2016), Importance weighted autoencoders, ICLR, for active units.

    >>> import pyro_vae as pv
    >>> collapse_report(pv.models.VAE((4,), pv.StandardNormal(3)), torch.randn(8, 4)).sites["z"].active.shape
    torch.Size([3])
    """
    check_batch(pair, batch)
    if num_particles < 2 or len(batch[0]) < 2:
        raise ValueError(
            f"{len(batch[0])} data and num_particles {num_particles}: variances over data and draws need two of each"
        )
    check_support(pair, batch, "x")
    device, batch = device_of(pair), to_pair(pair, batch)
    collected: dict[str, list[_Part]] = {}
    with evaluation(pair), torch.inference_mode(False), torch.no_grad(), own_random_state(seed, device):
        for rows in torch.arange(len(batch[0]), device=device).split(CHUNK):
            guide, model = trace_pair(pair, *(tensor[rows] for tensor in batch), num_particles=num_particles)
            fixed = point_masses(guide)
            sites = sample_sites(model)
            for name, site in sample_sites(guide).items():
                if name not in fixed:
                    part = _look_at(site, sites[name], -1 - pair.max_plate_nesting, (num_particles, len(rows)))
                    collected.setdefault(name, []).append(part)
    reports = {name: _summarise(parts, num_particles) for name, parts in collected.items()}
    return CollapseReport(reports, tuple(line for name, report in reports.items() for line in _describe(name, report)))


class _Part(NamedTuple):
    """One site on a chunk of b data: KL (b,), per dimension (b, L), mean and variance over draws of the posterior mean
    (b, L), usage (b, C)."""

    kl: Tensor
    per_dimension: Tensor | None
    mean: Tensor | None
    spread: Tensor | None
    usage: Tensor | None


def _look_at(guide: Any, model: Any, dim: int, leading: tuple[int, int]) -> _Part:
    q, p = guide["fn"], model["fn"]
    per_dimension = _diagonal_kl(q, p)
    if per_dimension is not None:
        per_dimension = _by_datum(per_dimension, guide, leading).mean(0)
        kl = per_dimension.sum(-1)
    else:
        kl = (site_log_prob(guide, dim) - site_log_prob(model, dim)).expand(leading).mean(0)
    mean = spread = usage = None
    if not q.support.is_discrete:
        centres = _by_datum(_centre(guide), guide, leading)
        mean, spread = centres.mean(0), centres.var(0)
    if isinstance(bare(p), GaussianMixture):
        mixture = bare(p)
        log_joint = mixture.mixture_distribution.logits
        log_joint = log_joint + mixture.component_distribution.log_prob(guide["value"].unsqueeze(-2))
        usage = _by_datum(log_joint.softmax(-1), guide, leading, event_dim=1).mean(0)
    elif isinstance(bare(q), Categorical):
        usage = _by_datum(bare(q).probs, guide, leading, event_dim=1).mean(0)
    return _Part(kl, per_dimension, mean, spread, usage)


def _diagonal_kl(q: Any, p: Any) -> Tensor | None:
    """Return the divergence entry by entry, or None unless both are independent univariate Gaussians."""
    q, p = bare(q), bare(p)
    if not isinstance(q, Normal) or not isinstance(p, Normal):
        return None
    ratio = (q.scale**2 + (q.loc - p.loc) ** 2) / (2 * p.scale**2)
    return torch.log(p.scale / q.scale) + ratio - 0.5


def _centre(site: Any) -> Tensor:
    """Return the posterior's mean, or its draws where no mean is known."""
    try:
        return site["fn"].mean
    except NotImplementedError:
        return site["value"]


def _by_datum(values: Tensor, site: Any, leading: tuple[int, int], event_dim: int | None = None) -> Tensor:
    """Lay values of one number per entry out as (K, B, entries), plates of the pair's own among the entries."""
    event_dim = site["fn"].event_dim if event_dim is None else event_dim
    dims = {frame.name: frame.dim - event_dim for frame in site["cond_indep_stack"]}
    while values.dim() < -dims["particles"]:
        values = values.unsqueeze(0)
    values = values.movedim((dims["particles"], dims["data"]), (0, 1))
    return values.expand(*leading, *values.shape[2:]).reshape(*leading, -1)


def _summarise(parts: list[_Part], num_particles: int) -> SiteReport:
    def joined(index: int) -> Tensor | None:
        tensors = [part[index] for part in parts if part[index] is not None]
        return torch.cat(tensors).double().cpu() if tensors else None  # type: ignore[arg-type]

    kl, per_dimension, mean, spread, usage = (joined(i) for i in range(5))
    assert kl is not None
    variance = active = None
    if mean is not None and spread is not None:
        variance = (mean.var(0) - spread.mean(0) / num_particles).clamp(min=0)
        active = variance > ACTIVE_VARIANCE
    shares = None if usage is None else usage.mean(0)
    return SiteReport(
        kl=float(kl.mean()),
        kl_standard_error=float(kl.std() / math.sqrt(len(kl))),
        kl_per_dimension=None if per_dimension is None else per_dimension.mean(0),
        mean_variance=variance,
        active=active,
        usage=shares,
        perplexity=None if shares is None else float(torch.exp(-torch.special.xlogy(shares, shares).sum())),
    )


def _describe(name: str, report: SiteReport) -> list[str]:
    lines = [f"{name}: KL {report.kl:.2f} ± {report.kl_standard_error:.2f} nats on average over the data."]
    if report.active is not None:
        active, size = int(report.active.sum()), len(report.active)
        lines.append(f"{name}: {active} of {size} units active (variance of the posterior mean over data above 0.01).")
        if active == 0:
            lines.append(
                f"{name}: the guide gives every datum the same posterior mean, so that {name} says nothing about x "
                "(posterior collapse): train with a warm-up of β or less decoder noise γ."
            )
    if report.usage is not None and report.perplexity is not None:
        lines.append(
            f"{name}: {report.perplexity:.1f} of {len(report.usage)} components in use (perplexity of their mean "
            "responsibilities)."
        )
    return lines
