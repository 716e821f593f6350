"""The ladder keeps the contract; one layer is a VAE, and two linear-Gaussian layers have the exact posterior."""

from __future__ import annotations

import math
from pathlib import Path

import pyro
import pytest
import torch
from pyro.infer import TraceMeanField_ELBO
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.cli.recipes.ladder_vae import LadderVAERecipe
from pyro_vae.conditionals.posteriors import SMALLEST_GUIDE_SCALE
from pyro_vae.distributions.linear_gaussian import linear_gaussian_log_likelihood
from pyro_vae.models import VAE, LadderVAE
from pyro_vae.models.ladder_vae import merged
from pyro_vae.objectives.bounds import elbo, free_bits
from pyro_vae.pair.terms import LogTerms, SiteTerms
from pyro_vae.report.figures import latent_map
from pyro_vae.testing import PairContract
from tests.support.terms import parts

# Sums of a few dozen terms of order one: rounding stays far below 1e-10.
ROUNDING = {"rtol": 1e-10, "atol": 1e-10}


def small_ladder() -> LadderVAE:
    return LadderVAE((1, 4, 4), (4, 3, 2), pv.DiscretisedLogistic(17), hidden=(8, 8, 8))


class TestLadderVAE(PairContract):
    def make_pair(self) -> pv.Pair:
        return small_ladder()

    def make_batch(self) -> tuple[Tensor, ...]:
        return (torch.randint(0, 17, (5, 1, 4, 4)) / 16,)


class TestBatchNormalisedLadder(PairContract):
    # What is said of a pair that couples the data of a batch while it trains.
    expected_findings = (("not trainable this way", ""),)

    def make_pair(self) -> pv.Pair:
        return LadderVAE((1, 4, 4), (4, 3, 2), pv.DiscretisedLogistic(17), hidden=(8, 8, 8), batch_norm=True).eval()

    def make_batch(self) -> tuple[Tensor, ...]:
        return (torch.randint(0, 17, (5, 1, 4, 4)) / 16,)


def test_batch_norm_couples_data_while_training_alone() -> None:
    torch.manual_seed(0)
    pair = LadderVAE((4,), (3, 2), pv.Gaussian(pv.FixedScale(1.0)), hidden=(8, 8), batch_norm=True)
    x, other = torch.randn(2, 6, 4)
    changed = torch.cat([x[:3], other[3:]])

    def means(batch: Tensor) -> Tensor:
        # Of the first three data, which both batches hold.
        with torch.no_grad():
            return pair.evidence[1](pair.bottom_up[1](pair.bottom_up[0](batch))).mean[:3]

    assert not torch.allclose(means(x), means(changed))
    pair.eval()
    torch.testing.assert_close(means(x), means(changed), **ROUNDING)


def test_a_short_last_batch_of_one_datum_is_trained_on() -> None:
    pair = LadderVAE((1, 4, 4), (4, 3), hidden=(8, 8), batch_norm=True)
    x = torch.randint(0, 2, (9, 1, 4, 4)).double()
    run = pv.fit(pair, x, epochs=2, batch_size=4, capture=True, progress=False)
    assert all(math.isfinite(record["loss"]) for record in run.metrics)


def test_one_layer_is_a_vae() -> None:
    ladder = LadderVAE((1, 4, 4), (3,), hidden=(8,))
    encoder = nn.Sequential(ladder.bottom_up[0], ladder.evidence[0].network)
    vae = VAE((1, 4, 4), pv.StandardNormal(3), pv.Bernoulli(), encoder=encoder, decoder=ladder.p_x.network)
    x = torch.randint(0, 2, (5, 1, 4, 4)).double()
    results = []
    for pair in (ladder, vae):
        pyro.set_rng_seed(1)
        results.append(parts(pv.log_terms(pair, x, num_particles=4)))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


# Two linear-Gaussian layers:  z₂ ~ N(0, I),  z₁ ~ N(A z₂, s² I),  x ~ N(W z₁ + b, γ² I)
A_SCALES, W_SCALE, S, GAMMA = torch.tensor([0.8, 1.5], dtype=torch.float64), 1.3, 0.6, 0.4


