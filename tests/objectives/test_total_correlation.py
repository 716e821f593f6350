"""The split of the divergence adds up at every draw, and its parts have their exact values where those are known."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.inspection import inspect
from pyro_vae.models import VAE, LinearGaussianMixtureVAE
from pyro_vae.objectives.bounds import beta_elbo, elbo
from pyro_vae.objectives.loss import check_loss
from pyro_vae.objectives.total_correlation import stratified_log_weights
from pyro_vae.training.captured_step import captured_step
from pyro_vae.training.step import eager_step

# Sums of a few dozen numbers of order ten.
ROUNDING = {"rtol": 1e-10, "atol": 1e-10}


class Fixed(nn.Module):
    """q(z | x) = N(x, s² I): the data are the posteriors' means."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor) -> Any:
        return dist.Normal(x, self.scale).to_event(1)


def points(scale: float) -> VAE:
    return VAE((2,), pv.StandardNormal(2), posterior=Fixed(scale), decoder=nn.Linear(2, 2))


def small() -> VAE:
    return VAE((5,), pv.StandardNormal(3), encoder=nn.Linear(5, 6), decoder=nn.Linear(3, 5))


@pytest.mark.parametrize(("batch", "size"), [(6, 6), (6, 100), (1, 7), (1, 1), (2, 2)])
def test_the_parts_add_up_to_the_divergence_at_every_draw(batch: int, size: int) -> None:
    pair, x = small(), torch.randn(batch, 5)
    torch.manual_seed(0)
    parts = pv.divergence_split(pair, x, data_size=size, num_particles=4)
    torch.manual_seed(0)
    terms = pv.log_terms(pair, x, num_particles=4)
    torch.testing.assert_close(sum(parts), (terms.log_guide - terms.log_prior).mean(0), **ROUNDING)


@pytest.mark.parametrize("corners", [2, 4])
def test_narrow_posteriors_have_the_information_of_their_places(corners: int) -> None:
    # On two opposite corners of a square both entries know which: 2 log 2 − log 2. On all four they are independent.
    x = torch.tensor([[1.0, 1], [-1, -1], [1, -1], [-1, 1]])[:corners]
    parts = pv.divergence_split(points(0.01), x, num_particles=50)
    torch.testing.assert_close(parts.mutual_information, torch.full((corners,), math.log(corners)), **ROUNDING)
    expected = math.log(2) if corners == 2 else 0.0
    torch.testing.assert_close(parts.total_correlation, torch.full((corners,), expected), **ROUNDING)


def test_equal_posteriors_tell_nothing() -> None:
    parts = pv.divergence_split(points(0.7), torch.ones(5, 2), num_particles=3)
    for part in parts[:2]:
        torch.testing.assert_close(part, torch.zeros(5), **ROUNDING)


def test_overlapping_posteriors_have_the_total_correlation_of_quadrature() -> None:
    x, scale = torch.tensor([[0.6, 0.6], [-0.6, -0.6]]), 0.5
    grid = torch.linspace(-4.5, 4.5, 721)
    step = float(grid[1] - grid[0])
    one = torch.stack([dist.Normal(m, scale).log_prob(grid) for m in x[:, 0]])
    joint = torch.logsumexp(one.unsqueeze(2) + one.unsqueeze(1), 0) - math.log(2)
    marginal = torch.logsumexp(one, 0) - math.log(2)
    exact = (joint.exp() * (joint - marginal.unsqueeze(1) - marginal)).sum() * step**2
    pair = points(scale)
    values = torch.stack([pv.divergence_split(pair, x, num_particles=40).total_correlation for _ in range(50)])
    assert abs(values.mean() - exact) <= 4 * values.std() / values.numel() ** 0.5


def test_the_average_over_all_batches_is_the_average_posterior() -> None:
    x, size, own = torch.randn(6, 2), 6, 2
    z = torch.randn(2)
    each = Fixed(0.8)(x).log_prob(z).exp()
    for count in (2, 3, 6):
        batches = [b for b in itertools.combinations(range(size), count) if own in b]
        estimates = []
        for batch in batches:
            weights = stratified_log_weights(count, size, like=z)[batch.index(own)].exp()
            estimates.append((weights * each[list(batch)]).sum())
        torch.testing.assert_close(torch.stack(estimates).mean(), each.mean(), **ROUNDING)


