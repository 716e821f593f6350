"""The VAE that clusters: z belongs to one of C clusters, and the cluster is a latent too.

    c ~ Categorical(w),   z ~ N(μ_c, diag σ_c²),   x ~ p(x | z)          q(z | x) q(c | z) = q(z | x) p(c | z)

The guide samples c from its exact posterior, r_c(z) ∝ w_c N(z; μ_c, diag σ_c²). Therefore
p(c) p(z | c) / q(c | z) = p(z) for every c. Log-weights equal those of the VAE with a mixture prior.

Gradients need no score function. By Fisher's identity ∇ log p(z) = E_{r(c | z)} ∇ log p(z, c), with the
responsibilities held constant. A drawn c gives an unbiased gradient (``Trace_ELBO``). A sum over c gives the gradient
of the mixture prior (``enumerated=True`` and ``TraceEnum_ELBO``).

Reference: Jiang, Zheng, Tan, Tang and Zhou (2017), Variational deep embedding: an unsupervised and generative approach
to clustering, IJCAI; Dilokthanakul et al. (2016), Deep unsupervised clustering with Gaussian mixture VAEs, arXiv.
"""

from __future__ import annotations

from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_vae.conditionals.conditional import Conditional, Head
from pyro_vae.conditionals.likelihoods import Gaussian
from pyro_vae.conditionals.posteriors import DiagonalGaussian
from pyro_vae.conditionals.priors import MixtureOfGaussians
from pyro_vae.networks.convolutional import default_decoder, default_encoder
from pyro_vae.pair.modes import device_of
from pyro_vae.pair.pair import Pair
from pyro_vae.runtime.random_state import own_random_state

__all__ = ["BATCH_SIZE", "GaussianMixtureVAE"]

# Lower bound on the variances of a fitted prior, as a share of N(0, I)'s: a point would have infinite density.
SMALLEST_VARIANCE = 1e-3
# Data per pass of the encoder.
BATCH_SIZE = 1024


class GaussianMixtureVAE(Pair):
    """Pair p(c) p(z | c) p(x | z) with q(z | x) p(c | z).

    Args:
        x_shape: shape of one datum, (C, H, W) or (D,).
        prior: mixture of C clusters over L entries.
        likelihood: head of p(x | z); Gaussian with one learned γ by default.
        posterior: head of q(z | x), diagonal by default.
        encoder, decoder: networks to use in place of the default ones: MLPs, or strided conv nets from 16 × 16 pixels.
        enumerated: mark c for ``TraceEnum_ELBO`` to sum over; everything else still draws it.

    Raises:
        ValueError: for a prior that is no mixture.

    >>> import torch, pyro_vae as pv
    >>> pair = GaussianMixtureVAE((1, 8, 8), pv.MixtureOfGaussians(10, 4), pv.Bernoulli())
    >>> pv.log_terms(pair, torch.zeros(5, 1, 8, 8), num_particles=3).log_weights.shape
    torch.Size([3, 5])
    >>> pair.responsibilities(torch.zeros(5, 1, 8, 8)).shape
    torch.Size([5, 10])
    """

    def __init__(
        self,
        x_shape: Sequence[int],
        prior: MixtureOfGaussians,
        likelihood: Head | None = None,
        posterior: Head | None = None,
        *,
        encoder: nn.Module | None = None,
        decoder: nn.Module | None = None,
        enumerated: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(prior, MixtureOfGaussians):
            raise ValueError(f"prior is {type(prior).__name__}; it must be a MixtureOfGaussians(components, size)")
        self.x_shape, self.prior = tuple(x_shape), prior
        # Trace_ELBO warns of marked sites.
        self.infer = {"enumerate": "parallel"} if enumerated else {}
        z, x = (prior.size,), self.x_shape
        p_x, q_z = likelihood or Gaussian(), posterior or DiagonalGaussian()
        self.p_x = Conditional(decoder or default_decoder([z], x, p_x.num_outputs(x)), p_x, x)
        self.q_z = Conditional(encoder or default_encoder(x, q_z.num_outputs(z)), q_z, z)

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(logits=self.prior.logits))
            z = pyro.sample("z", dist.Normal(self.prior.means[c], self.prior.log_scales[c].exp()).to_event(1))
            pyro.sample("x", self.p_x(z), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.q_z(x))
            # Held constant: see Fisher's identity above.
            shares = self.prior.responsibilities(z).detach()
            pyro.sample("c", dist.Categorical(probs=shares), infer=dict(self.infer))

    def responsibilities(self, x: Tensor, num_particles: int = 16) -> Tensor:
        """Estimate the soft clustering q(c | x) = E_q(z | x) r_c(z).

        Args:
            x: (B, …).
            num_particles: K, draws of z per datum.

        Returns:
            (B, C); rows sum to one.
        """
        return self.prior.responsibilities(self.q_z(x).sample((num_particles,))).mean(0)

    @torch.no_grad()
    def start_clusters(self, x: Tensor, seed: int = 0) -> None:
        """Fit the prior to draws of the encoded data, by expectation–maximisation.

        Train briefly, call this, then train on (Jiang et al., 2017, section 4.3). From a random start most components
        become empty in the first epochs, before the decoder uses z. The fit takes draws of q(z | x), not means. Draws
        spread as wide as the average of the posteriors, the best prior for a guide.

        Args:
            x: data to encode, (N, …).
            seed: seed of the fit.

        Raises:
            ValueError: for fewer data than components.
        """
        from sklearn.mixture import GaussianMixture

        if len(x) < self.prior.components:
            raise ValueError(f"x holds {len(x)} data, fewer than the prior's {self.prior.components} components")
        with own_random_state(seed, device_of(self)):
            drawn = torch.cat([self.q_z(rows).sample() for rows in x.split(BATCH_SIZE)]).double().cpu().numpy()
        fitted = GaussianMixture(self.prior.components, covariance_type="diag", n_init=5, random_state=seed).fit(drawn)
        self.prior.logits.copy_(torch.from_numpy(fitted.weights_).log())
        self.prior.means.copy_(torch.from_numpy(fitted.means_))
        self.prior.log_scales.copy_(torch.from_numpy(fitted.covariances_).clamp(min=SMALLEST_VARIANCE).log() / 2)
