"""Deep latent-variable models as readable Pyro model/guide pairs, with log-likelihoods that can be checked."""

from pyro_vae import data, models, objectives, testing
from pyro_vae._version import __version__
from pyro_vae.ais import (
    AnnealedLogLikelihood,
    BidirectionalLogLikelihood,
    annealed_log_likelihood,
    bidirectional_log_likelihood,
)
from pyro_vae.analytic import AnalyticLoss, analytic_loss
from pyro_vae.annealing import Annealed, advance
from pyro_vae.categorical import GumbelSoftmax, OneHotPrior
from pyro_vae.conditionals import (
    Bernoulli,
    Conditional,
    ContinuousBernoulli,
    DiagonalGaussian,
    DiscretisedLogistic,
    FreeGaussian,
    FullGaussian,
    Gaussian,
    Head,
    MixtureOfGaussians,
    StandardNormal,
)
from pyro_vae.corruptions import BitFlip, GaussianNoise
from pyro_vae.diagnostics import CollapseReport, SiteReport, collapse_report
from pyro_vae.disentanglement import beta_vae_metric, latent_means, mutual_information_gap
from pyro_vae.divergences import convex_kl_bound, monte_carlo_kl, variational_kl_bound
from pyro_vae.dreg import DReG
from pyro_vae.em import ExpectationMaximisation, em
from pyro_vae.evaluate import LogLikelihood, log_likelihood, naive_log_likelihood
from pyro_vae.export import to_arviz, to_elpd
from pyro_vae.flows import FlowPosterior, FlowPrior, Reversal, Sylvester
from pyro_vae.gap import InferenceGap, inference_gap
from pyro_vae.information import MutualInformation
from pyro_vae.pair import LogTerms, Pair, SiteTerms, log_terms, site_terms
from pyro_vae.predict import generate, impute, posterior, reconstruct, super_resolve
from pyro_vae.scales import BatchOptimalScale, FixedScale, LearnedScale
from pyro_vae.total_correlation import DivergenceSplit, TotalCorrelationELBO, divergence_split
from pyro_vae.train import Run, fit

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