def loss_of(pair: pv.Pair, loss: pv.TotalCorrelationELBO, x: Tensor) -> float:
    torch.manual_seed(0)
    return loss.loss(pair.model, pair.guide, x)


def test_weights_of_one_make_the_elbo_and_equal_weights_the_beta_elbo() -> None:
    pair, x = small(), torch.randn(6, 5)
    for beta, objective in ((1.0, elbo), (4.0, beta_elbo(4.0))):
        loss = pv.TotalCorrelationELBO(beta, 40, alpha=beta, gamma=beta, num_particles=3)
        torch.manual_seed(0)
        expected = -objective(pv.log_terms(pair, x, num_particles=3)).sum().detach()
        torch.testing.assert_close(torch.tensor(loss_of(pair, loss, x)), expected, **ROUNDING)


def test_each_weight_weighs_its_part() -> None:
    pair, x = small(), torch.randn(6, 5)
    plain = loss_of(pair, pv.TotalCorrelationELBO(1.0, 40), x)
    torch.manual_seed(0)
    parts = pv.divergence_split(pair, x, data_size=40)
    for name, part in zip(("alpha", "beta", "gamma"), parts, strict=True):
        loss = pv.TotalCorrelationELBO(**{"beta": 1.0, "data_size": 40, name: 3.5})
        torch.testing.assert_close(loss_of(pair, loss, x), plain + 2.5 * float(part.sum().detach()), **ROUNDING)


def test_training_lowers_the_total_correlation_below_that_of_the_elbo() -> None:
    x = torch.randn(256, 2) @ torch.randn(2, 5) + 0.1 * torch.randn(256, 5)
    found = []
    for beta in (1.0, 20.0):
        torch.manual_seed(0)
        pair, loss = small(), pv.TotalCorrelationELBO(beta, 256)
        pv.fit(pair, x, epochs=12, batch_size=64, lr=2e-2, loss=loss, progress=False)
        found.append(pv.divergence_split(pair, x, num_particles=5).total_correlation.mean())
    assert found[1] < found[0]


def test_the_recorded_step_and_pyros_own_loop_take_it() -> None:
    torch.manual_seed(0)
    pair, x = small(), torch.randn(6, 5)
    state = {name: value.clone() for name, value in pair.state_dict().items()}
    losses = []
    for make in (captured_step, eager_step):
        pair.load_state_dict(state)
        step = make(pair, pv.TotalCorrelationELBO(5.0, 40), torch.optim.SGD(pair.parameters(), lr=1e-2))
        torch.manual_seed(1)
        losses.append([step(x) for _ in range(4)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-10)
    svi = pyro.infer.SVI(pair.model, pair.guide, pyro.optim.Adam({"lr": 1e-2}), pv.TotalCorrelationELBO(5.0, 40))
    before = pair.q_z.network.weight.clone()
    svi.step(x)
    assert not torch.equal(before, pair.q_z.network.weight)


def checked(pair: pv.Pair, size: int = 8, data: Tensor | None = None) -> None:
    x = torch.randn(8, 5) if data is None else data
    check_loss(inspect(pair, (x,)), pv.TotalCorrelationELBO(2.0, size), (x,), num_particles=1, uses_beta=False)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pv.TotalCorrelationELBO(-1.0, 5), r"beta is -1.0; a weight must be finite and at least 0"),
        (lambda: pv.TotalCorrelationELBO(1.0, 5, gamma=math.nan), r"gamma is nan"),
        (lambda: pv.TotalCorrelationELBO(1.0, 0), r"data_size is 0"),
        (lambda: pv.TotalCorrelationELBO(1.0, 5, num_particles=0), r"num_particles is 0"),
        (lambda: checked(small(), 9), r"data_size is 9; there are 8 training data"),
        (lambda: pv.divergence_split(small(), torch.randn(4, 5), data_size=3), r"smaller than a batch of 4"),
        (
            lambda: checked(VAE((5,), pv.StandardNormal(2), posterior=pv.FullGaussian())),
            r"site 'z' \(MultivariateNormal\) must be factorised over a vector",
        ),
        (lambda: checked(LinearGaussianMixtureVAE(5, pv.MixtureOfGaussians(3, 2))), r"it has \['c', 'z'\]"),
    ],
)
def test_what_cannot_be_split_is_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
