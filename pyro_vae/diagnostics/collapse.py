"""Posterior collapse: divergence of each latent site, inactive units, components in use, decoder noise."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Categorical, Normal

from pyro_vae.conditionals.scales import Scale
from pyro_vae.diagnostics.mutual_information import MutualInformation, mutual_information
from pyro_vae.distributions.mixtures import GaussianMixture
from pyro_vae.inspection import inspect
from pyro_vae.inspection.arrays import takes_arrays
from pyro_vae.pair.modes import chunks, drawing, to_pair
from pyro_vae.pair.pair import Pair
from pyro_vae.pair.site import Site
from pyro_vae.pair.trace import PairTrace, trace_pair
from pyro_vae.runtime.memory import CHUNK
from pyro_vae.runtime.threads import one_at_a_time

__all__ = ["CollapseReport", "SiteReport", "collapse_report", "noise_modules"]

# A unit is active when its posterior mean varies over the data by more than this (Burda et al., 2016, section 5.2).
ACTIVE_VARIANCE = 0.01
# Nats below log B at which the estimated information counts as saturated.
SATURATED = 0.1


class SiteReport(NamedTuple):
    """One latent site, averaged over data and draws.

    An entry that a mask leaves out adds zero to the divergences of its datum, and counts in no other average.

    Args:
        kl: E[log q(z | x) − log p(z | …)], in nats.
        kl_standard_error: of ``kl`` as an average over data, in nats.
        kl_per_dimension: the closed-form KL of each dimension, (L,), in nats; None unless guide and prior are diagonal
            Gaussians.
        mean_variance: variance of the posterior mean over data, (L,); None for a discrete site.
        active: True where ``mean_variance`` exceeds 0.01, (L,); None for a discrete site.
        usage: mean responsibilities of a mixture prior's components, or mean probabilities of a categorical site, (C,);
            else None.
        perplexity: exp of the entropy of ``usage``: the number of components in use; else None.
    """

    kl: float
    kl_standard_error: float
    kl_per_dimension: Tensor | None
    mean_variance: Tensor | None
    active: Tensor | None
    usage: Tensor | None
    perplexity: float | None


class CollapseReport(NamedTuple):
    """Report on all latent sites, printed as ``sentences``.

    Args:
        sites: by name.
        mutual_information: of x and all latents under q, a lower bound in expectation; None for a guide that can score
            only its latest draws, or that masks latents.
        noise: γ averaged over entries, by Gaussian data site with the same standard deviation for all data.
        sentences: the numbers in words.
    """

    sites: dict[str, SiteReport]
    mutual_information: MutualInformation | None
    noise: dict[str, float]
    sentences: tuple[str, ...]

    def __repr__(self) -> str:
        return "\n".join(self.sentences)

    def record(self) -> dict[str, Any]:
        """Return the report as numbers, lists and strings for JSON."""
        sites = {name: {k: _plain(v) for k, v in site._asdict().items()} for name, site in self.sites.items()}
        information = self.mutual_information
        return {
            "sites": sites,
            "mutual_information": None if information is None else information._asdict(),
            "noise": self.noise,
            "sentences": list(self.sentences),
        }


@one_at_a_time
@takes_arrays
def collapse_report(pair: Pair, *batch: Tensor, num_particles: int = 10, seed: int | None = None) -> CollapseReport:
    """Report the information about x in each latent site, and the sites that have collapsed.

    For diagonal Gaussians the KL is closed per dimension, given the draws of earlier sites. Otherwise it is a Monte
    Carlo average. The variance of the posterior mean is corrected for the Monte Carlo variance of that mean. The mutual
    information uses the aggregate posterior of at most 512 data: see
    :func:`~pyro_vae.diagnostics.mutual_information.mutual_information`.

    Args:
        pair: any pair.
        batch: ``x`` (N, …), at least two data, and the pair's conditions.
        num_particles: K, draws per datum, at least two.
        seed: of the draws; fresh entropy without one.

    Returns:
        :class:`CollapseReport`, without sites that the guide fixes to a point mass: they count as data.

    Raises:
        ValueError: for bad data, and fewer than two data or particles.

    Reference:
        Burda, Grosse and Salakhutdinov (2016), Importance weighted autoencoders, ICLR, for active units; Hoffman and
        Johnson (2016), ELBO surgery, NIPS workshop, for the mutual information; Lucas, Tucker, Grosse and Norouzi
        (2019), Don't blame the ELBO!, NeurIPS, for noise and collapse.

    >>> import pyro_vae as pv
    >>> collapse_report(pv.models.VAE((4,), pv.StandardNormal(3)), torch.randn(8, 4)).sites["z"].active.shape
    torch.Size([3])
    """
    inspect(pair, batch)
    if num_particles < 2 or len(batch[0]) < 2:
        raise ValueError(
            f"{len(batch[0])} data and num_particles {num_particles}: variances over data and draws need two of each"
        )
    batch = to_pair(pair, batch)
    collected: dict[str, list[_PerDatum]] = {}
    noise: dict[str, float] = {}
    with drawing(pair, seed):
        for chunk in chunks(batch, CHUNK):
            trace = trace_pair(pair, *chunk, num_particles=num_particles)
            for name, site in trace.latents.items():
                collected.setdefault(name, []).append(_measure(site, trace.model[name], (num_particles, len(chunk[0]))))
            # Equal for all data, and so for every chunk.
            noise = _noise(trace)
        information = mutual_information(pair, batch)
    reports = {name: _summarise(parts, num_particles) for name, parts in collected.items()}
    lines = [line for name, report in reports.items() for line in _describe(name, report)]
    # The KL to a prior that depends on the data, by a point mass or a condition, bounds another information.
    total = sum(report.kl for report in reports.values()) if not trace.point_masses and len(batch) == 1 else None
    lines += _describe_information(information, total) + _describe_noise(noise)
    return CollapseReport(reports, information, noise, tuple(lines))


def noise_modules(pair: Pair, *batch: Tensor) -> dict[str, str]:
    """Return the name of the module with γ, e.g. a :class:`~pyro_vae.LearnedScale`, for each data site.

    Args:
        pair: any pair.
        batch: a few data and their conditions.

    Returns:
        Names as in ``pair.named_modules()``, by data site.
    """
    outputs: dict[str, Tensor] = {}

    def save(name: str) -> Any:
        return lambda module, inputs, output: outputs.__setitem__(name, output)

    hooks = [m.register_forward_hook(save(name)) for name, m in pair.named_modules() if isinstance(m, Scale)]
    try:
        with drawing(pair, seed=0):
            trace = trace_pair(pair, *to_pair(pair, tuple(tensor[:2] for tensor in batch)))
    finally:
        for hook in hooks:
            hook.remove()
    # The distribution's scale is an expanded view of the module's output.
    return {
        site: module
        for site, fn in ((name, site.bare) for name, site in trace.data_sites.items())
        for module, output in outputs.items()
        if isinstance(fn, Normal) and fn.scale.data_ptr() == output.data_ptr()
    }


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, Tensor) else value


def _noise(trace: PairTrace) -> dict[str, float]:
    """Return γ of each Gaussian data site with one standard deviation for all data and draws."""
    noise = {}
    for name, site in trace.data_sites.items():
        fn = site.bare
        if isinstance(fn, Normal):
            entries = fn.scale.reshape(-1, *site.fn.event_shape)
            if (entries == entries[:1]).all():
                noise[name] = float(entries[0].mean())
    return noise


class _PerDatum(NamedTuple):
    """One site's numbers for b data: KL (b,), KL per dimension (b, L), the posterior mean's mean and variance over
    draws (b, L), usage (b, C), and whether the datum's entries are scored (b, L), None without a mask."""

    kl: Tensor
    kl_per_dimension: Tensor | None
    mean: Tensor | None
    spread: Tensor | None
    usage: Tensor | None
    scored: Tensor | None


