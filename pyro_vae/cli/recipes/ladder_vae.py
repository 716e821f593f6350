"""``pyro-vae train ladder-vae``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

from pyro_vae.cli.recipes.common import LikelihoodName, make_likelihood
from pyro_vae.cli.recipes.recipe import ImageRecipe
from pyro_vae.data import DataSet
from pyro_vae.models.ladder_vae import LadderVAE
from pyro_vae.networks.annealed import Annealed
from pyro_vae.objectives.bounds import Objective, free_bits

__all__ = ["LadderVAERecipe"]


@dataclass(frozen=True)
class LadderVAERecipe(ImageRecipe[LadderVAE], command="ladder-vae"):
    """Ladder VAE: a hierarchy of latents; the guide merges data and model at each layer."""

    layers: int = 3
    """Number of stochastic layers."""
    latent: int = 16
    """Size of z next to the data; each layer above it has half as many, at least 2."""
    likelihood: LikelihoodName = "discretised-logistic"
    """Distribution of x given z."""
    batch_norm: bool = False
    """Normalise the networks between layers by batches: with --warmup, fewer upper layers become inactive."""
    free_bits: float = 0.0
    """Free nats of each layer's KL during training; 0 for the ELBO."""
    rise: float = 0.0
    """Warm-up with free bits: epochs over which β rises from 0. Use it in place of --warmup."""

    def build(self, data: DataSet) -> LadderVAE:
        """Build the pair for a data set.

        Raises:
            ValueError: for options that contradict each other.
        """
        sizes = [self.latent, *(max(self.latent >> layer, 2) for layer in range(1, self.layers))]
        if self.layers < 1:
            raise ValueError(f"layers is {self.layers}; a ladder has at least 1")
        if self.batch_norm and self.layers == 1:
            raise ValueError("batch_norm normalises the networks between layers, of which 1 layer has none")
        if not 0 <= self.rise < math.inf:
            raise ValueError(f"rise is {self.rise}; it counts epochs and must be finite and at least 0")
        if self.rise and not self.free_bits:
            raise ValueError(f"rise is {self.rise}, but there are no free bits: use --warmup, which weighs the ELBO")
        pair = LadderVAE(
            data.x_shape, sizes, make_likelihood(self.likelihood, "scalar", data), batch_norm=self.batch_norm
        )
        if self.rise:
            # As a module of the pair, β is annealed by training and saved in checkpoints.
            pair.beta = Annealed(0.0, 1.0, self.rise)
        return pair

    def loss(self, pair: LadderVAE, num_data: int) -> Objective | None:
        """Return the free-bits objective; None without free bits."""
        if not self.free_bits:
            return None
        return free_bits(self.free_bits, cast(Annealed, pair.beta) if self.rise else 1.0)
