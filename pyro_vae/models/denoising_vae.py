"""The denoising VAE: an encoder of corrupted data, trained on a bound of the clean data's likelihood.

    p(x, z) = p(z) p(x | z)          q(z | x) = (1/M) Σ_m q(z | x̃_m),   x̃_1 … x̃_M ~ c(x̃ | x)

The guide is E_c q(z | x̃), with the corruption marginalised by M fresh draws at each call. Given these draws it is an
equal-weight mixture, log q = logsumexp_m log q(z | x̃_m) − log M. A draw picks one component at random and is scored
under all of them. Every M therefore gives a bound on log p(x); a larger M gives a tighter bound in expectation. Do not
score a draw under fresh corruptions alone: the result may exceed log p(x). The model sees clean data only, and the
corruption adds no site.

Reference: Im, Ahn, Memisevic and Bengio (2017), Denoising criterion for variational auto-encoding framework, AAAI.
"""

from __future__ import annotations

from collections.abc import Sequence

import pyro
import torch
from torch import Tensor, nn

from pyro_vae.conditionals.conditional import Conditional, Head
from pyro_vae.conditionals.likelihoods import Bernoulli
from pyro_vae.conditionals.posteriors import DiagonalGaussian
from pyro_vae.conditionals.priors import MixtureOfGaussians, StandardNormal
from pyro_vae.distributions.mixtures import EqualMixture
from pyro_vae.networks.convolutional import default_decoder, default_encoder
from pyro_vae.pair.modes import evaluation
from pyro_vae.pair.pair import Pair
from pyro_vae.runtime.random_state import own_random_state

__all__ = ["DenoisingVAE"]


class DenoisingVAE(Pair):
    """Pair p(z) p(x | z) with (1/M) Σ_m q(z | x̃_m).

    Args:
        x_shape: shape of one datum, (C, H, W) or (D,).
        prior: p(z) over L entries, :class:`~pyro_vae.StandardNormal` or :class:`~pyro_vae.MixtureOfGaussians`.
        corruption: module that maps x to the distribution of x̃, e.g. :class:`~pyro_vae.BitFlip`.
        likelihood: head of p(x | z); Bernoulli by default.
        posterior: head of q(z | x̃), any distribution with ``rsample``.
        corruptions: M; set ``pair.corruptions`` to a larger number for an evaluation.
        encoder, decoder: networks to use in place of the default ones.

    All particles share the M corruptions: the encoder's work does not grow with the number of particles.

    Raises:
        ValueError: for M < 1, for corrupted data outside the likelihood's support, and for a corruption of other data.

    >>> import torch, pyro_vae as pv
    >>> pair = DenoisingVAE((1, 8, 8), pv.StandardNormal(4), pv.BitFlip(0.1), corruptions=5)
    >>> pv.log_terms(pair, torch.zeros(5, 1, 8, 8), num_particles=3).log_weights.shape
    torch.Size([3, 5])
    """

    def __init__(
        self,
        x_shape: Sequence[int],
        prior: StandardNormal | MixtureOfGaussians,
        corruption: nn.Module,
        likelihood: Head | None = None,
        posterior: Head | None = None,
        *,
        corruptions: int = 1,
        encoder: nn.Module | None = None,
        decoder: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.x_shape, self.prior, self.corruption, self.corruptions = tuple(x_shape), prior, corruption, corruptions
        p_head, q_head = likelihood or Bernoulli(), posterior or DiagonalGaussian()
        z_shape = (prior.size,)
        encoder = encoder or default_encoder(self.x_shape, q_head.num_outputs(z_shape))
        decoder = decoder or default_decoder([z_shape], self.x_shape, p_head.num_outputs(self.x_shape))
        self.p_x = Conditional(decoder, p_head, self.x_shape)
        self.q_z = Conditional(encoder, q_head, z_shape)
        self._check_count()
        self._check_corruption()

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.prior())
            pyro.sample("x", self.p_x(z), obs=x)

    def guide(self, x: Tensor) -> None:
        self._check_count()
        corrupted = self.corruption(x).sample((self.corruptions,)).movedim(0, 1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", EqualMixture(self.q_z(corrupted)))

    def _check_count(self) -> None:
        if not (isinstance(self.corruptions, int) and self.corruptions >= 1):
            raise ValueError(f"corruptions is {self.corruptions}; the guide mixes over at least 1, a whole number")

    def _check_corruption(self) -> None:
        name = type(self.corruption).__name__
        with evaluation(self), own_random_state(0):
            support = self.p_x(self.prior().sample()).support
            taken = getattr(self.corruption, "domain", None)
            foreign = [v for v in (-0.5, 0.5, 1.5) if taken is not None and not taken.check(torch.tensor(v))]
            if any(bool(support.check(torch.full(self.x_shape, value)).all()) for value in foreign):
                raise ValueError(f"{name} takes data in {taken}, but the likelihood's support is {support}")
            # 0 and 1 lie in the support of every likelihood of this package.
            corrupted = self.corruption(torch.stack([torch.zeros(self.x_shape), torch.ones(self.x_shape)])).sample((8,))
            if not bool(support.check(corrupted).all()):
                raise ValueError(
                    f"{name} takes data out of the likelihood's support, {support}: use BitFlip for bits, "
                    "GaussianNoise for real data, or a module of your own that returns a distribution within it"
                )
