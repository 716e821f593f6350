"""The sites that a model observes beside ``x``: labels that it is given, and other data."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_vae.inspection.contract.checks import probe
from pyro_vae.pair.modes import drawing
from pyro_vae.pair.pair import Pair
from pyro_vae.pair.site import Site
from pyro_vae.pair.trace import run_model, site_of_x

__all__ = ["dependent_on_draws", "dependent_on_x", "find_x", "model_on_few"]


def model_on_few(pair: Pair, *batch: Tensor) -> tuple[dict[str, Site], tuple[Tensor, ...]]:
    """Run the model on three data at most; return its sites and these data."""
    few = probe(batch)
    with drawing(pair, seed=0):
        return run_model(pair, *few), few


def find_x(pair: Pair, *batch: Tensor) -> Site:
    """Return the site that observes ``x``, from a run of the model on three data at most."""
    model, few = model_on_few(pair, *batch)
    return site_of_x(model, few[0])


def dependent_on_draws(pair: Pair, *batch: Tensor) -> tuple[str, ...]:
    """Return the observed sites, except that of ``x``, whose distribution changes with the latents or with x.

    Given a value of such a site the latents follow a posterior, and draws from their priors do not. A label at the
    root of the model is none of them.

    Args:
        pair: any pair.
        batch: ``x`` and the pair's conditions, on the pair's device.
    """
    return _changing(pair, batch, latents=True)


def dependent_on_x(pair: Pair, *batch: Tensor) -> tuple[str, ...]:
    """Return the observed sites whose distribution changes with x at the same latents."""
    return _changing(pair, batch, latents=False)


def _changing(pair: Pair, batch: tuple[Tensor, ...], *, latents: bool) -> tuple[str, ...]:
    few = probe(batch)
    x = find_x(pair, *few).name
    runs: list[dict[str, Site]] = []
    for seed in (1, 2):
        held = (
            {name: site.drawn for name, site in runs[0].items() if not site.is_observed and name != x} if runs else {}
        )
        with drawing(pair, seed):
            runs.append(run_model(pair, *few, values={} if latents else held, draw=(x,)))
    first, second = runs
    others = [name for name, site in first.items() if site.is_observed and not site.is_factor]
    return tuple(name for name in others if not torch.equal(_density(first[name]), _density(second[name])))


def _density(site: Site) -> Tensor:
    """Return the log-density of the observation, whether a mask scores it or not."""
    log_prob: Tensor = site.bare.log_prob(site.drawn)
    return log_prob
