"""The documents' losses in closed form.

``docs/mathematics.md`` maps each equation of the source documents to its function.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

from pyro_vae.distributions.mixture_kl import MixtureKL, convex_kl_bound
from pyro_vae.inspection.arrays import takes_arrays
from pyro_vae.pair.modes import drawing, to_pair
from pyro_vae.pair.pair import Pair, programs_after
from pyro_vae.pair.trace import trace_pair
from pyro_vae.runtime.threads import one_at_a_time

__all__ = ["AnalyticLoss", "HasClosedForm", "analytic_loss", "has_closed_form"]


class AnalyticLoss(Protocol):
    """A ``NamedTuple`` with one field (B,) per site, and their sum."""

    @property
    def total(self) -> Tensor:
        """−ELBO per datum, (B,), in nats."""
        ...

    def _asdict(self) -> dict[str, Tensor]: ...


@runtime_checkable
class HasClosedForm(Protocol):
    """A pair with a method for its loss in closed form."""

    def closed_form(self, *batch: Tensor, num_particles: int, mixture_kl: MixtureKL) -> AnalyticLoss: ...


def has_closed_form(pair: Pair) -> bool:
    """Return whether a pair has a closed form of its model and guide, not one of a class with other programs."""
    return isinstance(pair, HasClosedForm) and not programs_after(pair, "closed_form")


@one_at_a_time
@takes_arrays
def analytic_loss(
    pair: Pair, *batch: Tensor, num_particles: int = 1, mixture_kl: MixtureKL = convex_kl_bound
) -> AnalyticLoss:
    """Return the documents' closed-form −ELBO of a batch, term by term.

    Divergences are closed. Reconstruction terms are averaged over the guide's draws. The divergence from a mixture
    prior is ``mixture_kl``, by default the documents' upper bound; the total is then an upper bound too.

    Args:
        pair: a pair with a closed form: VAE, SRVAE.
        batch: ``x`` (B, …) and the pair's conditions.
        num_particles: K, draws of the reconstruction terms.
        mixture_kl: :func:`convex_kl_bound`, :func:`variational_kl_bound` or :func:`monte_carlo_kl`.

    Returns:
        One field (B,) per site of the model, named as the site, and ``total``, in nats.

    Raises:
        ValueError: for a pair without a closed form, one that inherits it and redefines model or guide, for K < 1, and
            for masks and sites of the model that the closed form does not see.
    """
    if num_particles < 1:
        raise ValueError(f"num_particles is {num_particles}; it counts draws per datum and must be at least 1")
    if not isinstance(pair, HasClosedForm):
        raise ValueError(
            f"{type(pair).__name__} has no closed form: give it a method closed_form, or train with Trace_ELBO"
        )
    if changed := programs_after(pair, "closed_form"):
        raise ValueError(
            f"{type(pair).__name__} inherits closed_form from a class with another {' and another '.join(changed)}: "
            "define closed_form beside it, or train with Trace_ELBO and read pv.site_terms"
        )
    batch = to_pair(pair, batch)
    sites = _check_sites(pair, batch)
    loss = pair.closed_form(*batch, num_particles=num_particles, mixture_kl=mixture_kl)
    if left_out := sorted(sites - set(loss._asdict())):
        raise ValueError(
            f"the model has the sites {left_out}, of which the closed form of {type(pair).__name__} has no term: give "
            "the pair a closed_form with a field for each site, or train with Trace_ELBO"
        )
    return loss


def _check_sites(pair: Pair, batch: tuple[Tensor, ...]) -> set[str]:
    """Refuse masks around the model's sites, and sites of all data; return the sites' names."""
    with drawing(pair, seed=0):
        model = trace_pair(pair, *(tensor[:1] for tensor in batch)).model
    for site in model.values():
        site.check_plates()
        if site.handler_mask is not None:
            raise ValueError(
                f"site '{site.name}' is masked by poutine.mask, which closed_form does not see: mask the distribution "
                "that both use, or train with Trace_ELBO"
            )
    return set(model)
