"""Conditions for the ratio of model and guide to be a weight: equal latents, masks, measures and supports."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from pyro_vae.pair.site import Site

__all__ = ["AUTOMATIC", "check_masks", "check_measures", "check_same_latents"]

AUTOMATIC = (
    "{} of Pyro's AutoGuides, which learn one posterior of a whole data set and no q(z | x) for each datum: write "
    "guide(self, x) with a network, e.g. pv.Conditional(encoder, pv.DiagonalGaussian(), (size,))"
)


def check_same_latents(guide: Mapping[str, Site], model: Mapping[str, Site]) -> None:
    """Refuse a guide whose sites are not the model's latent sites.

    Raises:
        ValueError: naming the sites that one of them lacks, or that one of them alone masks.
    """
    latents = {name for name, site in model.items() if not site.is_observed}
    _check_guide(guide)
    if missing := sorted(latents - set(guide)):
        for name in missing:
            whole = name.removesuffix("_unobserved")
            if whole != name and f"{whole}_observed" in model:
                raise ValueError(
                    f"the model makes the missing part of '{whole}' a latent, '{name}' (obs_mask=), which the guide "
                    "does not sample: mask the likelihood in its place, dist.Normal(loc, scale).mask(seen).to_event(1) "
                    "with obs=x, then impute"
                )
        raise ValueError(
            f"the model samples {missing}, the guide does not: their KL term would be missing from the ELBO; sample "
            "them in the guide too"
        )
    if extra := sorted(set(guide) - latents):
        raise ValueError(f"the guide samples {extra}, which is no latent site of the model; rename or remove it")
    # Their entries are compared once per call, by inspect; here only a mask without its counterpart is.
    if any((site.scored is None) != (model[name].scored is None) for name, site in guide.items()):
        check_masks(guide, model)


def _check_guide(guide: Mapping[str, Site]) -> None:
    """Refuse sites of a guide that are no draws of latents."""
    for name, site in guide.items():
        if site.is_factor:
            raise ValueError(
                f"the guide has a factor '{name}' (pyro.factor), and a weight with it estimates no density: add the "
                "term to the loss that trains the pair, in place of the guide"
            )
        if site.is_auxiliary:
            raise ValueError(AUTOMATIC.format(f"the guide's site '{name}' is that of one"))
        if site.is_observed:
            raise ValueError(f"the guide observes '{name}': only the model observes data; remove obs= from the guide")


def check_masks(guide: Mapping[str, Site], model: Mapping[str, Site]) -> None:
    """Refuse a latent that one program scores and the other masks: its log-densities would not cancel.

    Raises:
        ValueError: naming the site.
    """
    for name, site in guide.items():
        other = model[name]
        if site.scored is None and other.scored is None:
            continue
        ours, theirs = (
            torch.ones_like(site.value, dtype=torch.bool) if scored is None else scored.expand_as(site.value)
            for scored in (site.scored_value, other.scored_value)
        )
        if not torch.equal(ours, theirs):
            raise ValueError(
                f"site '{name}' is masked otherwise in the guide than in the model: a weight would hold one of its "
                "log-densities without the other; put the same mask on both"
            )


def check_measures(guide: Mapping[str, Site], model: Mapping[str, Site]) -> None:
    """Refuse a guide with a density where the model has a mass, or the reverse: their ratio is no weight.

    Raises:
        ValueError: for such a site, for a point mass outside the support of the model's site, and for a guide that
            covers another set than the prior.
    """
    for name, site in guide.items():
        other = model[name]
        if site.is_point_mass:
            if not bool(other.fn.support.check(site.drawn).all()):
                raise ValueError(
                    f"the guide's point mass at '{name}' lies outside the model's support, {other.fn.support}"
                )
        elif site.is_discrete != other.is_discrete:
            raise ValueError(
                f"site '{name}' is {'discrete' if other.is_discrete else 'continuous'} in the model but not in "
                "the guide: a mass over a density is no weight; give both the same kind of distribution"
            )
        else:
            _check_same_support(site, other)


def _check_same_support(site: Site, prior: Site) -> None:
    """Refuse a guide that misses a part of its prior's support, where nothing is drawn, or that leaves it.

    Densities outside their support are zero, NaN or, with Pyro's validation off, finite numbers without a meaning.
    Intervals are compared by their ends, other sets by draws.
    """
    covered, whole = site.interval, prior.interval
    if covered is None or whole is None:
        # Spheres, simplices and other sets: draws of the one must lie in the other.
        narrower = not bool(site.fn.support.check(prior.fn.sample()).all())
        wider = not bool(prior.fn.support.check(site.drawn).all())
    else:
        lower, upper = (torch.as_tensor(mine) - theirs for mine, theirs in zip(covered, whole, strict=True))
        # Two infinite ends give NaN, which is neither above nor below zero.
        narrower, wider = bool(((lower > 0) | (upper < 0)).any()), bool(((lower < 0) | (upper > 0)).any())
    if narrower or wider:
        fault = "never draws from a part of it" if narrower else "draws outside it, where weights are zero or undefined"
        raise ValueError(
            f"site '{site.name}': the guide's {site.family} has support {_set(site)}, the prior's {prior.family} "
            f"{_set(prior)}, and the guide {fault}; give both the same support, e.g. a "
            "LogNormal guide for a positive site, or the same family for both"
        )


def _set(site: Site) -> str:
    """Name a site's support: the first entry's ends for an interval."""
    if site.interval is None:
        return str(site.entry_support)
    low, high = (float(torch.as_tensor(end).flatten()[0]) for end in site.interval)
    return f"[{low:.4g}, {high:.4g}]"
