"""An argument of ``fit`` has its effect, or is refused in one sentence; none is taken and dropped."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch
from pyro.infer import RenyiELBO
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.cli.training import Training
from pyro_vae.objectives.bounds import beta_elbo, elbo, free_bits, iwae, renyi


def vae() -> pv.models.VAE:
    torch.manual_seed(0)
    return pv.models.VAE((4,), pv.StandardNormal(2), encoder=nn.Linear(4, 4), decoder=nn.Linear(2, 4))


def data(size: int = 64) -> Tensor:
    return torch.randn(size, 4, generator=torch.Generator().manual_seed(1))


def fit(pair: pv.Pair, x: Any, **kwargs: Any) -> pv.Run:
    return pv.fit(pair, x, **{"epochs": 1, "batch_size": 16, "progress": False, "device": "cpu"} | kwargs)


def weights(pair: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in pair.parameters()])


# The learning rate


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD])
def test_an_optimiser_class_has_the_learning_rate_asked_for(optimizer: Any, tmp_path: Path) -> None:
    pair, by_hand = vae(), vae()
    run = fit(pair, data(), optimizer=optimizer, lr=0.05, run_dir=tmp_path)
    fit(by_hand, data(), optimizer=lambda parameters: optimizer(parameters, lr=0.05))
    assert run.metrics[-1]["lr"] == 0.05
    assert json.loads((tmp_path / "config.json").read_text())["fit"]["lr"] == 0.05
    assert torch.equal(weights(pair), weights(by_hand))


def test_the_run_folder_holds_the_rate_that_a_function_sets(tmp_path: Path) -> None:
    fit(vae(), data(), optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.02), run_dir=tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["fit"]["lr"] == 0.02


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"lr": 0.1, "optimizer": lambda p: torch.optim.SGD(p, lr=1.0)}, "lr is 0.1, and optimizer is a function"),
        ({"optimizer": lambda p: None}, "optimizer gives NoneType; it must make a torch optimiser"),
        ({"optimizer": pyro.optim.Adam({"lr": 1e-3})}, "optimizer is Pyro's Adam; it must be a function"),
        ({"optimizer": pyro.optim.ClippedAdam({"lr": 1e-3})}, "optimizer is Pyro's ClippedAdam"),
        ({"optimizer": lambda p: torch.optim.Adam(p[2:])}, "leaves out 2 trainable parameters, the first 'p_x"),
        ({"optimizer": lambda p: torch.optim.Adam([*p, nn.Parameter(p[0] + 1)])}, "no parameters of the pair"),
        ({"config": {"note": 1}}, "config adds entries to a run folder's config.json: give run_dir too"),
        ({"beta": 0.0, "warmup": 3}, "warmup is 3, and beta 0"),
    ],
)
def test_an_argument_without_effect_is_refused(kwargs: dict[str, Any], message: str) -> None:
    pair = vae()
    before = weights(pair)
    with pytest.raises(ValueError, match=message):
        fit(pair, data(), **kwargs)
    assert torch.equal(before, weights(pair))


# Bounds of several draws, asked for with one


def own_bound(terms: pv.LogTerms) -> Tensor:
    return torch.logsumexp(terms.log_weights, 0) - torch.tensor(float(len(terms.log_weights))).log()


@pytest.mark.parametrize(
    "loss",
    [iwae, renyi(0.5), renyi(-1.0), own_bound, RenyiELBO(alpha=0.5, num_particles=1)],
    ids=["iwae", "renyi", "renyi below 0", "a user's function", "Pyro's"],
)
def test_a_bound_of_several_draws_is_refused_with_one(loss: Any) -> None:
    with pytest.raises(ValueError, match=r"of one draw per datum is the ELBO.*num_particles=5"):
        fit(vae(), data(), loss=loss)


def test_one_draw_is_the_elbo_bit_for_bit() -> None:
    terms = pv.log_terms(vae(), data())
    assert torch.equal(iwae(terms), elbo(terms))
    assert torch.equal(renyi(0.5)(terms), elbo(terms)) or torch.allclose(renyi(0.5)(terms), elbo(terms), rtol=1e-14)


@pytest.mark.parametrize("loss", [elbo, beta_elbo(1.0), beta_elbo(2.0), free_bits(0.0), renyi(1.0)])
def test_an_average_over_draws_takes_one(loss: Any) -> None:
    assert len(fit(vae(), data(), loss=loss).metrics) == 1


@pytest.mark.parametrize("loss", [iwae, renyi(0.5), own_bound])
def test_with_more_draws_the_bound_is_another_loss(loss: Any) -> None:
    ours, by_elbo = (fit(vae(), data(), loss=each, num_particles=5) for each in (loss, elbo))
    assert ours.metrics[-1]["loss"] != by_elbo.metrics[-1]["loss"]


def test_the_command_line_names_its_option() -> None:
    with pytest.raises(ValueError, match="one draw is the ELBO: add --num-particles 5"):
        Training(loss="iwae").make_loss(None, vae())


# Seeds of several calls


class Watched(pv.models.VAE):
    """Note the first datum of each training batch, and its noise."""

    seen: list[tuple[float, float]]

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            q = self.q_z(x)
            z = pyro.sample("z", q)
        if self.training and torch.is_grad_enabled() and len(x) == 16:
            noise = (z - q.base_dist.loc) / q.base_dist.scale
            self.seen.append((float(x[0, 0]), round(float(noise.detach().flatten()[0]), 6)))


def watched() -> Watched:
    torch.manual_seed(0)
    pair = Watched((4,), pv.StandardNormal(2), encoder=nn.Linear(4, 4), decoder=nn.Linear(2, 4))
    pair.seen = []
    return pair


def seen(pair: Watched, **kwargs: Any) -> list[tuple[float, float]]:
    """Return what a call of fit draws: pairs of a datum and its noise, four batches an epoch."""
    pair.seen.clear()
    fit(pair, data(), capture=False, **kwargs)
    return list(pair.seen)


def test_a_loop_of_calls_draws_other_orders_and_other_noise() -> None:
    pair = watched()
    drawn = [tuple(seen(pair)) for _ in range(4)]
    assert all(len(call) == 4 for call in drawn)
    firsts, noise = zip(*(pair for call in drawn for pair in call), strict=True)
    # 16 first rows of 64 in one order each; noise never recurs.
    assert len(set(noise)) == 16
    assert len({call[0][0] for call in drawn}) > 1
    assert len(set(firsts)) > 4


def test_the_first_call_is_that_of_seed_0_and_a_seed_repeats_it() -> None:
    pair = watched()
    first, second = seen(pair), seen(pair)
    assert first == seen(watched(), seed=0) == seen(pair, seed=0)
    assert second == seen(pair), "the call after one of seed 0"
    after_five, after_six = (seen(pair, seed=seed) and seen(pair) for seed in (5, 6))
    assert after_five != after_six


def test_copies_go_on_alike_and_a_call_that_breaks_off_has_used_its_seed() -> None:
    pair = watched()
    first = seen(pair)
    twin = copy.deepcopy(pair)
    assert seen(pair) == seen(twin) != first

    def interrupt(terms: pv.LogTerms) -> Tensor:
        if torch.is_grad_enabled():
            raise KeyboardInterrupt
        return elbo(terms)

    broken = watched()
    with pytest.raises(KeyboardInterrupt):
        fit(broken, data(), loss=interrupt, capture=False)
    assert seen(broken) != first


def test_the_held_out_share_stays_the_same_over_calls() -> None:
    pair, counts = watched(), []
    for seed in (None, None, 7):
        counts.append({datum for datum, _ in seen(pair, validation=0.5, epochs=30, seed=seed)})
    # 32 training data, seen first in a batch of 16 in 60 batches; were the share drawn anew, others would come.
    assert len(set.union(*counts)) <= 32
    assert len({datum for datum, _ in seen(watched(), validation=0.5, epochs=30, seed=7)} - counts[0]) > 4


def test_a_resumed_run_has_the_seed_of_its_beginning(tmp_path: Path) -> None:
    unbroken, broken = vae(), vae()
    for pair in (unbroken, broken):
        fit(pair, data(), validation=0.25)
    fit(unbroken, data(), validation=0.25, epochs=4)
    fit(broken, data(), validation=0.25, epochs=2, run_dir=tmp_path)
    # Another pair of the class: what it has drawn before does not enter.
    again = vae()
    fit(again, data(), validation=0.25, epochs=4, run_dir=tmp_path, resume=True)
    assert torch.equal(weights(again), weights(unbroken))
    with pytest.raises(ValueError, match="begun with other settings: seed"):
        fit(again, data(), validation=0.25, epochs=4, run_dir=tmp_path, resume=True, seed=1)
