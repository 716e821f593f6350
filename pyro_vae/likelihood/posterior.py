"""Draw from the posterior of the latents: weighted draws of a proposal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from pyro_vae.inspection import Inspection, inspect
from pyro_vae.inspection.arrays import takes_arrays
from pyro_vae.likelihood.blocks import single
from pyro_vae.likelihood.captured import Calls
from pyro_vae.likelihood.fitting.choice import CALLS_OF_A_FIT, Auto
from pyro_vae.likelihood.fitting.flat import unfit
from pyro_vae.pair.guided import with_guide
from pyro_vae.pair.modes import drawing, to_pair
from pyro_vae.pair.pair import Pair
from pyro_vae.pair.trace import trace_pair
from pyro_vae.runtime.memory import MEBIBYTE, chunk_sizes
from pyro_vae.runtime.scalars import whole
from pyro_vae.runtime.threads import one_at_a_time

__all__ = ["DrawsFrom", "Posterior", "fitted_draws", "guided", "posterior"]

# What weighted draws come from: the guide, proposals fitted to each datum, or a program in the guide's place.
DrawsFrom: TypeAlias = Literal["guide", "auto"] | Callable[..., Any]


class Posterior(NamedTuple):
    """Draws of a proposal: ``latents`` by site (K, B, …), and their ``log_weights`` (K, B) under p(z | x), in nats."""

    latents: dict[str, Tensor]
    log_weights: Tensor


@one_at_a_time
@takes_arrays
def posterior(
    pair: Pair,
    *batch: Tensor,
    num_particles: int = 100,
    memory: int = 512 * MEBIBYTE,
    seed: int | None = None,
    proposal: DrawsFrom = "guide",
) -> Posterior:
    """Draw latents from the guide, or from another proposal, with their importance weights for p(z | x).

    w_k = p(x, z_k) / r(z_k | x),   z_k ~ r(z | x)

    Args:
        pair: any pair.
        batch: ``x`` (B, …) and the pair's conditions.
        num_particles: K.
        memory: bytes for a chunk of data and particles, beside the result. Seeded draws depend on it.
        seed: of the draws; fresh entropy without one.
        proposal: r: "guide"; "auto" for mixtures fitted to each datum, as in :func:`~pyro_vae.log_likelihood`; or
            a program that is called as the pair's guide is.

    Returns:
        :class:`Posterior`; every latent has both axes K and B, point masses too.

    Raises:
        ValueError: for bad data, K < 1, a ``memory`` too small for one datum and one particle, a program that does not
            sample the model's latents, and "auto" for latents that no proposal can be fitted to.

    >>> import pyro_vae as pv
    >>> posterior(pv.models.LinearGaussianVAE(5, 2), torch.zeros(3, 5), num_particles=4).latents["z"].shape
    torch.Size([4, 3, 2])
    """
    num_particles = whole(num_particles, "num_particles")
    if num_particles < 1:
        raise ValueError(f"num_particles is {num_particles}; it counts draws per datum and must be at least 1")
    inspection = guided(pair, batch, proposal)
    pair, batch = inspection.pair, to_pair(inspection.pair, batch)

    def draw(chunk: tuple[Tensor, ...], size: int) -> Posterior:
        trace = trace_pair(pair, *chunk, num_particles=size)
        latents = {name: site.value for name, site in trace.guide.items()}
        return Posterior(latents, trace.terms.log_weights)

    columns = []
    with drawing(pair, seed):
        if proposal == "auto":
            return _joined(list(fitted_draws(inspection, batch, num_particles)), 1)
        data, particles = chunk_sizes(draw, batch, num_particles, memory)
        for start in range(0, len(batch[0]), data):
            chunk = tuple(tensor[start : start + data] for tensor in batch)
            sizes = (min(particles, num_particles - begin) for begin in range(0, num_particles, particles))
            columns.append(_joined([draw(chunk, size) for size in sizes], 0))
        return _joined(columns, 1)


def guided(pair: Pair, batch: tuple[Tensor, ...], proposal: DrawsFrom) -> Inspection:
    """Return the inspection of a pair whose guide is the proposal, or its own.

    Raises:
        ValueError: as for :func:`posterior`.
    """
    # Faults of the pair are told first: what is told then is the proposal's.
    inspection = inspect(pair, batch)
    if callable(proposal):
        try:
            return inspect(with_guide(pair, proposal), batch)
        except ValueError as error:
            raise ValueError(f"the proposal, in the guide's place, does not fit the pair's model: {error}") from error
    if proposal not in ("guide", "auto"):
        raise ValueError(f"proposal is {proposal!r}; it must be 'guide', 'auto' or a program like the guide")
    if proposal == "auto" and (reason := unfit(inspection.trace)):
        raise ValueError(f"no proposal can be fitted ({reason}): use proposal='guide', or a program of your own")
    return inspection


def fitted_draws(inspection: Inspection, batch: tuple[Tensor, ...], num_particles: int) -> Iterator[Posterior]:
    """Yield the weighted draws of each datum from the mixture fitted to it.

    Args:
        inspection: of the pair, which is in evaluation mode.
        batch: the data and their conditions, on the pair's device.
        num_particles: K.
    """
    calls = Calls(inspection.pair, "auto", CALLS_OF_A_FIT * len(batch[0]))
    auto = Auto(inspection, calls, num_particles, None)
    for row in range(len(batch[0])):
        datum = single(batch, row)
        chosen = auto(datum)
        yield Posterior(*chosen.proposal.draws((*datum, *chosen.parts), num_particles))


def _joined(parts: list[Posterior], dim: int) -> Posterior:
    latents = {name: torch.cat([part.latents[name] for part in parts], dim) for name in parts[0].latents}
    return Posterior(latents, torch.cat([part.log_weights for part in parts], dim))
