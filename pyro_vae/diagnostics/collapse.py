"""What a trained pair does with its latents: how much they carry, which lie idle, which components are used."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Categorical, Normal

from pyro_vae.conditionals.scales import Scale
from pyro_vae.diagnostics.mutual_information import MutualInformation, mutual_information
from pyro_vae.distributions.mixtures import GaussianMixture
from pyro_vae.pair.inspection import inspect
from pyro_vae.pair.modes import device_of, evaluation, to_pair
from pyro_vae.pair.pair import Pair
from pyro_vae.pair.site import Site
from pyro_vae.pair.trace import PairTrace, trace_pair
from pyro_vae.runtime.memory import CHUNK
from pyro_vae.runtime.random_state import own_random_state

__all__ = ["CollapseReport", "SiteReport", "collapse_report", "noise_modules"]

# A unit is active when its posterior mean varies over the data by more than this (Burda et al., 2016, section 5.2).
ACTIVE_VARIANCE = 0.01
# Nats from log B at which the estimated information is as good as at it.
SATURATED = 0.1


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
    """``sites`` by name, what they carry together, and plain ``sentences`` on what it means.

    ``mutual_information`` is that of x and all latents under q, a lower bound in expectation; None for a guide that
    cannot score values which it has not drawn. ``noise`` holds γ, averaged over entries, by data site, where that is
    Gaussian with a standard deviation that is the same for every datum.
    """

    sites: dict[str, SiteReport]
    mutual_information: MutualInformation | None
    noise: dict[str, float]
    sentences: tuple[str, ...]

    def __repr__(self) -> str:
        return "\n".join(self.sentences)

    def record(self) -> dict[str, Any]:
        """Return the report as numbers, lists and strings, fit for JSON."""
        sites = {name: {k: _plain(v) for k, v in site._asdict().items()} for name, site in self.sites.items()}
        information = self.mutual_information
        return {
            "sites": sites,
            "mutual_information": None if information is None else information._asdict(),
            "noise": self.noise,
            "sentences": list(self.sentences),
        }


def collapse_report(pair: Pair, *batch: Tensor, num_particles: int = 10, seed: int | None = None) -> CollapseReport:
    """Report what each latent site carries about the data.

    KL is closed per dimension for diagonal Gaussians, given the draws of earlier sites, and Monte Carlo elsewhere. The
    variance of the posterior mean is corrected for what a finite number of draws adds to it. The mutual information is
    estimated with the aggregate posterior of at most 512 of the data, as
    :func:`~pyro_vae.information.mutual_information` states.

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
    device, batch = device_of(pair), to_pair(pair, batch)
    collected: dict[str, list[_Part]] = {}
    noise: dict[str, float] = {}
    with evaluation(pair), torch.inference_mode(False), torch.no_grad(), own_random_state(seed, device):
        for rows in torch.arange(len(batch[0]), device=device).split(CHUNK):
            trace = trace_pair(pair, *(tensor[rows] for tensor in batch), num_particles=num_particles)
            for name, site in trace.latents.items():
                collected.setdefault(name, []).append(_look_at(site, trace.model[name], (num_particles, len(rows))))
            # Shared by all data, so that the last chunk has it too.
            noise = _noise(trace)
        information = mutual_information(pair, batch)
    reports = {name: _summarise(parts, num_particles) for name, parts in collected.items()}
    lines = [line for name, report in reports.items() for line in _describe(name, report)]
    # A prior that sees the data, through a point mass or a condition, bounds another information than this one.
    total = sum(report.kl for report in reports.values()) if not trace.point_masses and len(batch) == 1 else None
    lines += _describe_information(information, total) + _describe_noise(noise)
    return CollapseReport(reports, information, noise, tuple(lines))


def noise_modules(pair: Pair, *batch: Tensor) -> dict[str, str]:
    """Return the module that holds γ, such as a :class:`~pyro_vae.LearnedScale`, by the data site that it serves.

    Args:
        pair: any pair.
        batch: a few data and their conditions.

    Returns:
        Names as in ``pair.named_modules()``, by site; scales of latent sites are left out.
    """
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda module, inputs, output: outputs.__setitem__(name, output)

    hooks = [m.register_forward_hook(keep(name)) for name, m in pair.named_modules() if isinstance(m, Scale)]
    try:
        with evaluation(pair), own_random_state(0, device_of(pair)):
            trace = trace_pair(pair, *to_pair(pair, tuple(tensor[:2] for tensor in batch)))
    finally:
        for hook in hooks:
            hook.remove()
    # A distribution keeps an expanded view of the scale that it was given.
    return {
        site: module
        for site, fn in ((name, site.bare) for name, site in trace.data_sites.items())
        for module, output in outputs.items()
        if isinstance(fn, Normal) and fn.scale.data_ptr() == output.data_ptr()
    }


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, Tensor) else value


def _noise(trace: PairTrace) -> dict[str, float]:
    """Return γ of each data site that is Gaussian with one standard deviation for all data and draws."""
    noise = {}
    for name, site in trace.data_sites.items():
        fn = site.bare
        if isinstance(fn, Normal):
            entries = fn.scale.reshape(-1, *site.fn.event_shape)
            if (entries == entries[:1]).all():
                noise[name] = float(entries[0].mean())
    return noise


class _Part(NamedTuple):
    """One site on a chunk of b data: KL (b,), per dimension (b, L), mean and variance over draws of the posterior mean
    (b, L), usage (b, C)."""

    kl: Tensor
    per_dimension: Tensor | None
    mean: Tensor | None
    spread: Tensor | None
    usage: Tensor | None


def _look_at(guide: Site, model: Site, leading: tuple[int, int]) -> _Part:
    per_dimension = _diagonal_kl(guide.bare, model.bare)
    if per_dimension is not None:
        per_dimension = _by_datum(per_dimension, guide).mean(0)
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
    return _Part(kl, per_dimension, mean, spread, usage)


def _diagonal_kl(q: Any, p: Any) -> Tensor | None:
    """Return the divergence entry by entry, or None unless both are independent univariate Gaussians."""
    if not isinstance(q, Normal) or not isinstance(p, Normal):
        return None
    ratio = (q.scale**2 + (q.loc - p.loc) ** 2) / (2 * p.scale**2)
    return torch.log(p.scale / q.scale) + ratio - 0.5


def _centre(site: Site) -> Tensor:
    """Return the posterior's mean, or its draws where no mean is known."""
    try:
        return site.fn.mean
    except NotImplementedError:
        return site.drawn


def _by_datum(values: Tensor, site: Site, event_dim: int | None = None) -> Tensor:
    """Lay values of one number per entry out as (K, B, entries), plates of the pair's own among the entries."""
    return site.lay_out(values, event_dim).flatten(2)


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


def _describe_information(information: MutualInformation | None, kl: float | None) -> list[str]:
    if information is None:
        return []
    value, error, count, limit = information.value, information.standard_error, information.num_data, information.limit
    text = f"I(x; {', '.join(information.sites)}) under q is at least {value:.2f} ± {error:.2f} nats"
    text += f" and at most the KL, {kl:.2f}" if kl is not None else ""
    lines = [f"{text} (from {count} data; a lower bound in expectation, of at most log {count} = {limit:.2f})."]
    if limit - value < SATURATED:
        lines.append("Each draw tells which datum it is of: the information is above what so many data can show.")
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
