"""Closed-form losses against Pyro's estimators on the same draws, and exact expectations."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.distributions.kl import affine_expected_kl, affine_expected_squared_error, kl_diagonal, kl_standard_normal
from pyro_vae.distributions.mixture_kl import convex_kl_bound, monte_carlo_kl, variational_kl_bound
from pyro_vae.models import SRVAE, VAE, LinearGaussianVAE
from pyro_vae.networks.mlp import MLP
from pyro_vae.pair.pair import Pair
from tests.support.images import gray

LOG_2PI = 1.8378770664093453
ROUNDING = {"rtol": 1e-10, "atol": 1e-12}
X_SHAPE, Y_SHAPE, SIZE = (1, 4, 4), (1, 2, 2), 2


class ConstantScale(nn.Module):
    """Return an affine mean and raw scales that do not depend on the inputs."""

    def __init__(self, shapes: list[tuple[int, ...]], size: int) -> None:
        super().__init__()
        self.mean = MLP(shapes, size, hidden=())
        self.raw = nn.Parameter(torch.randn(size))

    def forward(self, *inputs: Tensor) -> Tensor:
        mean = self.mean(*inputs)
        return torch.cat([mean, self.raw.expand_as(mean)], -1)


def small_vae(prior: nn.Module, likelihood: nn.Module | None = None) -> VAE:
    return VAE(X_SHAPE, prior, likelihood, encoder=MLP([X_SHAPE], 2 * SIZE, (8,)), decoder=MLP([(SIZE,)], 16, (8,)))


def small_srvae(prior: nn.Module, transition: str) -> SRVAE:
    y_outputs = 8 if transition == "discretised" else 4
    networks = {
        "q_u": MLP([Y_SHAPE], 2 * SIZE, (8,)),
        "q_z": MLP([X_SHAPE], 2 * SIZE, (8,)),
        "p_y": MLP([(SIZE,)], y_outputs, (8,)),
        "p_z": MLP([Y_SHAPE, (SIZE,)], 2 * SIZE, (8,)),
        "p_x": MLP([Y_SHAPE, (SIZE,)], 16, (8,)),
    }
    levels = 17 if transition == "discretised" else None
    return SRVAE(X_SHAPE, 2, prior, transition, levels=levels, networks=networks)


def standard() -> pv.StandardNormal:
    return pv.StandardNormal(SIZE)


def mixture() -> pv.MixtureOfGaussians:
    return pv.MixtureOfGaussians(3, SIZE, weights=torch.tensor([0.2, 0.5, 0.3]), means=2 * torch.randn(3, SIZE))


PAIRS: dict[str, Callable[[nn.Module], Pair]] = {
    "VAE": small_vae,
    "VAE, Bernoulli": lambda prior: small_vae(prior, pv.Bernoulli()),
    "SRVAE, delta": lambda prior: small_srvae(prior, "delta"),
    "SRVAE, discretised": lambda prior: small_srvae(prior, "discretised"),
    "SRVAE, gaussian": lambda prior: small_srvae(prior, "gaussian"),
}
MEAN_FIELD = [name for name in PAIRS if name != "SRVAE, gaussian"]


def images(name: str, size: int = 3) -> Tensor:
    return gray(2, size, *X_SHAPE) if "Bernoulli" in name else gray(17, size, *X_SHAPE)


def gradients(pair: Pair, loss: Tensor) -> dict[str, Tensor]:
    return dict(zip(dict(pair.named_parameters()), torch.autograd.grad(loss, list(pair.parameters())), strict=True))


def grouped(draw: Callable[[int], Tensor], groups: int = 100, size: int = 100) -> tuple[Tensor, Tensor]:
    """Return the mean of ``groups`` means of ``size`` draws each, and its standard error."""
    with torch.no_grad():
        means = torch.stack([draw(size) for _ in range(groups)])
    return means.mean(0), means.std(0) / groups**0.5


def analytic_mean(pair: Pair, x: Tensor) -> tuple[Tensor, Tensor]:
    return grouped(lambda k: pv.analytic_loss(pair, x, num_particles=k).total)


def sampled_mean(pair: Pair, x: Tensor) -> tuple[Tensor, Tensor]:
    return grouped(lambda k: -pv.log_terms(pair, x, num_particles=k).log_weights.mean(0))


def assert_same_mean(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> None:
    """Hold two independent sampled means against each other, at four standard errors of their difference."""
    assert ((a[0] - b[0]).abs() <= 4 * (a[1] ** 2 + b[1] ** 2).sqrt()).all()


@pytest.mark.parametrize("num_particles", [1, 3])
@pytest.mark.parametrize("name", MEAN_FIELD)
def test_analytic_loss_is_pyros_mean_field_loss_on_the_same_draws(name: str, num_particles: int) -> None:
    pair, x = PAIRS[name](standard()), images(name)
    pyro.set_rng_seed(7)
    ours = pv.analytic_loss(pair, x, num_particles=num_particles).total.sum()
    pyro.set_rng_seed(7)
    elbo = TraceMeanField_ELBO(num_particles=num_particles, vectorize_particles=True, max_plate_nesting=1)
    theirs = elbo.differentiable_loss(pair.model, pair.guide, x)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=0)
    found, expected = gradients(pair, ours), gradients(pair, theirs)
    assert set(found) == set(dict(pair.named_parameters()))
    for parameter in found:
        # An entry of a gradient may be a difference of large ones: rounding is relative to the tensor's largest.
        largest = float(expected[parameter].abs().max())
        assert largest > 0
        torch.testing.assert_close(found[parameter], expected[parameter], rtol=1e-10, atol=1e-10 * largest)


@pytest.mark.parametrize("name", PAIRS)
def test_analytic_loss_has_the_expectation_of_the_sampled_loss(name: str) -> None:
    pair, x = PAIRS[name](standard()), images(name)
    assert_same_mean(analytic_mean(pair, x), sampled_mean(pair, x))


@pytest.mark.parametrize("name", PAIRS)
def test_log_weights_average_to_pyros_sampled_loss_on_the_same_draws(name: str) -> None:
    pair, x = PAIRS[name](mixture()), images(name)
    pyro.set_rng_seed(7)
    ours = -pv.log_terms(pair, x, num_particles=50).log_weights.mean(0).sum()
    pyro.set_rng_seed(7)
    elbo = Trace_ELBO(num_particles=50, vectorize_particles=True, max_plate_nesting=1)
    theirs = torch.as_tensor(elbo.loss(pair.model, pair.guide, x))
    torch.testing.assert_close(ours.detach(), theirs, rtol=1e-10, atol=0)


@pytest.mark.parametrize("name", PAIRS)
def test_terms_add_up_and_keep_the_batch(name: str) -> None:
    pair, x = PAIRS[name](mixture()), images(name)
    loss = pv.analytic_loss(pair, x, num_particles=2)
    assert all(term.shape == (3,) for term in loss)
    torch.testing.assert_close(sum(loss), loss.total, **ROUNDING)
    observed_or_latent = {"VAE": {"x", "z"}, "SRVAE": {"x", "y", "u", "z"}}[type(pair).__name__]
    assert set(loss._asdict()) == observed_or_latent == set(pv.site_terms(pair, x))


@pytest.mark.parametrize("name", PAIRS)
def test_mixture_prior_orders_the_three_losses(name: str) -> None:
    pair, x = PAIRS[name](mixture()), images(name)
    # As many draws of the divergence as of the reconstruction: a mean of only 100 is too skewed for a normal error.
    sampled_kl = partial(monte_carlo_kl, num_particles=100)
    means = {
        kl: grouped(lambda k, kl=kl: pv.analytic_loss(pair, x, num_particles=k, mixture_kl=kl).total)
        for kl in (sampled_kl, variational_kl_bound, convex_kl_bound)
    }
    for tighter, looser in ((sampled_kl, variational_kl_bound), (variational_kl_bound, convex_kl_bound)):
        (low, low_error), (high, high_error) = means[tighter], means[looser]
        assert (low <= high + 4 * (low_error**2 + high_error**2).sqrt()).all()
    assert_same_mean(means[sampled_kl], sampled_mean(pair, x))
    pyro.set_rng_seed(7)
    variational = pv.analytic_loss(pair, x, num_particles=5, mixture_kl=variational_kl_bound).total
    pyro.set_rng_seed(7)
    convex = pv.analytic_loss(pair, x, num_particles=5).total
    assert (variational < convex).all(), "on the same draws the order holds without any sampling error"


def test_affine_vae_has_the_closed_expected_loss() -> None:
    decoder = MLP([(SIZE,)], 16, hidden=())
    pair = VAE(X_SHAPE, standard(), pv.Gaussian(pv.FixedScale(0.4)), decoder=decoder)
    x = torch.randn(3, *X_SHAPE)
    with torch.no_grad():
        q = pair.q_z(x).base_dist
        (layer,) = decoder.layers
        squares = affine_expected_squared_error(x.flatten(1), layer.weight, layer.bias, q.loc, q.scale)
        expected = squares / (2 * 0.4**2) + 16 * (torch.tensor(0.4).log() + LOG_2PI / 2)
        expected = expected + kl_standard_normal(q.loc, q.scale)
    exact = (expected, torch.zeros(3))
    assert_same_mean(analytic_mean(pair, x), exact)
    assert_same_mean(sampled_mean(pair, x), exact)


def affine_srvae(transition: str) -> SRVAE:
    networks = {
        "q_u": ConstantScale([Y_SHAPE], SIZE),
        "q_z": MLP([X_SHAPE], 2 * SIZE, (8,)),
        "p_y": MLP([(SIZE,)], 4, hidden=()),
        "p_z": ConstantScale([Y_SHAPE, (SIZE,)], SIZE),
        "p_x": MLP([Y_SHAPE, (SIZE,)], 16, hidden=()),
    }
    x_head, y_head = pv.Gaussian(pv.FixedScale(0.5)), pv.Gaussian(pv.FixedScale(0.3))
    pair = SRVAE(X_SHAPE, 2, standard(), transition, x_head, y_head, networks=networks)
    if transition == "gaussian":
        pair.s = pv.FixedScale(0.2)
    return pair


def gaussian_cost(squares: Tensor, scale: float, size: int) -> Tensor:
    return squares / (2 * scale**2) + size * (torch.tensor(scale).log() + LOG_2PI / 2)


def expected_loss(pair: SRVAE, x: Tensor, s: float) -> Tensor:
    """Return the expected −ELBO of :func:`affine_srvae`, y = d(x) + s ε, by moments alone; s = 0 is a point mass."""
    y = pair.down_scale(x).flatten(1)
    y_scale = torch.full_like(y, s)
    u, z = pair.q_u(y.unflatten(1, Y_SHAPE)).base_dist, pair.q_z(x).base_dist
    (q_layer,), (y_layer,), (x_layer,) = pair.q_u.network.mean.layers, pair.p_y.network.layers, pair.p_x.network.layers
    (z_layer,) = pair.p_z.network.mean.layers
    of_y, of_u = z_layer.weight.split([4, SIZE], 1)
    p_z = pair.p_z(y.unflatten(1, Y_SHAPE), u.loc).base_dist
    # x from (y, z); y minus its own reconstruction from (ε_y, u), u's mean moving with y by the rows of q_layer.
    x_mean, x_scale = torch.cat([y, z.loc], 1), torch.cat([y_scale, z.scale], 1)
    x_squares = affine_expected_squared_error(x.flatten(1), x_layer.weight, x_layer.bias, x_mean, x_scale)
    y_weight = torch.cat([y_layer.weight @ q_layer.weight - torch.eye(4), y_layer.weight], 1)
    u_mean, u_scale = torch.cat([torch.zeros_like(y), u.loc], 1), torch.cat([y_scale, u.scale], 1)
    y_squares = affine_expected_squared_error(y, y_weight, y_layer.bias, u_mean, u_scale)
    kl_u = kl_standard_normal(u.loc, u.scale) + 0.5 * s**2 * (q_layer.weight**2).sum()
    kl_z = kl_diagonal(z.loc, z.scale, p_z.loc, p_z.scale)
    z_weight = torch.cat([of_y + of_u @ q_layer.weight, of_u], 1)
    kl_z = affine_expected_kl(kl_z, z_weight, u_scale, p_z.scale[0])
    entropy = 4 / 2 * (1 + LOG_2PI + 2 * torch.tensor(s).log()) if s else 0.0
    return gaussian_cost(x_squares, 0.5, 16) + gaussian_cost(y_squares, 0.3, 4) + kl_u + kl_z - entropy


@pytest.mark.parametrize(("transition", "s"), [("delta", 0.0), ("gaussian", 0.2)])
def test_affine_srvae_has_the_closed_expected_loss(transition: str, s: float) -> None:
    pair, x = affine_srvae(transition), torch.randn(3, *X_SHAPE)
    with torch.no_grad():
        exact = (expected_loss(pair, x, s), torch.zeros(3))
    assert_same_mean(analytic_mean(pair, x), exact)
    assert_same_mean(sampled_mean(pair, x), exact)


@pytest.mark.filterwarnings("ignore:Failed to verify mean field restriction")
def test_mean_field_loss_misses_the_covariance_of_y_and_u_in_reading_gaussian() -> None:
    pair, x = affine_srvae("gaussian"), torch.randn(1, *X_SHAPE)
    with torch.no_grad():  # u follows y closely, and ŷ follows u: tr(W_y A) = 2
        pair.q_u.network.mean.layers[0].weight.copy_(torch.eye(SIZE, 4))
        pair.p_y.network.layers[0].weight.copy_(torch.eye(4, SIZE))
        pair.q_u.network.raw.fill_(-3.0)
    elbo = TraceMeanField_ELBO(num_particles=400, vectorize_particles=True, max_plate_nesting=1)
    mean, error = grouped(lambda _: torch.as_tensor(elbo.loss(pair.model, pair.guide, x)))
    with torch.no_grad():
        # It averages ‖y − ŷ(u)‖² as though y were independent of u: the cross term −2 s² tr(W_y A) is lost.
        missing = torch.tensor(2 * 0.2**2 * 2 / (2 * 0.3**2))
        exact = expected_loss(pair, x, 0.2).squeeze()
    assert missing.abs() > 8 * error, "the case must tell the two values apart"
    assert (mean - exact - missing).abs() <= 4 * error


def test_a_pair_without_a_closed_form_is_refused() -> None:
    with pytest.raises(ValueError, match="LinearGaussianVAE has no closed form"):
        pv.analytic_loss(LinearGaussianVAE(5, 2), torch.randn(3, 5))


@pytest.mark.parametrize("num_particles", [0, -1])
def test_fewer_than_one_particle_is_refused(num_particles: int) -> None:
    with pytest.raises(ValueError, match="num_particles"):
        pv.analytic_loss(small_vae(standard()), images("VAE"), num_particles=num_particles)
