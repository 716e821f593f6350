"""Priors, scales and heads: densities against their formulas, parameters where they should be."""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

import pyro_vae as pv
from pyro_vae.conditionals.posteriors import SMALLEST_GUIDE_SCALE


def mixture(**kwargs: Any) -> pv.MixtureOfGaussians:
    weights, means = torch.tensor([0.2, 1.0, 0.8]), torch.randn(3, 2)
    return pv.MixtureOfGaussians(3, 2, weights=weights, means=means, scales=torch.rand(3, 2) + 0.3, **kwargs)


def log_joint(prior: pv.MixtureOfGaussians, u: Tensor) -> Tensor:
    """Return log w_i + log N(u; μ_i, diag σ_i²), written out."""
    weights = prior.logits.exp() / prior.logits.exp().sum()
    scales = prior.log_scales.exp()
    squares = ((u.unsqueeze(-2) - prior.means) / scales) ** 2
    return weights.log() - 0.5 * (squares + 2 * scales.log() + math.log(2 * math.pi)).sum(-1)


def test_a_mixture_is_the_sum_of_its_components() -> None:
    prior, u = mixture(), torch.randn(4, 5, 2)
    torch.testing.assert_close(prior().log_prob(u), log_joint(prior, u).logsumexp(-1))
    assert (prior().batch_shape, prior().event_shape) == ((), (2,))


def test_responsibilities_are_bayes_rule() -> None:
    prior, u = mixture(), torch.randn(4, 5, 2)
    joint = log_joint(prior, u).exp()
    torch.testing.assert_close(prior.responsibilities(u), joint / joint.sum(-1, keepdim=True))
    torch.testing.assert_close(prior.responsibilities(u).sum(-1), torch.ones(4, 5))


def test_a_mixture_of_one_is_a_gaussian() -> None:
    prior = pv.MixtureOfGaussians(1, 3, means=torch.zeros(1, 3))
    u = torch.randn(5, 3)
    torch.testing.assert_close(prior().log_prob(u), pv.StandardNormal(3)().log_prob(u))
    assert prior.responsibilities(u).eq(1).all()


def test_a_fixed_mixture_has_no_parameters() -> None:
    learned, fixed = mixture(), mixture(learned=False)
    assert {name for name, _ in learned.named_parameters()} == {"logits", "means", "log_scales"}
    assert not list(fixed.parameters())
    # Yet its values are saved with the pair.
    assert set(fixed.state_dict()) == {"logits", "means", "log_scales"}


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"components": 0}, "components is 0"),
        ({"size": 0}, "size is 0"),
        ({"weights": torch.ones(2)}, r"weights has shape \(2,\), expected \(3,\)"),
        ({"means": torch.ones(3)}, r"means has shape \(3,\), expected \(3, 2\)"),
        ({"scales": torch.ones(2, 3)}, r"scales has shape \(2, 3\), expected \(3, 2\)"),
        ({"weights": torch.tensor([1.0, 0.0, 1.0])}, "must be positive"),
        ({"scales": -torch.ones(3, 2)}, "must be positive"),
    ],
)
def test_bad_mixtures_are_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pv.MixtureOfGaussians(**{"components": 3, "size": 2} | kwargs)


# Scales


@pytest.mark.parametrize("shape", [(), (3, 1, 1), (3, 4, 4)])
def test_a_learned_scale_starts_where_it_is_told(shape: tuple[int, ...]) -> None:
    scale = pv.LearnedScale(0.3, shape)
    assert scale().shape == shape
    torch.testing.assert_close(scale(), torch.full(shape, 0.3))
    assert scale.monitor() == pytest.approx(0.3, rel=1e-12)
    head = pv.Gaussian(scale)
    x = torch.randn(5, 3, 4, 4)
    expected = dist.Normal(torch.zeros(()), 0.3).log_prob(x).sum((1, 2, 3))
    torch.testing.assert_close(head(torch.zeros(5, 3, 4, 4), (3, 4, 4)).log_prob(x), expected)