def set_affine(layer: nn.Linear, weight: Tensor, bias: Tensor, variances: Tensor) -> None:
    """Make a layer return a mean, weight · input + bias, and the raw entries of a constant scale."""
    raw = torch.log(torch.expm1(variances.sqrt() - SMALLEST_GUIDE_SCALE))
    weights = torch.cat([weight, torch.zeros_like(weight)])
    layer.load_state_dict({"weight": weights, "bias": torch.cat([bias, raw])})


def linear_ladder() -> tuple[LadderVAE, Tensor, Tensor, Tensor]:
    """Return the ladder with its exact posterior, and A, W, b.

    W has orthogonal columns of one length w and A orthogonal ones: what x says of z₁ is then N(z₁; Wᵀ(x − b)/w²,
    γ²/w²) in each entry by itself, which the merge multiplies by N(z₁; A z₂, s²); and p(z₂ | x) is diagonal.
    """
    a = torch.linalg.qr(torch.randn(3, 2)).Q * A_SCALES
    w, b = W_SCALE * torch.linalg.qr(torch.randn(5, 3)).Q, torch.randn(5)
    pair = LadderVAE(
        (5,),
        (3, 2),
        pv.Gaussian(pv.FixedScale(GAMMA)),
        hidden=(5, 5),
        bottom_up=[nn.Identity(), nn.Identity()],
        top_down=[nn.Linear(2, 6)],
        decoder=nn.Linear(3, 5),
    ).requires_grad_(False)
    pair.p_x.network.load_state_dict({"weight": w, "bias": b})
    set_affine(pair.p_z[0].network, a, torch.zeros(3), torch.full((3,), S**2))
    seen = GAMMA**2 / W_SCALE**2
    set_affine(pair.evidence[0].network, w.mT / W_SCALE**2, -w.mT @ b / W_SCALE**2, torch.full((3,), seen))
    variance = 1 / (1 + A_SCALES**2 / (S**2 + seen))
    slope = (variance / (S**2 + seen)).unsqueeze(-1) * (a.mT @ w.mT) / W_SCALE**2
    set_affine(pair.evidence[1].network, slope, -slope @ b, variance)
    return pair, a, w, b


def test_two_linear_layers_and_their_exact_posterior_make_every_weight_log_p() -> None:
    pair, a, w, b = linear_ladder()
    x = pv.generate(pair, 7, seed=1).x
    # x = W (A z₂ + s ε) + b + noise: one linear map of (z₂, ε).
    exact = linear_gaussian_log_likelihood(x, torch.cat([w @ a, S * w], -1), b, torch.tensor(GAMMA))
    weights = pv.log_terms(pair, x, num_particles=6).log_weights
    torch.testing.assert_close(weights, exact.expand(6, 7), **ROUNDING)


def test_the_merge_is_the_normalised_product_of_two_gaussians() -> None:
    gaussian, one, other = pv.DiagonalGaussian(), torch.randn(4, 6), torch.randn(4, 6)
    first, second = gaussian(one, (3,)), gaussian(other, (3,))
    product, z = merged(first, second), torch.randn(50, 4, 3)
    difference = first.log_prob(z) + second.log_prob(z) - product.log_prob(z)
    torch.testing.assert_close(difference, difference[:1].expand(50, 4), **ROUNDING)


def test_the_model_alone_is_the_guide_where_the_data_say_nothing() -> None:
    # Evidence so wide that it adds no precision: q(z₁ | z₂, x) is p(z₁ | z₂), and the layer's divergence is zero.
    pair = small_ladder().requires_grad_(False)
    for conditional in pair.evidence[:2]:
        nn.init.zeros_(conditional.network.weight)
        nn.init.constant_(conditional.network.bias, 1e9)
    sites = pv.site_terms(pair, torch.zeros(4, 1, 4, 4), num_particles=3)
    for name in ("z1", "z2"):
        # The mean's pull is 1e9 · σ² / 1e18, about 1e-9, times standardised draws.
        torch.testing.assert_close(sites[name].log_guide, sites[name].log_model, rtol=0, atol=1e-7)


