"""The denoising VAE keeps the contract, is the VAE without noise, and its guide is the mixture that it says it is."""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor, nn
from torch.nn.functional import softplus

import pyro_vae as pv
from pyro_vae.conditionals.conditional import Head
from pyro_vae.distributions.mixtures import EqualMixture
from pyro_vae.models import VAE, DenoisingVAE, LinearGaussianVAE

# Sums of a few dozen terms of order ten in float64.
ROUNDING = {"rtol": 1e-10, "atol": 1e-10}


def bits(size: int = 4) -> Tensor:
    return torch.rand(size, 6).gt(0.5).to(torch.get_default_dtype())


def small(corruption: nn.Module, corruptions: int = 3, **heads: Any) -> DenoisingVAE:
    networks: Any = {"encoder": nn.Linear(6, 4), "decoder": nn.Linear(2, 6)}
    return DenoisingVAE((6,), pv.StandardNormal(2), corruption, corruptions=corruptions, **networks, **heads)


class TestDenoising(pv.testing.PairContract):
    def make_pair(self) -> pv.Pair:
        return small(pv.BitFlip(0.2))

    def make_batch(self) -> tuple[Tensor, ...]:
        return (bits(),)


class Laplace(Head):
    """Another noise in the latents."""

    def num_outputs(self, event_shape: Any) -> int:
        return 2 * math.prod(event_shape)

    def forward(self, outputs: Tensor, event_shape: Any) -> Any:
        loc, raw = outputs.chunk(2, -1)
        return dist.Laplace(loc, softplus(raw) + 0.01).to_event(1)


class HeavyNoise(nn.Module):
    """A corruption of the user's own."""

    def forward(self, x: Tensor) -> Any:
        return dist.StudentT(3.0, x, 0.1)


class TestOtherNoise(TestDenoising):
    def make_pair(self) -> pv.Pair:
        return small(HeavyNoise(), likelihood=pv.Gaussian(), posterior=Laplace())


@pytest.mark.parametrize("corruptions", [1, 4])
@pytest.mark.parametrize("noise", [pv.BitFlip(0.0), pv.GaussianNoise(0.0)])
def test_without_noise_it_is_the_vae(noise: Any, corruptions: int) -> None:
    likelihood = pv.Bernoulli() if isinstance(noise, pv.BitFlip) else pv.Gaussian()
    ours, x = small(noise, corruptions, likelihood=likelihood), bits()
    theirs = VAE((6,), pv.StandardNormal(2), likelihood, encoder=nn.Linear(6, 4), decoder=nn.Linear(2, 6))
    theirs.load_state_dict(ours.state_dict())
    # The same density at the same draws, and therefore the same everything.
    guide = poutine.trace(type(ours).guide).get_trace(ours, x)
    replayed = poutine.trace(poutine.replay(VAE.guide, trace=guide)).get_trace(theirs, x)
    for trace in (guide, replayed):
        trace.compute_log_prob()
    torch.testing.assert_close(guide.nodes["z"]["log_prob"], replayed.nodes["z"]["log_prob"], **ROUNDING)


def test_a_flip_of_every_bit_is_the_vae_of_the_negative() -> None:
    pair, x = small(pv.BitFlip(1.0)), bits()
    guide = poutine.trace(type(pair).guide).get_trace(pair, x)
    z = guide.nodes["z"]
    torch.testing.assert_close(z["fn"].log_prob(z["value"]), pair.q_z(1 - x).log_prob(z["value"]), **ROUNDING)


def test_log_q_is_the_mixture_over_the_corruptions_the_draws_own_among_them() -> None:
    pair, x = small(pv.BitFlip(0.3), 5), bits()
    torch.manual_seed(3)
    terms, latents = pv.log_terms(pair, x, num_particles=7), None
    torch.manual_seed(3)
    corrupted = pair.corruption(x).sample((5,))
    q = pair.q_z(corrupted.movedim(0, 1))
    torch.manual_seed(3)
    with pytest.MonkeyPatch.context() as patch:
        seen: list[Tensor] = []
        patch.setattr(EqualMixture, "rsample", _kept(EqualMixture.rsample, seen))
        pv.log_terms(pair, x, num_particles=7)
    (latents,) = seen
    each = q.log_prob(latents.unsqueeze(2))
    torch.testing.assert_close(terms.log_guide, torch.logsumexp(each, -1) - math.log(5), **ROUNDING)
    # Each draw has one of the five it was scored under as its source, so that the mixture is at least a fifth of that.
    assert (terms.log_guide >= each.amax(-1) - math.log(5) - 1e-10).all()


def _kept(method: Any, seen: list[Tensor]) -> Any:
    def rsample(self: Any, sample_shape: Any = ()) -> Tensor:
        seen.append(method(self, sample_shape))
        return seen[-1]

    return rsample


def test_a_draws_gradient_is_that_of_the_mixture() -> None:
    loc, scale = torch.tensor([-1.0, 0.5, 2.0], requires_grad=True), torch.tensor([0.3, 1.0, 0.6], requires_grad=True)
    draws = EqualMixture(dist.Normal(loc, scale)).rsample((100_000,))
    moment, exact = draws**2, (loc**2 + scale**2).mean()
    assert abs(moment.mean() - exact) <= 4 * moment.std() / 100_000**0.5
    ours = torch.stack(torch.autograd.grad(moment.mean(), (loc, scale)))
    theirs = torch.stack(torch.autograd.grad(exact, (loc, scale)))
    # d z²/dμ_m = 2 z and d z²/dσ_m = 2 z ε, each a third of the time: their variances lie below a third of
    # E[4 z² (1 + ε²)] = 4 (μ² + σ²) + 4 (μ² + 3 σ²).
    bound = ((8 * loc**2 + 16 * scale**2) / 3 / 100_000).sqrt().detach()
    assert ((ours - theirs).abs() <= 4 * bound).all()