def _measure(guide: Site, model: Site, leading: tuple[int, int]) -> _PerDatum:
    per_dimension = _diagonal_kl(guide.bare, model.bare)
    scored = _scored(guide)
    if per_dimension is not None:
        per_dimension = _by_datum(per_dimension, guide).mean(0)
        if scored is not None:
            per_dimension = torch.where(scored, per_dimension, 0.0)
        kl = per_dimension.sum(-1)
    else:
        kl = (guide.log_prob - model.log_prob).expand(leading).mean(0)
    mean = spread = usage = None
    if not guide.is_discrete:
        centres = _by_datum(_centre(guide), guide)
        mean, spread = centres.mean(0), centres.var(0)
    mixture = model.bare
    if isinstance(mixture, GaussianMixture):
        log_joint = mixture.mixture_distribution.logits
        log_joint = log_joint + mixture.component_distribution.log_prob(guide.drawn.unsqueeze(-2))
        usage = _by_datum(log_joint.softmax(-1), guide, event_dim=1).mean(0)
    elif isinstance(guide.bare, Categorical):
        usage = _by_datum(guide.bare.probs, guide, event_dim=1).mean(0)
    return _PerDatum(kl, per_dimension, mean, spread, usage, scored)


def _scored(site: Site) -> Tensor | None:
    """Return whether each entry of a datum is scored, (B, entries), None without a mask."""
    scored = site.scored_value
    return None if scored is None else scored[0].reshape(scored.shape[1], -1)


