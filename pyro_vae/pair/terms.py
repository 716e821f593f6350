"""Log-densities of a pair per particle and datum."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

__all__ = ["LogTerms", "SiteTerms"]


class SiteTerms(NamedTuple):
    """One site's log-densities, each (K, B), in nats; ``log_guide`` is zero at an observed site."""

    log_model: Tensor
    log_guide: Tensor


@dataclass(frozen=True, eq=False)
class LogTerms:
    """Log-densities per particle and datum, each (K, B), in nats.

    Args:
        log_lik: sum over the data terms, i.e. the observed sites and the sites that the guide fixes to a point mass.
        log_prior: sum over the model's other latent sites.
        log_guide: sum over the guide's sites.
        latents: the sites of ``log_prior`` one by one, for objectives that treat them apart.

    >>> import torch
    >>> LogTerms(torch.zeros(2, 3), torch.ones(2, 3), torch.ones(2, 3)).log_weights.shape
    torch.Size([2, 3])
    """

    log_lik: Tensor
    log_prior: Tensor
    log_guide: Tensor
    latents: Mapping[str, SiteTerms] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Tensor]:
        raise TypeError("LogTerms is no tuple: read .log_lik, .log_prior, .log_guide and .latents by name")

    @property
    def log_weights(self) -> Tensor:
        """log p(x, z) − log q(z | x), (K, B)."""
        return self.log_lik + self.log_prior - self.log_guide
