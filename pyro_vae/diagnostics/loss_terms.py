"""Each term of a loss, sampled and in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_vae.distributions.mixture_kl import monte_carlo_kl, variational_kl_bound
from pyro_vae.distributions.mixtures import GaussianMixture
from pyro_vae.objectives.closed_form import analytic_loss
from pyro_vae.pair.modes import drawing, to_pair
from pyro_vae.pair.pair import Pair
from pyro_vae.pair.trace import site_terms

__all__ = ["loss_terms"]

# A standard error from 20 repetitions has a relative error of a sixth.
REPETITIONS = 20
PARTICLES = 20


def loss_terms(pair: Pair, *batch: Tensor, seed: int = 0) -> dict[str, dict[str, tuple[float, float]]]:
    """Return each term of −ELBO by sampling, as in ``Trace_ELBO``, and in closed form.

    Args:
        pair: a pair with a closed form.
        batch: ``x`` and the pair's conditions.
        seed: of the draws; columns have separate draws.

    Returns:
        (mean over data, Monte Carlo standard error), in nats, by column, then by site and "total". A mixture prior has
        a column for each of its divergences: Monte Carlo, variational, convex.
    """

    def sampled() -> dict[str, Tensor]:
        terms = site_terms(pair, *batch, num_particles=PARTICLES)
        return {name: (term.log_guide - term.log_model).mean() for name, term in terms.items()}

    def closed(**divergence: Any) -> Callable[[], dict[str, Tensor]]:
        def terms() -> dict[str, Tensor]:
            loss = analytic_loss(pair, *batch, num_particles=PARTICLES, **divergence)
            return {name: value.mean() for name, value in loss._asdict().items()}

        return terms

    columns: dict[str, Callable[[], dict[str, Tensor]]] = {"Trace_ELBO": sampled}
    prior = getattr(pair, "prior", None)
    if prior is not None and isinstance(prior(), GaussianMixture):
        columns["closed, Monte Carlo"] = closed(mixture_kl=monte_carlo_kl)
        columns["closed, variational"] = closed(mixture_kl=variational_kl_bound)
        columns["closed, convex"] = closed()
    else:
        columns["closed form"] = closed()
    batch = to_pair(pair, batch)
    with drawing(pair, seed):
        return {name: _repeated(column) for name, column in columns.items()}


def _repeated(terms: Callable[[], dict[str, Tensor]]) -> dict[str, tuple[float, float]]:
    rows = [terms() for _ in range(REPETITIONS)]
    values = {name: torch.stack([row[name] for row in rows]).double() for name in rows[0]}
    values["total"] = torch.stack(list(values.values())).sum(0)
    return {name: (float(v.mean()), float(v.std() / math.sqrt(REPETITIONS))) for name, v in values.items()}