def _diagonal_kl(q: Any, p: Any) -> Tensor | None:
    """Return the divergence entry by entry, or None unless both are independent univariate Gaussians."""
    if not isinstance(q, Normal) or not isinstance(p, Normal):
        return None
    ratio = (q.scale**2 + (q.loc - p.loc) ** 2) / (2 * p.scale**2)
    return torch.log(p.scale / q.scale) + ratio - 0.5


def _centre(site: Site) -> Tensor:
    """Return the guide's mean, or its draws if the mean has no closed form."""
    try:
        return site.fn.mean
    except NotImplementedError:
        return site.drawn


def _by_datum(values: Tensor, site: Site, event_dim: int | None = None) -> Tensor:
    """Lay out one number per entry as (K, B, entries); other plates count as entries."""
    laid_out = site.lay_out(values, event_dim)
    return laid_out.flatten(2) if laid_out.dim() > 2 else laid_out.unsqueeze(-1)


def _summarise(parts: list[_PerDatum], num_particles: int) -> SiteReport:
    kl, per_dimension, mean, spread, usage, scored = (
        None if field[0] is None else torch.cat(field).double().cpu() for field in zip(*parts, strict=True)
    )
    assert kl is not None
    variance = active = None
    if mean is not None and spread is not None:
        variance = _variance(mean, spread / num_particles, scored)
        active = variance > ACTIVE_VARIANCE
    shares = None if usage is None else _shares(usage, scored)
    return SiteReport(
        kl=float(kl.mean()),
        kl_standard_error=float(kl.std() / math.sqrt(len(kl))),
        kl_per_dimension=None if per_dimension is None else per_dimension.mean(0),
        mean_variance=variance,
        active=active,
        usage=shares,
        perplexity=None if shares is None else float(torch.exp(-torch.special.xlogy(shares, shares).sum())),
    )


def _variance(mean: Tensor, noise: Tensor, scored: Tensor | None) -> Tensor:
    """Return the variance of posterior means over the data that have each entry, less their noise, (L,)."""
    if scored is None:
        return (mean.var(0) - noise.mean(0)).clamp(min=0)
    # An entry of one datum or none does not vary.
    count = scored.sum(0)
    centre = torch.where(scored > 0, mean, 0.0).sum(0) / count.clamp(min=1)
    squares = torch.where(scored > 0, (mean - centre) ** 2, 0.0).sum(0) / (count - 1).clamp(min=1)
    return (squares - torch.where(scored > 0, noise, 0.0).sum(0) / count.clamp(min=1)).clamp(min=0)


def _shares(usage: Tensor, scored: Tensor | None) -> Tensor:
    """Return mean responsibilities over the data of which anything is scored, (C,)."""
    if scored is None:
        return usage.mean(0)
    has = scored.amax(-1, keepdim=True) > 0
    return torch.where(has, usage, 0.0).sum(0) / has.sum().clamp(min=1)


def _describe(name: str, report: SiteReport) -> list[str]:
    lines = [f"{name}: KL {report.kl:.2f} ± {report.kl_standard_error:.2f} nats on average over the data."]
    if report.active is not None:
        active, size = int(report.active.sum()), len(report.active)
        lines.append(f"{name}: {active} of {size} units active (variance of the posterior mean over data above 0.01).")
        if active == 0:
            lines.append(
                f"{name}: the guide gives every datum the same posterior mean, and {name} says nothing about x "
                "(posterior collapse): train with a warm-up of β or less decoder noise γ."
            )
    if report.usage is not None and report.perplexity is not None:
        lines.append(
            f"{name}: {report.perplexity:.1f} of {len(report.usage)} components in use (perplexity of their mean "
            "responsibilities)."
        )
    return lines


def _describe_information(information: MutualInformation | None, kl: float | None) -> list[str]:
    if information is None:
        return []
    value, error, count, limit = information.value, information.standard_error, information.num_data, information.limit
    text = f"I(x; {', '.join(information.sites)}) under q is at least {value:.2f} ± {error:.2f} nats"
    text += f" and at most the KL, {kl:.2f}" if kl is not None else ""
    lines = [f"{text} (from {count} data; a lower bound in expectation, of at most log {count} = {limit:.2f})."]
    if limit - value < SATURATED:
        lines.append("Each draw identifies its datum: the information is above the limit of so many data.")
    return lines


def _describe_noise(noise: dict[str, float]) -> list[str]:
    lines = []
    for name, scale in noise.items():
        share = "cheaper" if scale < 1 else "dearer"
        times = scale**-2 if scale < 1 else scale**2
        lines.append(
            f"{name}: γ = {scale:.3g}, for the latents the same as unit noise with β = γ² = {scale**2:.3g}: beside "
            f"{name}'s squared error the divergence is {times:.3g} times {share} than with γ = 1."
        )
    return lines
