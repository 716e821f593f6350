"""Mutual information between data and latents under the guide."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_vae.pair.modes import chunks, device_of
from pyro_vae.pair.pair import Pair
from pyro_vae.pair.trace import run_guide
from pyro_vae.runtime.memory import CHUNK

__all__ = ["MutualInformation", "mutual_information"]

# Data at most: cost grows with their square, the limit of 6.2 nats = log 512 with their logarithm.
LARGEST = 512
# Draws per chunk of scores.
DRAWS = 64


class MutualInformation(NamedTuple):
    """An estimate of I(x; z) under q, for all latent sites together.

    Args:
        value: in expectation at most I(x; z), and never above ``limit``, in nats.
        standard_error: of ``value``, in nats.
        num_data: B.
        limit: log B.
        sites: names of the latent sites.
    """

    value: float
    standard_error: float
    num_data: int
    limit: float
    sites: tuple[str, ...]


def mutual_information(pair: Pair, batch: tuple[Tensor, ...]) -> MutualInformation | None:
    """Estimate I(x; z) under q with the aggregate posterior of the batch.

    Î = (1/B) Σ_i [log q(z_i | x_i) − log (1/B) Σ_j q(z_i | x_j)],   z_i ~ q(z | x_i)

    The aggregate posterior q(z) is a mixture over the batch. No prior is involved: it cancels in

    I(x; z) = E KL(q(z | x) ‖ p(z)) − KL(q(z) ‖ p(z))

    Given the batch, Î is unbiased for the information between z and the index of a datum, at most log B. Over batches
    this is at most I(x; z): Î is biased downwards, and saturates at log B. For I far below log B the bias is about
    χ²/2B, with χ² that of q(z | x) from q(z).

    Args:
        pair: any pair, in evaluation mode.
        batch: ``x`` (N, …) and the pair's conditions, on the pair's device. At most 512 rows are used, drawn at random.

    Returns:
        :class:`MutualInformation`. None for a guide without latents except point masses, for a guide that can score
        only its latest draws, e.g. a planar flow, and for one that masks latents: the posteriors of two data are then
        densities of other entries.

    Reference:
        Hoffman and Johnson (2016), ELBO surgery, NIPS workshop on approximate inference; Poole, Ozair, van den Oord,
        Alemi and Tucker (2019), On variational bounds of mutual information, ICML, for the bias.
    """
    chosen = torch.randperm(len(batch[0]))[:LARGEST].to(device_of(pair))
    batch = tuple(tensor[chosen] for tensor in batch)
    draws = _draws(pair, batch)
    if not draws or any(site.scored is not None for site in run_guide(pair, *batch, num_particles=1).values()):
        return None
    try:
        scores = torch.cat([_scores(pair, batch, draws, begin) for begin in range(0, len(chosen), DRAWS)])
    except (NotImplementedError, KeyError):
        # A transform without an inverse, or with a cached inverse of its latest draw alone.
        return None
    limit = math.log(len(chosen))
    gains = scores.diagonal() - torch.logsumexp(scores, 1) + limit
    return MutualInformation(
        value=float(gains.mean()),
        standard_error=float(gains.std() / math.sqrt(len(gains))),
        num_data=len(gains),
        limit=limit,
        sites=tuple(draws),
    )


def _draws(pair: Pair, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Return a draw of each latent site for each datum, with data at the dimension of particles."""
    parts: dict[str, list[Tensor]] = {}
    for chunk in chunks(batch, CHUNK):
        for name, site in run_guide(pair, *chunk, num_particles=1).items():
            if not site.is_point_mass:
                parts.setdefault(name, []).append(site.as_drawn(site.value.transpose(0, 1)))
    return {name: torch.cat(tensors) for name, tensors in parts.items()}


def _scores(pair: Pair, batch: tuple[Tensor, ...], draws: dict[str, Tensor], begin: int) -> Tensor:
    """Return log q(z_i | x_j) of some draws under every datum, (i, j), in float64."""
    some = {name: value[begin : begin + DRAWS] for name, value in draws.items()}
    count = len(next(iter(some.values())))
    columns = []
    for chunk in chunks(batch, CHUNK):
        sites = run_guide(pair, *chunk, num_particles=count, values=some)
        terms = torch.stack([sites[name].log_prob.expand(count, len(chunk[0])) for name in some])
        columns.append(terms.double().sum(0))
    return torch.cat(columns, 1)