def test_a_learned_scale_never_falls_below_its_floor() -> None:
    scale = pv.LearnedScale(0.5, floor=0.1)
    with torch.no_grad():
        scale.raw.fill_(-50.0)
    torch.testing.assert_close(scale(), torch.tensor(0.1))
    # Smooth: the gradient fades with e^{2r} and is never cut off, as clamping would.
    with torch.no_grad():
        scale.raw.fill_(-4.0)
    (gradient,) = torch.autograd.grad(scale(), scale.raw)
    expected = math.exp(-8) / math.hypot(0.1, math.exp(-4))
    assert float(gradient) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("initial", "floor"), [(0.1, 0.1), (0.05, 0.1), (0.5, -0.1), (math.nan, 0.0)])
def test_a_scale_starts_above_its_floor(initial: float, floor: float) -> None:
    with pytest.raises(ValueError, match="must start above its floor"):
        pv.LearnedScale(initial, floor=floor)


def test_a_fixed_scale_is_no_parameter() -> None:
    scale = pv.FixedScale(0.2)
    assert not list(scale.parameters())
    assert float(scale()) == 0.2
    for bad in (0.0, -1.0, torch.tensor([1.0, 0.0])):
        with pytest.raises(ValueError, match="a scale must be positive"):
            pv.FixedScale(bad)


def test_the_batch_optimal_scale_fits_the_batch_while_training() -> None:
    scale = pv.BatchOptimalScale(floor=0.0)
    loc, x = torch.randn(6, 4), torch.randn(6, 4)
    mean_square = ((x - loc) ** 2).mean()
    total = scale.normal(loc).log_prob(x).sum()
    # At the best γ the sum of squares over γ² is the number of entries.
    torch.testing.assert_close(total, -0.5 * 24 * (1 + torch.log(2 * math.pi * mean_square)))
    for gamma in (0.9, 1.1):
        assert dist.Normal(loc, gamma * mean_square.sqrt()).log_prob(x).sum() < total


def test_the_batch_optimal_scale_is_an_average_in_evaluation() -> None:
    scale = pv.BatchOptimalScale(momentum=0.5, floor=0.0)
    batches = [torch.full((2, 3), value) for value in (1.0, 2.0, 4.0)]
    for x in batches:
        scale.normal(torch.zeros(2, 3)).log_prob(x)
    # Means of the first two, 1 and 4, then half of 2.5 and half of 16.
    assert float(scale.variance) == pytest.approx(0.5 * 2.5 + 0.5 * 16, rel=1e-12)
    scale.eval()
    before = scale.variance.clone()
    value = scale.normal(torch.zeros(2, 3)).log_prob(batches[0])
    torch.testing.assert_close(value, dist.Normal(0.0, before.sqrt()).log_prob(batches[0]))
    assert torch.equal(scale.variance, before)


# Heads


HEADS = [
    (pv.Bernoulli(), (1, 4, 4), 16, "Bernoulli"),
    (pv.ContinuousBernoulli(), (1, 4, 4), 16, "ContinuousBernoulli"),
    (pv.Gaussian(pv.FixedScale(0.1)), (2, 4, 4), 32, "Normal"),
    (pv.DiscretisedLogistic(17), (1, 4, 4), 32, "DiscretisedLogistic"),
    (pv.DiagonalGaussian(), (3,), 6, "Normal"),
]


