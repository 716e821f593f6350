"""Where the bound is lost, against linear-Gaussian cases with a known best member of the family."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.models import SRVAE, VAE, LinearGaussianMixtureVAE, LinearGaussianVAE


class Shifted(LinearGaussianVAE):
    """Probabilistic PCA with a full-covariance guide that is off in place and size."""

    def guide(self, x: Tensor) -> None:
        exact = self.exact_posterior(x)
        loc = exact.mean + 2 * exact.stddev
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=0.5 * exact.scale_tril))


class Diagonal(LinearGaussianVAE):
    """Probabilistic PCA with a diagonal guide, N(0, 1) for every datum."""

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(len(x), self.weight.shape[1]), 1.0).to_event(1))

    def approximation_gap(self) -> float:
        """The best diagonal Gaussian has the posterior's mean and precision's diagonal: ½ (Σ log Λ_jj − log det Λ)."""
        precision = (torch.eye(self.weight.shape[1]) + self.weight.mT @ self.weight / self.scale() ** 2).detach()
        return 0.5 * float(precision.diagonal().log().sum() - torch.logdet(precision))


def exact(pair: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        return pair.exact_log_likelihood(x)


def test_the_exact_family_has_no_approximation_gap() -> None:
    pair, x = Shifted(5, 2), torch.randn(6, 5)
    gap = pv.inference_gap(pair, x, seed=0)
    # The ascent's gradient has no noise at the optimum, which it reaches to a few digits.
    assert (gap.approximation.abs() <= 1e-4).all()
    torch.testing.assert_close(gap.log_likelihood, exact(pair, x), rtol=0, atol=1e-4)
    # KL(q ‖ p(z | x)) = Σ_j [log 2 + (¼ + (shift/σ)²)/2 − ½]; the shift is 2 in units of the marginal scale.
    q = pair.exact_posterior(x)
    white = torch.linalg.solve_triangular(q.scale_tril, (2 * q.stddev).unsqueeze(-1), upper=False).squeeze(-1)
    expected = (2 * (torch.tensor(2.0).log() - 0.375) + (white**2).sum(-1) / 2).detach()
    assert ((gap.amortisation - expected).abs() <= 4 * gap.amortisation_error + 1e-4).all()


def test_a_diagonal_family_misses_what_it_must() -> None:
    pair, x = Diagonal(4, 2, scale=0.9), torch.randn(5, 4)
    with torch.no_grad():
        # Columns near one another, so that the posterior is correlated.
        pair.weight.copy_(torch.tensor([[1.0, 0.9], [0.8, 0.9], [0.1, 0.3], [0.0, 0.2]]))
    gap = pv.inference_gap(pair, x, num_particles=4000, seed=0)
    assert pair.approximation_gap() > 0.01
    assert (gap.pareto_k < 0.7).all()
    # What the ascent leaves is of second order in its last steps.
    assert ((gap.approximation - pair.approximation_gap()).abs() <= 4 * gap.approximation_error + 1e-4).all()
    assert ((gap.log_likelihood - exact(pair, x)).abs() <= 4 * gap.approximation_error).all()
    torch.testing.assert_close(gap.approximation + gap.amortisation, gap.log_likelihood - gap.elbo)
    assert (gap.amortisation > 4 * gap.amortisation_error).all()


def test_a_trained_encoder_has_less_to_lose() -> None:
    torch.manual_seed(1)
    pair, x = VAE((4,), pv.StandardNormal(2), encoder=nn.Linear(4, 4), decoder=nn.Linear(2, 4)), torch.randn(256, 4)
    before = pv.inference_gap(pair, x[:20], steps=300, seed=0)
    pv.fit(pair, x, epochs=40, batch_size=32, lr=2e-2, progress=False)
    after = pv.inference_gap(pair, x[:20], steps=300, seed=0)
    assert float(after.amortisation.mean()) < 0.5 * float(before.amortisation.mean())
    assert "approximation" in repr(after)


def test_point_masses_stay_and_two_sites_are_refined_together() -> None:
    pair = SRVAE((1, 4, 4), 2, pv.StandardNormal(2), "delta")
    gap = pv.inference_gap(pair, torch.rand(3, 1, 4, 4), num_particles=100, steps=100, seed=0)
    assert (gap.amortisation > 0).all()
    assert (gap.approximation > -4 * gap.approximation_error).all()


def test_a_guide_that_depends_on_its_draws_has_no_best_member() -> None:
    pair = SRVAE((1, 4, 4), 2, pv.StandardNormal(2), "gaussian")
    with pytest.raises(ValueError, match=r"guide's site 'u' depends on an earlier draw"):
        pv.inference_gap(pair, torch.rand(3, 1, 4, 4))
    mixture = LinearGaussianMixtureVAE(4, pv.MixtureOfGaussians(3, 2))
    with pytest.raises(ValueError, match=r"guide's site 'c' is a Categorical: the best member .* diagonal and full"):
        pv.inference_gap(mixture, torch.randn(3, 4))


def test_nothing_is_changed_and_seeds_repeat() -> None:
    pair, x = VAE((4,), pv.StandardNormal(2)), torch.randn(3, 4)
    before = {name: value.clone() for name, value in pair.state_dict().items()}
    rng, settings = torch.get_rng_state(), {"num_particles": 10, "steps": 3, "seed": 1}
    first, again = (pv.inference_gap(pair, x, **settings).elbo for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in pair.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in pair.parameters())
    assert all(module.training for module in pair.modules())


def test_bad_arguments_are_refused() -> None:
    pair, x = LinearGaussianVAE(4, 2), torch.randn(3, 4)
    for settings in ({"num_particles": 1}, {"steps": 0}):
        with pytest.raises(ValueError, match="at least 2 and 1"):
            pv.inference_gap(pair, x, **settings)
    with pytest.raises(ValueError, match=r"expects \(N, 4\)"):
        pv.inference_gap(pair, torch.randn(3, 5))
