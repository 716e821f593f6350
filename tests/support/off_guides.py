"""A pair whose exact log p(x) is known and whose guide is off by a known factor."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
from torch import Tensor

from pyro_vae.models import LinearGaussianVAE


class WrongScale(LinearGaussianVAE):
    """Probabilistic PCA with one latent and a guide whose scale is off by a factor."""

    def __init__(self, factor: float, x_size: int = 3) -> None:
        super().__init__(x_size, 1)
        self.factor = factor

    def guide(self, x: Tensor) -> None:
        exact = self.exact_posterior(x)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(exact.mean, self.factor * exact.stddev).to_event(1))

    def gap(self) -> float:
        """KL(q ‖ p(z | x)) = log 1/f + (f² − 1)/2, the same for every x."""
        return -math.log(self.factor) + (self.factor**2 - 1) / 2
