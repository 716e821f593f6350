"""Options that several recipes share, and the priors and likelihoods that they build."""

from __future__ import annotations

from typing import Literal

from pyro_vae.conditionals.conditional import Head
from pyro_vae.conditionals.likelihoods import Bernoulli, ContinuousBernoulli, DiscretisedLogistic, Gaussian
from pyro_vae.conditionals.priors import MixtureOfGaussians, StandardNormal
from pyro_vae.conditionals.scales import BatchOptimalScale, LearnedScale
from pyro_vae.data import DataSet

__all__ = ["LikelihoodName", "ScaleName", "levels_of", "make_likelihood", "make_prior"]

LikelihoodName = Literal["bernoulli", "continuous-bernoulli", "gaussian", "discretised-logistic"]
ScaleName = Literal["scalar", "channel", "pixel", "optimal"]


def make_prior(latent: int, components: int) -> StandardNormal | MixtureOfGaussians:
    """Return N(0, I) for one component, else a learned mixture of Gaussians.

    Raises:
        ValueError: for sizes below one.
    """
    return StandardNormal(latent) if components == 1 else MixtureOfGaussians(components, latent)


def make_likelihood(name: LikelihoodName, scale: ScaleName, data: DataSet) -> Head:
    """Return a likelihood for a data set, with its gray levels, or with its standard deviation as initial γ.

    Raises:
        ValueError: for a discretised likelihood on data without gray levels.
    """
    if name == "bernoulli":
        return Bernoulli()
    if name == "continuous-bernoulli":
        return ContinuousBernoulli()
    if name == "discretised-logistic":
        return DiscretisedLogistic(levels_of(data))
    if scale == "optimal":
        return Gaussian(BatchOptimalScale())
    shape: tuple[int, ...] = {"scalar": (), "channel": (data.x_shape[0], 1, 1), "pixel": data.x_shape}[scale]
    return Gaussian(LearnedScale(float(data.train.std()), shape))


def levels_of(data: DataSet) -> int:
    """Return the number of gray levels of a data set.

    Raises:
        ValueError: for pixels on no grid.
    """
    if data.levels is None:
        raise ValueError(
            f"{data.name} has no gray levels: a discretised likelihood or transition needs a data set that has"
        )
    return data.levels
