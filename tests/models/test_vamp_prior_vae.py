"""The VampPrior keeps the contract; with a fixed affine encoder and one pseudo-input everything is closed."""

from __future__ import annotations

import math

import pyro
import pytest
import torch
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.cli.recipes.vamp_prior_vae import VampPriorVAERecipe
from pyro_vae.conditionals.posteriors import SMALLEST_GUIDE_SCALE
from pyro_vae.distributions.linear_gaussian import condition_gaussian
from pyro_vae.models import VAE, VampPriorVAE
from pyro_vae.networks.mlp import GatedMLP
from pyro_vae.objectives.bounds import iwae
from pyro_vae.runtime.memory import _peak_memory
from pyro_vae.testing import PairContract
from tests.support.terms import parts

# Sums of a few dozen terms of order one: rounding stays far below 1e-10.
ROUNDING = {"rtol": 1e-10, "atol": 1e-10}
SCALE = torch.tensor([0.6, 1.3], dtype=torch.float64)


class TestVampPriorVAE(PairContract):
    def make_pair(self) -> pv.Pair:
        encoder, decoder = GatedMLP([(1, 4, 4)], 4, (8, 8)), GatedMLP([(2,)], 32, (8, 8))
        pseudo_inputs = torch.rand(3, 1, 4, 4)
        return VampPriorVAE(pseudo_inputs, 2, pv.DiscretisedLogistic(17), encoder=encoder, decoder=decoder)

    def make_batch(self) -> tuple[Tensor, ...]:
        return (torch.randint(0, 17, (5, 1, 4, 4)) / 16,)


def affine_encoder() -> nn.Linear:
    """Return x ↦ (A x + a, raw entries of a scale that does not depend on x)."""
    encoder = nn.Linear(5, 4)
    with torch.no_grad():
        encoder.weight[2:] = 0.0
        encoder.bias[2:] = torch.log(torch.expm1(SCALE - SMALLEST_GUIDE_SCALE))
    return encoder


def affine_pair(pseudo_inputs: Tensor) -> VampPriorVAE:
    likelihood = pv.Gaussian(pv.FixedScale(0.7))
    return VampPriorVAE(pseudo_inputs, 2, likelihood, encoder=affine_encoder(), decoder=nn.Linear(2, 5))


def test_one_pseudo_input_makes_the_prior_the_guide_there() -> None:
    pair, z = affine_pair(torch.randn(1, 5)), torch.randn(7, 2)
    torch.testing.assert_close(pair.prior().log_prob(z), pair.q_z(pair.pseudo_inputs[0]).log_prob(z), **ROUNDING)


def test_one_pseudo_input_and_an_affine_encoder_have_a_closed_divergence() -> None:
    # Both Gaussians have the scale σ, so that KL(q(z | x) ‖ p(z)) = ½ ‖A (x − v) / σ‖², zero at the pseudo-input.
    pair, x = affine_pair(torch.randn(1, 5)), torch.randn(7, 5)
    weight = pair.q_z.network.weight[:2]
    exact = 0.5 * (((x - pair.pseudo_inputs) @ weight.mT / SCALE) ** 2).sum(-1)
    torch.testing.assert_close(pv.analytic_loss(pair, x).z, exact, **ROUNDING)
    at_it = pv.analytic_loss(pair, pair.pseudo_inputs.detach()).z
    torch.testing.assert_close(at_it, torch.zeros(1), rtol=0, atol=1e-14)


def test_affine_networks_have_the_mixtures_exact_likelihood() -> None:
    pair = affine_pair(torch.randn(3, 5)).requires_grad_(False)
    means, decoder = pair.q_z(pair.pseudo_inputs).mean, pair.p_x.network
    x = pv.generate(pair, 10, seed=1).x
    noise = torch.full((5,), 0.7)
    centred = (x - decoder.bias).unsqueeze(-2)
    components, _ = condition_gaussian(means, torch.diag(SCALE).expand(3, 2, 2), decoder.weight, noise, centred)
    exact = torch.logsumexp(components, -1) - math.log(3)
    # Draws from the prior: their weights are bounded, so that the standard error can be trusted.
    ll = pv.naive_log_likelihood(pair, x, num_particles=20_000, seed=2)
    assert ((ll.per_datum - exact).abs() <= 4 * ll.standard_error).all()


