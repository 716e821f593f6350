"""The doubly reparameterised gradient: the mean of the plain one, less noise, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import transforms
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.inspection import inspect
from pyro_vae.models import VAE, LinearGaussianMixtureVAE, LinearGaussianVAE
from pyro_vae.objectives.bounds import iwae
from pyro_vae.objectives.loss import check_loss


class Chain(pv.Pair):
    """z₁ → z₂ → x, with a guide whose z₂ depends on its z₁ and shares a parameter with the model."""

    def __init__(self) -> None:
        super().__init__()
        self.x_shape = ()
        self.shared = nn.Parameter(torch.tensor(0.7))
        self.own = nn.Parameter(torch.tensor([0.3, -0.2, 0.4, -0.3]))

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            first = pyro.sample("z1", dist.Normal(0.0, 1.0))
            second = pyro.sample("z2", dist.Normal(self.shared * first, 0.8))
            pyro.sample("x", dist.Normal(second, 0.5), obs=x)

    def guide(self, x: Tensor) -> None:
        a, b, c, d = self.own
        with pyro.plate("data", len(x)):
            first = pyro.sample("z1", dist.Normal(a * x, b.exp()))
            pyro.sample("z2", dist.Normal(self.shared * first + c * x, d.exp()))


class Plated(pv.Pair):
    """Two observations and two latents per datum, in a plate of the pair's own to the left of the data."""

    max_plate_nesting = 2

    def __init__(self) -> None:
        super().__init__()
        self.x_shape = (2,)
        self.scales = nn.Parameter(torch.tensor([-0.4, 0.1]))

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)), pyro.plate("parts", 2, dim=-2):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 0.7), obs=x.mT)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)), pyro.plate("parts", 2, dim=-2):
            pyro.sample("z", dist.Normal(0.3 * x.mT.unsqueeze(-1), self.scales.exp()).to_event(1))


def gradients(pair: pv.Pair, loss: Callable[[], Tensor]) -> Tensor:
    parts = torch.autograd.grad(loss(), list(pair.parameters()), allow_unused=True)
    filled = [torch.zeros_like(p) if g is None else g for p, g in zip(pair.parameters(), parts, strict=True)]
    return torch.cat([part.flatten() for part in filled])


def both(pair: pv.Pair, x: Tensor, particles: int, repeats: int) -> tuple[Tensor, Tensor]:
    """Return draws of the doubly reparameterised and of the plain gradient, each (R, P)."""
    loss = pv.DReG(num_particles=particles)
    ours = [gradients(pair, lambda: loss.differentiable_loss(pair.model, pair.guide, x)) for _ in range(repeats)]
    plain = [
        gradients(pair, lambda: -iwae(pv.log_terms(pair, x, num_particles=particles)).sum()) for _ in range(repeats)
    ]
    return torch.stack(ours), torch.stack(plain)


def wide_vae() -> VAE:
    return VAE((3,), pv.StandardNormal(2), encoder=nn.Linear(3, 4), decoder=nn.Linear(2, 3))


@pytest.mark.parametrize("make", [wide_vae, Chain, Plated, lambda: LinearGaussianVAE(3, 2)])
@pytest.mark.parametrize("particles", [1, 5])
def test_the_mean_is_that_of_the_plain_gradient(make: Callable[[], pv.Pair], particles: int) -> None:
    pair = make()
    # Many copies of three data make one call an average over many draws.
    x = torch.randn(3, *pair.x_shape).repeat(50, *[1] * len(pair.x_shape))
    ours, plain = both(pair, x, particles, 60)
    error = ((ours.var(0) + plain.var(0)) / 60).sqrt()
    assert ((ours.mean(0) - plain.mean(0)).abs() <= 4 * error + 1e-9).all()


def test_the_guides_gradient_is_less_noisy_with_many_particles() -> None:
    pair, x = Chain(), torch.randn(4)
    ours, plain = both(pair, x, 200, 200)
    # The guide's own parameters; 200 draws leave a variance a relative error of 0.1, and the gain is a factor of many.
    assert (ours.var(0)[1:] < 0.5 * plain.var(0)[1:]).all()


def test_an_exact_guide_has_no_noise_at_all() -> None:
    # log w is constant in z there, so that each draw's share of the guide's gradient is zero.
    class Scaled(LinearGaussianVAE):
        def __init__(self) -> None:
            super().__init__(3, 1)
            self.shift = nn.Parameter(torch.zeros(()))

        def guide(self, x: Tensor) -> None:
            exact = self.exact_posterior(x)
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(exact.mean + self.shift, exact.stddev).to_event(1))

    pair, x = Scaled(), torch.randn(4, 3)
    position = [name for name, _ in pair.named_parameters()].index("shift")
    loss = pv.DReG(num_particles=6).differentiable_loss(pair.model, pair.guide, x)
    gradient = torch.autograd.grad(loss, list(pair.parameters()))[position]
    torch.testing.assert_close(gradient, torch.zeros(()), rtol=0, atol=1e-10)


def test_the_value_is_the_bound() -> None:
    pair, x = wide_vae(), torch.randn(4, 3)
    torch.manual_seed(0)
    loss = pv.DReG(num_particles=6).loss(pair.model, pair.guide, x)
    torch.manual_seed(0)
    assert loss == pytest.approx(-float(iwae(pv.log_terms(pair, x, num_particles=6)).sum().detach()), rel=1e-12)


