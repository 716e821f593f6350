"""The documents' losses in closed form.

``docs/mathematics.md`` maps each equation of the source documents to its function.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

from pyro_vae.distributions.mixture_kl import MixtureKL, convex_kl_bound
from pyro_vae.pair.modes import to_pair
from pyro_vae.pair.pair import Pair

__all__ = ["AnalyticLoss", "HasClosedForm", "analytic_loss"]


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
        ValueError: for a pair without a closed form, and for K < 1.
    """
    if num_particles < 1:
        raise ValueError(f"num_particles is {num_particles}; it counts draws per datum and must be at least 1")
    if not isinstance(pair, HasClosedForm):
        raise ValueError(
            f"{type(pair).__name__} has no closed form: give it a method closed_form, or train with Trace_ELBO"
        )
    return pair.closed_form(*to_pair(pair, batch), num_particles=num_particles, mixture_kl=mixture_kl)