def test_it_is_the_vae_with_the_mixture_of_its_components() -> None:
    pair, x = affine_pair(torch.randn(3, 5)), torch.randn(7, 5)
    means = pair.q_z(pair.pseudo_inputs).mean.detach()
    prior = pv.MixtureOfGaussians(3, 2, means=means, scales=SCALE.expand(3, 2))
    networks = {"encoder": pair.q_z.network, "decoder": pair.p_x.network}
    vae = VAE((5,), prior, pv.Gaussian(pv.FixedScale(0.7)), **networks)
    ours, theirs = [], []
    for each, kept in ((pair, ours), (vae, theirs)):
        pyro.set_rng_seed(3)
        kept.extend(parts(pv.log_terms(each, x, num_particles=4)))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **ROUNDING)


def test_the_data_as_pseudo_inputs_bound_the_divergence_by_log_n() -> None:
    # The prior is then the aggregate posterior, of which each datum's own is a share 1/N: this holds for every draw.
    x = torch.randn(6, 5)
    terms = pv.log_terms(affine_pair(x), x, num_particles=50)
    assert (terms.log_guide - terms.log_prior <= math.log(6) + 1e-12).all()


def test_the_encoder_learns_from_model_and_guide() -> None:
    pair, x = affine_pair(torch.randn(2, 5)), torch.randn(64, 5)
    before = [parameter.clone() for parameter in pair.parameters()]
    loss = float(-pv.log_terms(pair, x, num_particles=50).log_weights.mean().detach())
    pv.fit(pair, x, epochs=30, batch_size=32, lr=1e-2, progress=False)
    assert all(not torch.equal(a, b) for a, b in zip(before, pair.parameters(), strict=True))
    assert float(-pv.log_terms(pair, x, num_particles=50).log_weights.mean().detach()) < loss


def test_the_shared_encoder_has_the_plain_gradient_in_mean_under_dreg() -> None:
    # Its share in the guide is doubly reparameterised, that in the model is not; many copies make one call a mean.
    pair, x = affine_pair(torch.randn(2, 5)), torch.randn(3, 5).repeat(50, 1)
    parameters, dreg = list(pair.parameters()), pv.DReG(num_particles=5)

    def gradient(loss: Tensor) -> Tensor:
        return torch.cat([part.flatten() for part in torch.autograd.grad(loss, parameters)])

    ours = torch.stack([gradient(dreg.differentiable_loss(pair.model, pair.guide, x)) for _ in range(60)])
    plain = torch.stack([gradient(-iwae(pv.log_terms(pair, x, num_particles=5)).sum()) for _ in range(60)])
    error = ((ours.var(0) + plain.var(0)) / 60).sqrt()
    assert ((ours.mean(0) - plain.mean(0)).abs() <= 4 * error + 1e-9).all()


def test_the_mixtures_memory_is_counted() -> None:
    # C · K · B · L numbers of eight bytes at least: a thousand pseudo-inputs cannot hide from the budget.
    pair, x = affine_pair(torch.randn(1000, 5)), torch.randn(4, 5)
    with torch.no_grad():
        peak = _peak_memory(lambda: pv.log_terms(pair, x, num_particles=10), x.device)
    assert peak >= 1000 * 10 * 4 * 2 * 8
    with pytest.raises(ValueError, match="raise it"):
        pv.log_likelihood(pair, x, num_particles=10, memory=1000 * 2 * 8)


@pytest.mark.parametrize("shape", [(0, 5), (5,)])
def test_no_pseudo_inputs_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"pseudo_inputs has shape .*C at least 1"):
        VampPriorVAE(torch.zeros(shape), 2)


def test_bad_values_are_refused() -> None:
    with pytest.raises(ValueError, match="NaN or infinite"):
        VampPriorVAE(torch.full((2, 5), torch.nan), 2)
    with pytest.raises(ValueError, match="latent is 0"):
        VampPriorVAE(torch.zeros(2, 5), 0)
    blank = torch.zeros(3, 1, 4, 4)
    with pytest.raises(ValueError, match="pseudo_inputs is 0"):
        VampPriorVAERecipe(pseudo_inputs=0).build(pv.data.DataSet("blank", blank, blank, None, None, levels=2))