def test_fit_and_pyros_own_loop_train_with_it() -> None:
    pair, x = wide_vae(), torch.randn(64, 3)
    run = pv.fit(pair, x, epochs=20, batch_size=32, lr=1e-2, loss=pv.DReG(num_particles=5), progress=False)
    assert run.metrics[-1]["loss"] < run.metrics[0]["loss"]
    before = [parameter.clone() for parameter in pair.parameters()]
    pyro.infer.SVI(pair.model, pair.guide, pyro.optim.Adam({"lr": 1e-2}), pv.DReG(num_particles=5)).step(x)
    assert all(not torch.equal(old, new) for old, new in zip(before, pair.parameters(), strict=True))


class Flow(pv.Pair):
    """A guide through flows over two latents, after an affine one of its own."""

    def __init__(self, transform: Any) -> None:
        super().__init__()
        self.x_shape, self.transform = (2,), transform
        self.log_scale = nn.Parameter(torch.tensor([-0.3, 0.2]))

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        base = dist.Normal(0.5 * x, 0.6).to_event(1)
        affine = transforms.AffineTransform(0.1, self.log_scale.exp(), event_dim=1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.TransformedDistribution(base, [affine, self.transform]))


@pytest.mark.parametrize("make", [transforms.Householder, transforms.affine_coupling, transforms.affine_autoregressive])
def test_a_flow_with_an_inverse_is_scored_again(make: Any) -> None:
    pair = Flow(make(2))
    ours, plain = both(pair, torch.randn(3, 2).repeat(50, 1), 4, 60)
    error = ((ours.var(0) + plain.var(0)) / 60).sqrt()
    assert ((ours.mean(0) - plain.mean(0)).abs() <= 4 * error + 1e-9).all()


class _KeepsItsDeterminant(transforms.AffineTransform):
    """An affine map that hands out the log-determinant of the first draw it made, as a cached flow may."""

    kept: Tensor | None = None

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        self.kept = super().log_abs_det_jacobian(x, y) if self.kept is None else self.kept
        return self.kept


def test_a_flow_without_an_inverse_is_refused() -> None:
    pair = Flow(transforms.planar(2))
    with pytest.raises(ValueError, match=r"guide's site 'z' cannot be scored again .*objective iwae"):
        pv.DReG(2).loss_and_grads(pair.model, pair.guide, torch.randn(3, 2))


def test_a_density_that_remembers_its_draw_is_refused() -> None:
    pair = Flow(None)
    pair.transform = _KeepsItsDeterminant(0.0, pair.log_scale.exp(), event_dim=1)
    with pytest.raises(ValueError, match=r"guide's site 'z' cannot be scored again .*cache nothing of the draw"):
        pv.DReG(2).loss_and_grads(pair.model, pair.guide, torch.randn(3, 2))


def test_draws_without_a_gradient_are_refused() -> None:
    pair = LinearGaussianMixtureVAE(4, pv.MixtureOfGaussians(3, 2))
    with pytest.raises(ValueError, match=r"guide's site 'c' \(Categorical\) has no rsample.*Trace_ELBO"):
        pv.DReG(2).loss_and_grads(pair.model, pair.guide, torch.randn(3, 4))


def test_a_learned_point_mass_is_refused() -> None:
    class Mode(LinearGaussianVAE):
        def guide(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Delta(self.exact_posterior(x).mean, event_dim=1))

    pair = Mode(3, 1)
    with pytest.raises(ValueError, match=r"'z' is a point mass at a learned place"):
        pv.DReG(2).loss_and_grads(pair.model, pair.guide, torch.randn(3, 3))


def test_a_given_point_mass_is_data() -> None:
    pair = pv.models.SRVAE((1, 4, 4), 2, pv.StandardNormal(2), "delta")
    x = torch.rand(3, 1, 4, 4)
    torch.manual_seed(0)
    loss = pv.DReG(num_particles=3).loss_and_grads(pair.model, pair.guide, x)
    torch.manual_seed(0)
    assert loss == pytest.approx(-float(iwae(pv.log_terms(pair, x, num_particles=3)).sum().detach()), rel=1e-12)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="num_particles is 0"):
        pv.DReG(0)
    pair, x = wide_vae(), torch.randn(3, 3)
    with pytest.raises(ValueError, match=r"give it pair\.model, pair.guide"):
        pv.DReG().loss(lambda x: None, pair.guide, x)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="beta weighs the divergence"):
        check_loss(inspect(pair, (x,)), pv.DReG(2), (x,), num_particles=1, uses_beta=True)


def test_a_guide_that_corrupts_its_data_is_refused() -> None:
    pair = pv.models.DenoisingVAE((3,), pv.StandardNormal(2), pv.GaussianNoise(0.1), pv.Gaussian())
    with pytest.raises(ValueError, match=r"density at 'z' changes from run to run .*use the objective iwae"):
        check_loss(
            inspect(pair, (torch.randn(4, 3),)), pv.DReG(4), (torch.randn(4, 3),), num_particles=1, uses_beta=False
        )
