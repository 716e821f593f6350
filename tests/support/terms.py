"""Log-terms as a tuple, for comparisons."""

from __future__ import annotations

from torch import Tensor

from pyro_vae.pair.terms import LogTerms


def parts(terms: LogTerms) -> tuple[Tensor, Tensor, Tensor]:
    return terms.log_lik, terms.log_prior, terms.log_guide
