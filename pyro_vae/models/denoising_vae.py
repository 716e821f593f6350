"""The denoising VAE: an encoder that sees corrupted data, and a bound that stays one.

    p(x, z) = p(z) p(x | z)          q(z | x) = (1/M) Σ_m q(z | x̃_m),   x̃_1 … x̃_M ~ c(x̃ | x)

The guide is E_c q(z | x̃), the corruption marginalised by M draws anew at each run. Given them it is an equal-weight
mixture: a draw takes one of its components by an index free of parameters, and is scored under all of them, its own
among them, log q = logsumexp_m log q(z | x̃_m) − log M. Every M therefore gives a bound on log p(x), and in expectation
a tighter one the larger M is; scored under fresh corruptions alone, a draw may overstate it. The model sees clean
data only, and no site is added.

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
        prior: p(z), :class:`~pyro_vae.StandardNormal` or :class:`~pyro_vae.MixtureOfGaussians`; it knows L.
        corruption: a module that maps x to the distribution of x̃, such as :class:`~pyro_vae.BitFlip`.
        likelihood: the head of p(x | z); Bernoulli by default.
        posterior: the head of q(z | x̃), the noise in the latents: any distribution with ``rsample``.
        corruptions: M; ``pair.corruptions`` may be set to more for an evaluation.
        encoder, decoder: networks of the user's own.

    All particles of a run share its M corruptions, so that the encoder's work does not grow with their number.

    Raises:
        ValueError: for M < 1, a corruption that leaves the likelihood's support, and one that does not take its data.

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