@pytest.mark.parametrize(("head", "event", "outputs", "name"), HEADS)
def test_heads_take_flat_outputs_and_images_alike(head: pv.Head, event: Any, outputs: int, name: str) -> None:
    assert head.num_outputs(event) == outputs
    flat = torch.randn(2, 5, outputs)
    distribution = head(flat, event)
    assert (distribution.batch_shape, distribution.event_shape) == ((2, 5), event)
    assert type(distribution.base_dist).__name__ == name
    image = flat.reshape(2, 5, outputs // math.prod(event[1:]), *event[1:])
    x = distribution.sample()
    torch.testing.assert_close(head(image, event).log_prob(x), distribution.log_prob(x))
    with pytest.raises(ValueError, match=rf"the network returns shape \(5, {outputs + 1}\)"):
        head(torch.zeros(5, outputs + 1), event)


def test_the_diagonal_head_reads_means_then_scales() -> None:
    outputs = torch.randn(5, 6)
    distribution = pv.DiagonalGaussian()(outputs, (3,))
    torch.testing.assert_close(distribution.mean, outputs[:, :3])
    torch.testing.assert_close(distribution.stddev, softplus(outputs[:, 3:]) + SMALLEST_GUIDE_SCALE)
    assert float(pv.DiagonalGaussian()(torch.full((2,), -1e3), (1,)).stddev) == SMALLEST_GUIDE_SCALE


def test_the_full_head_has_covariance_a_a_transposed() -> None:
    head, size = pv.FullGaussian(), 3
    assert head.num_outputs((size,)) == 3 + 6
    outputs = torch.randn(2, 5, 9)
    distribution = head(outputs, (size,))
    factor = torch.zeros(2, 5, 3, 3)
    entries = iter(range(3, 9))
    for row in range(3):
        for column in range(row + 1):
            entry = outputs[..., next(entries)]
            factor[..., row, column] = softplus(entry) + SMALLEST_GUIDE_SCALE if row == column else entry
    assert (distribution.batch_shape, distribution.event_shape) == ((2, 5), (3,))
    torch.testing.assert_close(distribution.mean, outputs[..., :3])
    torch.testing.assert_close(distribution.covariance_matrix, factor @ factor.mT)
    assert (distribution.scale_tril.diagonal(dim1=-2, dim2=-1) > 0).all()
    noise = torch.randn(3)
    density = dist.MultivariateNormal(outputs[..., :3], covariance_matrix=factor @ factor.mT)
    torch.testing.assert_close(distribution.log_prob(noise), density.log_prob(noise))


def test_a_full_head_with_no_correlation_is_the_diagonal_one() -> None:
    outputs = torch.randn(5, 5)
    outputs[:, 3] = 0.0
    x = torch.randn(5, 2)
    full = pv.FullGaussian()(outputs, (2,))
    diagonal = pv.DiagonalGaussian()(outputs[:, [0, 1, 2, 4]], (2,))
    torch.testing.assert_close(full.log_prob(x), diagonal.log_prob(x))


def test_a_full_head_says_what_it_needs() -> None:
    with pytest.raises(ValueError, match=r"the network returns shape \(5, 8\)"):
        pv.FullGaussian()(torch.zeros(5, 8), (3,))


def test_conditionals_say_what_their_network_must_return() -> None:
    conditional = pv.Conditional(nn.Linear(3, 7), pv.DiagonalGaussian(), (4,))
    with pytest.raises(ValueError, match=r"the network returns shape \(5, 7\); its last dimensions must be 8 numbers"):
        conditional(torch.zeros(5, 3))


# Free guides


def test_a_free_guide_has_parameters_per_datum() -> None:
    guide = pv.FreeGaussian(10, 2)
    with torch.no_grad():
        guide.loc.copy_(torch.arange(20.0).reshape(10, 2))
    q = guide(torch.zeros(2, 7), torch.tensor([3, 9]))
    assert q.mean.tolist() == [[6.0, 7.0], [18.0, 19.0]]
    assert (q.batch_shape, q.event_shape) == ((2,), (2,))


def test_a_free_guide_says_what_it_lacks() -> None:
    guide = pv.FreeGaussian(10, 2)
    with pytest.raises(ValueError, match=r"pass the data as \(x, torch.arange\(len\(x\)\)\)"):
        guide(torch.zeros(2, 7))
    with pytest.raises(ValueError, match="parameters for data 0 to 9"):
        guide(torch.zeros(2, 7), torch.tensor([3, 10]))
