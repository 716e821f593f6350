"""β-VAE keeps the contract, is the VAE at β = 1, and takes its divergence to its capacity."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.cli.recipes.beta_vae import BetaVAERecipe
from pyro_vae.inspection import inspect
from pyro_vae.models import VAE, BetaVAE
from pyro_vae.objectives.bounds import capacity_elbo, elbo
from pyro_vae.objectives.loss import check_loss
from pyro_vae.pair.terms import LogTerms

# Sums of a few dozen terms of order ten in float64.
ROUNDING = {"rtol": 1e-10, "atol": 1e-10}


def bits(size: int = 4) -> Tensor:
    return torch.rand(size, 6).gt(0.5).to(torch.get_default_dtype())


def small(**kwargs: Any) -> BetaVAE:
    return BetaVAE((6,), pv.StandardNormal(2), encoder=nn.Linear(6, 4), decoder=nn.Linear(2, 6), **kwargs)


class TestBetaVAE(pv.testing.PairContract):
    def make_pair(self) -> pv.Pair:
        return small()

    def make_batch(self) -> tuple[Tensor, ...]:
        return (bits(),)


class TestWithCapacity(TestBetaVAE):
    def make_pair(self) -> pv.Pair:
        return small(capacity=pv.Annealed(0.0, 5.0, 3))


@pytest.mark.parametrize("beta", [0.0, 1.0, 4.0])
def test_the_objective_is_the_elbo_less_beta_minus_one_divergences(beta: float) -> None:
    pair, x = small(beta=beta), bits()
    torch.manual_seed(0)
    sites = pv.site_terms(pair, x, num_particles=5)
    torch.manual_seed(0)
    terms = pv.log_terms(pair, x, num_particles=5)
    divergence = (sites["z"].log_guide - sites["z"].log_model).mean(0)
    bound = sites["x"].log_model.mean(0) - divergence
    torch.testing.assert_close(pair.objective()(terms), bound - (beta - 1) * divergence, **ROUNDING)
    if beta == 1:
        torch.testing.assert_close(pair.objective()(terms), elbo(terms), **ROUNDING)


def test_the_likelihood_is_the_vaes() -> None:
    ours, x = small(beta=10.0), bits()
    theirs = VAE((6,), pv.StandardNormal(2), pv.Bernoulli(), encoder=nn.Linear(6, 4), decoder=nn.Linear(2, 6))
    theirs.load_state_dict(ours.state_dict())
    values = [pv.log_likelihood(pair, x, num_particles=10, seed=1).per_datum for pair in (ours, theirs)]
    assert torch.equal(*values)


def test_a_capacity_pulls_the_divergence_towards_itself() -> None:
    terms = LogTerms(*torch.randn(3, 5, 7))
    divergence = (terms.log_guide - terms.log_prior).mean()
    for capacity in (0.0, 3.0):
        value = capacity_elbo(10.0, pv.Annealed(0.0, capacity, 0))(terms)
        torch.testing.assert_close(value, terms.log_lik.mean(0) - 10 * (divergence - capacity).abs(), **ROUNDING)


@pytest.mark.parametrize("target", [0.0, 2.0])
def test_training_takes_the_divergence_to_the_capacity(target: float) -> None:
    torch.manual_seed(0)
    pair, x = small(beta=200.0, capacity=pv.Annealed(0.5, target, 10)), bits(256)
    pv.fit(pair, x, epochs=60, batch_size=64, lr=1e-2, loss=pair.objective(), progress=False)
    q = pair.q_z(x)
    divergence = torch.distributions.kl_divergence(q, pair.prior().expand([256])).mean()
    # The batch's sampled divergence, which is what is held, varies by about one nat over its 64 data's square root.
    assert abs(float(divergence.detach()) - target) <= 4 / math.sqrt(64)


def test_the_recorded_step_follows_the_capacity() -> None:
    torch.manual_seed(0)
    pair, x, finals = small(capacity=pv.Annealed(0.0, 3.0, 2)), bits(96), []
    state = {name: value.clone() for name, value in pair.state_dict().items()}
    for capture in (True, False):
        pair.load_state_dict(state)
        options: Any = {"lr": 1e-2, "loss": pair.objective(), "seed": 0, "progress": False}
        pv.fit(pair, x, epochs=3, batch_size=16, capture=capture, **options)
        finals.append(torch.cat([p.detach().flatten().clone() for p in pair.parameters()]))
    assert float(pair.capacity()) == 3.0
    torch.testing.assert_close(*finals, **ROUNDING)


def test_a_resumed_run_goes_on_with_its_capacity(tmp_path: Any) -> None:
    x, finals = bits(64), []
    for parts in ((4,), (2, 4)):
        torch.manual_seed(0)
        pair = small(capacity=pv.Annealed(0.0, 3.0, 4))
        for i, epochs in enumerate(parts):
            torch.manual_seed(0)
            pair = small(capacity=pv.Annealed(0.0, 3.0, 4))
            options: Any = {"run_dir": tmp_path / str(len(parts)), "resume": i > 0, "progress": False}
            pv.fit(pair, x, epochs=epochs, batch_size=16, loss=pair.objective(), **options)
        finals.append(torch.cat([p.detach().flatten() for p in pair.parameters()]))
    assert torch.equal(*finals)


def test_a_resumed_run_under_another_weight_is_refused(tmp_path: Any) -> None:
    pair, x = small(), bits(32)
    for make in (lambda w: small(beta=w).objective(), lambda w: pv.TotalCorrelationELBO(w, 32)):
        folder = tmp_path / getattr(make(1.0), "__name__", "tc")
        pv.fit(pair, x, epochs=1, batch_size=16, loss=make(2.0), run_dir=folder, progress=False)
        with pytest.raises(ValueError, match="begun with other settings: loss"):
            pv.fit(pair, x, epochs=2, batch_size=16, loss=make(3.0), run_dir=folder, resume=True, progress=False)


def test_a_capacity_of_another_module_is_refused() -> None:
    objective = capacity_elbo(1.0, pv.Annealed(0.0, 3.0, 2))
    with pytest.raises(ValueError, match=r"capacity_elbo\(1, 0 to 3 in 2 epochs\) follows a number that is no module"):
        check_loss(inspect(small(), (bits(),)), objective, (bits(),), num_particles=1, uses_beta=False)


@pytest.mark.parametrize("penalty", ["divergence", "capacity", "total-correlation"])
def test_every_penalty_of_the_command_line_trains(penalty: Any) -> None:
    torch.manual_seed(0)
    options, x = BetaVAERecipe(latent=2, likelihood="bernoulli", penalty=penalty, weight=2.0), bits(64)
    x = x.reshape(64, 1, 2, 3)
    pair = options.build(pv.data.DataSet("blank", x, x, None, None, levels=2))
    run = pv.fit(pair, x, epochs=8, batch_size=32, lr=1e-2, loss=options.loss(pair, 64), progress=False)
    assert run.metrics[-1]["terms"]["x"] < run.metrics[0]["terms"]["x"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: small(beta=-1.0), r"beta is -1.0"),
        (lambda: small(beta=math.inf), r"beta is inf"),
        (lambda: small(beta=math.nan, capacity=pv.Annealed(0.0, 1.0, 1)), r"weight is nan"),
        (lambda: small(capacity=pv.Annealed(0.0, -1.0, 1)), r"from 0.0 to -1.0; a divergence is never negative"),
    ],
)
def test_bad_numbers_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
