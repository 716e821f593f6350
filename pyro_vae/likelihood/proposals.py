"""Proposals: distributions that an importance-sampling estimate draws the latents from."""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from pyro_vae.inspection import Inspection
from pyro_vae.pair.pair import Pair
from pyro_vae.pair.site import ExactSite, Site, exact
from pyro_vae.pair.trace import PairTrace, run_model, trace_pair
from pyro_vae.pair.weights import Rounding, rounding_of

__all__ = ["PILOT", "GuideProposal", "PriorProposal", "Proposal", "described"]

# Draws of a pilot, which chooses a proposal and is thrown away.
PILOT = 400


class Proposal(abc.ABC):
    """Draw latents of a pair and weigh them: w = p(x, z) / r(z), z ~ r(z | x).

    Args:
        inspection: of the pair.
    """

    name: ClassVar[str]
    """Name for the keys of saved chunks."""

    records: ClassVar[bool] = True
    """Whether :meth:`log_weights` is one recordable function of tensors."""

    def __init__(self, inspection: Inspection) -> None:
        self.pair: Pair = inspection.pair

    @abc.abstractmethod
    def log_weights(self, batch: tuple[Tensor, ...], num_particles: int) -> Tensor:
        """Return log w of K fresh draws per datum, (K, B), in nats, in float64.

        Args:
            batch: ``x`` (B, …), the pair's conditions, and what a proposal fitted to the datum is made of.
            num_particles: K.
        """

    def pilot(self, *batch: Tensor) -> tuple[Tensor, ...]:
        """Return log w of a pilot's draws of one datum, (400,)."""
        return (self.log_weights(batch, PILOT).expand(PILOT, 1)[:, 0],)

    @abc.abstractmethod
    def draws(self, batch: tuple[Tensor, ...], num_particles: int) -> tuple[dict[str, Tensor], Tensor]:
        """Return weighted draws of the model's latents (K, B, …), by name, and their log-weights (K, B), in nats.

        Args:
            batch, num_particles: as for :meth:`log_weights`.
        """

    @abc.abstractmethod
    def site_log_densities(self, batch: tuple[Tensor, ...], num_particles: int) -> dict[str, Tensor]:
        """Return the log-densities that :meth:`log_weights` sums at the same seed, (K, B), by the site's description.

        An estimate names the site to blame by them.

        Args:
            batch, num_particles: as for :meth:`log_weights`.
        """

    @abc.abstractmethod
    def rounding(self, inspection: Inspection) -> Rounding:
        """Return the rounding of :meth:`log_weights`."""

    @abc.abstractmethod
    def quantity(self, inspection: Inspection) -> str:
        """Return the name of the quantity that the weights estimate."""

    @abc.abstractmethod
    def beside(self, inspection: Inspection) -> str:
        """Return a clause on the sites that the quantity concerns beside x; empty for log p(x) or a bound on it."""


class GuideProposal(Proposal):
    """The pair's guide: w = p(x, z) / q(z | x)."""

    name = "guide"

    def log_weights(self, batch: tuple[Tensor, ...], num_particles: int) -> Tensor:
        terms = self._trace(batch, num_particles).terms
        # A draw where the guide's density is infinite would count as impossible.
        return torch.where(terms.log_guide.isposinf(), math.nan, terms.log_weights)

    def draws(self, batch: tuple[Tensor, ...], num_particles: int) -> tuple[dict[str, Tensor], Tensor]:
        trace = trace_pair(self.pair, *batch, num_particles=num_particles)
        return {name: site.value for name, site in trace.guide.items()}, trace.terms.log_weights

    def site_log_densities(self, batch: tuple[Tensor, ...], num_particles: int) -> dict[str, Tensor]:
        trace = self._trace(batch, num_particles)
        return described("guide", trace.guide) | described("model", trace.model)

    def rounding(self, inspection: Inspection) -> Rounding:
        trace = inspection.trace
        return rounding_of([*exact(trace.guide).values(), *exact(trace.model).values()])

    def quantity(self, inspection: Inspection) -> str:
        return inspection.quantity

    def beside(self, inspection: Inspection) -> str:
        return inspection.beside

    def _trace(self, batch: tuple[Tensor, ...], num_particles: int) -> PairTrace:
        trace = trace_pair(self.pair, *batch, num_particles=num_particles)
        return PairTrace(exact(trace.guide), exact(trace.model), trace.data)


class PriorProposal(Proposal):
    """The model's prior: w = p(x | z)."""

    name = "prior"

    def log_weights(self, batch: tuple[Tensor, ...], num_particles: int) -> Tensor:
        return torch.stack([site.log_prob for site in self._observed(batch, num_particles).values()]).sum(0)

    def draws(self, batch: tuple[Tensor, ...], num_particles: int) -> tuple[dict[str, Tensor], Tensor]:
        sites = exact(run_model(self.pair, *batch, num_particles=num_particles))
        observed = [site.log_prob for site in sites.values() if site.is_observed]
        return {n: s.value for n, s in sites.items() if not s.is_observed}, torch.stack(observed).sum(0)

    def site_log_densities(self, batch: tuple[Tensor, ...], num_particles: int) -> dict[str, Tensor]:
        return described("model", self._observed(batch, num_particles))

    def rounding(self, inspection: Inspection) -> Rounding:
        return rounding_of(site for site in exact(inspection.trace.model).values() if site.is_observed)

    def quantity(self, inspection: Inspection) -> str:
        return inspection.prior_quantity

    def beside(self, inspection: Inspection) -> str:
        return inspection.prior_beside

    def _observed(self, batch: tuple[Tensor, ...], num_particles: int) -> dict[str, ExactSite]:
        sites = exact(run_model(self.pair, *batch, num_particles=num_particles))
        return {name: site for name, site in sites.items() if site.is_observed}


def described(program: str, sites: Mapping[str, Site]) -> dict[str, Tensor]:
    """Return the log-densities of a program's sites, (K, B), by a description for messages."""
    return {f"the {program}'s site '{name}'": site.log_prob for name, site in sites.items()}
