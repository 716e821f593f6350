"""Deep latent-variable models as readable Pyro model/guide pairs, with log-likelihoods that can be checked."""

from pyro_vae import data, models, objectives, testing
from pyro_vae._version import __version__
from pyro_vae.conditionals.categorical import GumbelSoftmax, OneHotPrior
from pyro_vae.conditionals.conditional import Conditional, Head
from pyro_vae.conditionals.corruptions import BitFlip, GaussianNoise
from pyro_vae.conditionals.flows import FlowPosterior, FlowPrior
from pyro_vae.conditionals.likelihoods import Bernoulli, ContinuousBernoulli, DiscretisedLogistic, Gaussian
from pyro_vae.conditionals.posteriors import DiagonalGaussian, FreeGaussian, FullGaussian
from pyro_vae.conditionals.priors import MixtureOfGaussians, StandardNormal
from pyro_vae.conditionals.scales import BatchOptimalScale, FixedScale, LearnedScale
from pyro_vae.diagnostics.arviz_export import to_arviz, to_elpd
from pyro_vae.diagnostics.collapse import CollapseReport, SiteReport, collapse_report
from pyro_vae.diagnostics.disentanglement import beta_vae_metric, latent_means, mutual_information_gap
from pyro_vae.diagnostics.inference_gap import InferenceGap, inference_gap
from pyro_vae.diagnostics.mutual_information import MutualInformation
from pyro_vae.distributions.flow import Reversal, Sylvester
from pyro_vae.distributions.mixture_kl import convex_kl_bound, monte_carlo_kl, variational_kl_bound
from pyro_vae.likelihood.ais.annealing import (
    AnnealedLogLikelihood,
    BidirectionalLogLikelihood,
    annealed_log_likelihood,
    bidirectional_log_likelihood,
)
from pyro_vae.likelihood.estimate import LogLikelihood
from pyro_vae.likelihood.importance import log_likelihood, naive_log_likelihood
from pyro_vae.likelihood.posterior import posterior
from pyro_vae.networks.annealed import Annealed, advance
from pyro_vae.objectives.closed_form import AnalyticLoss, analytic_loss
from pyro_vae.objectives.dreg import DReG
from pyro_vae.objectives.total_correlation import DivergenceSplit, TotalCorrelationELBO, divergence_split
from pyro_vae.pair.pair import Pair
from pyro_vae.pair.terms import LogTerms, SiteTerms
from pyro_vae.pair.trace import log_terms, site_terms
from pyro_vae.predict.generate import generate
from pyro_vae.predict.imputation import impute
from pyro_vae.predict.reconstruction import reconstruct
from pyro_vae.predict.super_resolution import super_resolve
from pyro_vae.training.em import ExpectationMaximisation, em
from pyro_vae.training.fit import Run, fit

__all__ = [
    "AnalyticLoss",
    "Annealed",
    "AnnealedLogLikelihood",
    "BatchOptimalScale",
    "Bernoulli",
    "BidirectionalLogLikelihood",
    "BitFlip",
    "CollapseReport",
    "Conditional",
    "ContinuousBernoulli",
    "DReG",
    "DiagonalGaussian",
    "DiscretisedLogistic",
    "DivergenceSplit",
    "ExpectationMaximisation",
    "FixedScale",
    "FlowPosterior",
    "FlowPrior",
    "FreeGaussian",
    "FullGaussian",
    "Gaussian",
    "GaussianNoise",
    "GumbelSoftmax",
    "Head",
    "InferenceGap",
    "LearnedScale",
    "LogLikelihood",
    "LogTerms",
    "MixtureOfGaussians",
    "MutualInformation",
    "OneHotPrior",
    "Pair",
    "Reversal",
    "Run",
    "SiteReport",
    "SiteTerms",
    "StandardNormal",
    "Sylvester",
    "TotalCorrelationELBO",
    "__version__",
    "advance",
    "analytic_loss",
    "annealed_log_likelihood",
    "beta_vae_metric",
    "bidirectional_log_likelihood",
    "collapse_report",
    "convex_kl_bound",
    "data",
    "divergence_split",
    "em",
    "fit",
    "generate",
    "impute",
    "inference_gap",
    "latent_means",
    "log_likelihood",
    "log_terms",
    "models",
    "monte_carlo_kl",
    "mutual_information_gap",
    "naive_log_likelihood",
    "objectives",
    "posterior",
    "reconstruct",
    "site_terms",
    "super_resolve",
    "testing",
    "to_arviz",
    "to_elpd",
    "variational_kl_bound",
]