def oracle_pair(noise: float, corruptions: int, raw: float) -> tuple[LinearGaussianVAE, DenoisingVAE, Tensor]:
    """Return probabilistic PCA, a denoising pair of the same model with a guide of this raw scale, and data."""
    torch.manual_seed(0)
    oracle = LinearGaussianVAE(3, 1, scale=0.8).requires_grad_(False)
    decoder, encoder = nn.Linear(1, 3), nn.Linear(3, 2)
    decoder.load_state_dict({"weight": oracle.weight, "bias": oracle.bias})
    slopes = oracle.exact_posterior(torch.eye(3)).mean
    encoder.load_state_dict({"weight": torch.cat([slopes.mT, torch.zeros(1, 3)]), "bias": torch.tensor([0.0, raw])})
    likelihood, prior = pv.Gaussian(pv.FixedScale(oracle.scale())), pv.StandardNormal(1)
    networks: Any = {"encoder": encoder, "decoder": decoder, "corruptions": corruptions}
    pair = DenoisingVAE((3,), prior, pv.GaussianNoise(noise), likelihood, **networks)
    return oracle, pair.requires_grad_(False), pv.generate(oracle, 6, seed=1).x


@pytest.mark.parametrize("corruptions", [1, 5])
def test_importance_sampling_from_the_guide_finds_the_exact_likelihood(corruptions: int) -> None:
    # A scale wider than the posterior's, so that the weights are bounded.
    oracle, pair, x = oracle_pair(0.3, corruptions, raw=0.6)
    ll = pv.log_likelihood(pair, x, num_particles=20_000, seed=2, proposal="guide")
    assert ((ll.per_datum - oracle.exact_log_likelihood(x)).abs() <= 4 * ll.standard_error).all()


def test_more_corruptions_tighten_the_bound_and_fresh_ones_alone_break_it() -> None:
    bounds, runs = [], 20_000
    for corruptions in (1, 8):
        oracle, pair, x = oracle_pair(0.5, corruptions, raw=-1.0)
        # Separate runs are rows of one batch: corruptions are drawn for each row.
        rows = pv.log_terms(pair, x.repeat_interleave(runs, 0)).log_weights.reshape(6, runs)
        bounds.append((rows.mean(1), rows.std(1) / runs**0.5))
    exact = oracle.exact_log_likelihood(x)
    (one, one_error), (eight, eight_error) = bounds
    assert (one <= exact + 4 * one_error).all()
    assert (eight <= exact + 4 * eight_error).all()
    assert (eight - one).sum() > 4 * (one_error**2 + eight_error**2).sum().sqrt()
    # The draw from one corruption, scored under another: the mistake is above log p(x) by far.
    z = pair.q_z(pair.corruption(x).sample((runs,))).sample()
    log_q = pair.q_z(pair.corruption(x).sample((runs,))).log_prob(z)
    wrong = pair.prior().log_prob(z) + pair.p_x(z).log_prob(x) - log_q
    assert (wrong.mean(0) > exact + 4 * wrong.std(0) / runs**0.5).any()


def test_it_trains_and_the_recorded_step_draws_what_the_eager_one_does() -> None:
    x, finals = bits(96), []
    torch.manual_seed(0)
    pair = small(pv.BitFlip(0.1))
    state = {name: value.clone() for name, value in pair.state_dict().items()}
    for capture in (True, False):
        pair.load_state_dict(state)
        run = pv.fit(pair, x, epochs=4, batch_size=16, lr=1e-2, seed=0, capture=capture, progress=False)
        finals.append(torch.cat([p.detach().flatten().clone() for p in pair.parameters()]))
    assert run.metrics[-1]["loss"] < run.metrics[0]["loss"]
    torch.testing.assert_close(*finals, **ROUNDING)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: small(pv.GaussianNoise(0.1)), r"GaussianNoise takes data out of the likelihood's support.*BitFlip"),
        (lambda: small(pv.BitFlip(0.1), likelihood=pv.Gaussian()), r"BitFlip takes data in .*support is .*[Rr]eal"),
        (
            lambda: small(pv.GaussianNoise(0.1), likelihood=pv.ContinuousBernoulli()),
            r"GaussianNoise takes data out of the likelihood's support",
        ),
        (lambda: small(pv.BitFlip(0.1), corruptions=0), r"corruptions is 0; the guide mixes over at least 1"),
        (lambda: small(pv.BitFlip(0.1), corruptions=2.5), r"corruptions is 2.5; .*a whole number"),
        (lambda: pv.BitFlip(1.2), r"probability is 1.2; it must lie between 0 and 1"),
        (lambda: pv.BitFlip(math.nan), r"probability is nan"),
        (lambda: pv.GaussianNoise(-1.0), r"scale is -1.0; it must be finite and at least 0"),
        (lambda: pv.GaussianNoise(math.inf), r"scale is inf"),
    ],
)
def test_bad_noise_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("corruptions", [0, -3, 1.5])
def test_a_number_of_corruptions_set_later_is_checked_too(corruptions: Any) -> None:
    pair = small(pv.BitFlip(0.1))
    pair.corruptions = corruptions
    with pytest.raises(ValueError, match=rf"corruptions is {corruptions}; the guide mixes over at least 1"):
        pv.log_terms(pair, bits())