def test_closed_divergences_agree_with_sampled_ones() -> None:
    pair, x = small_ladder(), torch.randint(0, 17, (4, 1, 4, 4)) / 16
    draws = -pv.log_terms(pair, x, num_particles=4000).log_weights.sum(1).detach()
    closed = TraceMeanField_ELBO(num_particles=4000, vectorize_particles=True, max_plate_nesting=1)
    error = 2 * draws.std() / math.sqrt(4000)
    assert abs(closed.loss(pair.model, pair.guide, x) - float(draws.mean())) <= 4 * float(error)


def test_each_layer_is_reported() -> None:
    pair, x = small_ladder(), torch.randint(0, 17, (40, 1, 4, 4)) / 16
    report = pv.collapse_report(pair, x)
    assert list(report.sites) == ["z3", "z2", "z1"]
    assert [len(site.active) for site in report.sites.values() if site.active is not None] == [2, 3, 4]
    digits = pv.data.DataSet("blank", x, x, None, None, levels=17)
    figure = latent_map(pair, digits, [])
    assert figure is not None
    assert len(figure.axes) == 3


# Free bits


def some_terms(*divergences: float) -> LogTerms:
    """Return log-terms with latents whose divergences have these means over the batch."""
    latents = {}
    for i, mean in enumerate(divergences):
        noise = torch.randn(5, 20)
        latents[f"z{i}"] = SiteTerms(torch.zeros(5, 20), noise - noise.mean() + mean)
    log_guide = torch.stack([site.log_guide for site in latents.values()]).sum(0)
    return LogTerms(torch.randn(5, 20), torch.zeros(5, 20), log_guide, latents)


def test_free_bits_below_every_divergence_leave_the_elbo() -> None:
    terms = some_terms(0.7, 2.0)
    torch.testing.assert_close(free_bits(0.5)(terms), elbo(terms), **ROUNDING)


def test_a_site_below_its_free_bits_counts_as_them() -> None:
    terms = some_terms(0.7, 2.0)
    value = free_bits(1.5)(terms)
    torch.testing.assert_close(value.mean(), terms.log_lik.mean() - 1.5 - 2.0, **ROUNDING)
    assert value.mean() <= elbo(terms).mean()


def test_a_site_below_its_free_bits_has_no_gradient() -> None:
    pair, x = linear_ladder()[0].requires_grad_(True), torch.randn(6, 5)
    terms = pv.log_terms(pair, x, num_particles=3)
    free = torch.autograd.grad(free_bits(1e6)(terms).sum(), pair.evidence[1].network.bias, retain_graph=True)
    alone = torch.autograd.grad(terms.log_lik.mean(0).sum(), pair.evidence[1].network.bias)
    torch.testing.assert_close(free[0], alone[0], **ROUNDING)


@pytest.mark.parametrize("floor", [-0.1, math.nan, math.inf])
def test_free_bits_must_be_finite_and_not_negative(floor: float) -> None:
    with pytest.raises(ValueError, match=r"free bits are .*at least 0"):
        free_bits(floor)


def test_free_bits_keep_their_name(tmp_path: Path) -> None:
    x = torch.zeros(8, 1, 4, 4)
    pv.fit(small_ladder(), x, epochs=1, batch_size=4, loss=free_bits(0.5), run_dir=tmp_path / "run", progress=False)
    assert "free_bits(0.5)" in (tmp_path / "run" / "config.json").read_text()


# Bad input


def test_layers_below_one_are_refused() -> None:
    blank = torch.zeros(3, 1, 4, 4)
    with pytest.raises(ValueError, match="at least 1 layer"):
        LadderVAE((4,), ())
    with pytest.raises(ValueError, match="layers is 0"):
        LadderVAERecipe(layers=0).build(pv.data.DataSet("blank", blank, blank, None, None, levels=17))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sizes": (3, 0)}, r"sizes is \[3, 0\]"),
        ({"sizes": (3, 2), "hidden": (8,)}, "hidden has 1 entries; 2 layers need 2"),
        ({"sizes": (3, 2), "bottom_up": [nn.Identity()]}, "bottom_up has 1 entries; 2 layers need 2"),
        ({"sizes": (3, 2), "top_down": []}, "top_down has 0 entries; 2 layers need 1"),
    ],
)
def test_networks_must_be_one_for_each_layer(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LadderVAE((4,), **arguments)  # type: ignore[arg-type]
