"""A model and a guide over the same latents, and their log-densities.

Import from here to write an estimator. :func:`trace_pair` runs a pair's guide and model. :class:`Site` reads a
sample site.
"""

from pyro_vae.pair.pair import Pair
from pyro_vae.pair.site import Site
from pyro_vae.pair.terms import LogTerms, SiteTerms
from pyro_vae.pair.trace import PairTrace, log_terms, run_guide, run_model, site_terms, trace_pair
from pyro_vae.pair.weights import WeightSums, weight_sums

__all__ = [
    "LogTerms",
    "Pair",
    "PairTrace",
    "Site",
    "SiteTerms",
    "WeightSums",
    "log_terms",
    "run_guide",
    "run_model",
    "site_terms",
    "trace_pair",
    "weight_sums",
]
