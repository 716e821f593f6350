"""An argument of ``fit`` has its effect, or is refused in one sentence; none is taken and dropped."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy
import pyro
import pytest
import torch
from pyro.infer import EnergyDistance, RenyiELBO, Trace_ELBO
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.cli.training import Training
from pyro_vae.objectives.bounds import beta_elbo, elbo, free_bits, iwae, renyi

SCHEDULED = {"optimizer": torch.optim.Adam, "optim_args": {"lr": 1e-3}, "gamma": 0.9}


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


# Types


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"loss": "elbo"}, "loss is the text 'elbo', and no loss: pass pv.objectives.elbo"),
        ({"loss": Trace_ELBO}, r"loss is the class Trace_ELBO: call it .* Trace_ELBO\(\)"),
        ({"loss": pv.DReG}, "loss is the class DReG: call it"),
        ({"loss": renyi}, r"loss is renyi, which makes an objective: call it .* renyi\(0.5\)"),
        ({"loss": beta_elbo}, "loss is beta_elbo, which makes an objective"),
        ({"loss": EnergyDistance()}, "loss is of type EnergyDistance, and no loss"),
        ({"loss": 1.0}, "loss is of type float, and no loss"),
        ({"epochs": math.nan}, "epochs is nan; it must be a whole number"),
        ({"epochs": math.inf}, "epochs is inf; it must be a whole number"),
        ({"epochs": 2.5}, "epochs is 2.5; it must be a whole number"),
        ({"epochs": None}, "epochs is None; it must be a whole number"),
        ({"epochs": "3"}, "epochs is '3'; it must be a whole number"),
        ({"epochs": True}, "epochs is True; it must be a whole number"),
        ({"batch_size": 16.0}, "batch_size is 16.0; it must be a whole number"),
        ({"batch_size": None}, "batch_size is None; it must be a whole number"),
        ({"seed": 0.5}, "seed is 0.5; it must be a whole number"),
        ({"patience": "2"}, "patience is '2'; it must be a whole number"),
        ({"num_particles": [5], "loss": iwae}, "num_particles is of type list; it must be a whole number"),
        ({"beta": "1"}, "beta is '1'; it must be a number"),
        ({"beta": pv.Annealed(0.0, 1.0, 5)}, "beta is of type Annealed; it must be a number"),
        ({"beta": math.nan}, "beta is nan"),
        ({"warmup": math.nan}, "warmup nan"),
        ({"warmup": None}, "warmup is None; it must be a number"),
        ({"lr": "1e-3"}, "lr is '1e-3'; it must be a number"),
        ({"lr": math.nan}, "lr is nan; it must be positive and finite"),
        ({"clip_norm": "1"}, "clip_norm is '1'; it must be a number"),
        ({"clip_norm": math.nan}, "clip_norm is nan; it must be positive"),
        ({"run_dir": 5}, "run_dir is of type int; it must be a path"),
        ({"run_dir": "run", "config": [1]}, "config is of type list; it must be a dictionary"),
        ({"scheduler": torch.optim.lr_scheduler.CosineAnnealingLR}, "scheduler is the class CosineAnnealingLR, which"),
        ({"scheduler": pyro.optim.ExponentialLR(SCHEDULED)}, "scheduler gives PyroLRScheduler; it must make"),
    ],
    ids=lambda value: ", ".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_an_argument_of_another_type_is_refused(
    kwargs: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pair = vae()
    before = weights(pair)
    with pytest.raises(ValueError, match=message):
        fit(pair, data(), **kwargs)
    assert torch.equal(before, weights(pair))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("pair", [pv.models.VAE, nn.Linear(4, 4), None], ids=["a class", "a network", "nothing"])
def test_what_is_no_pair_is_refused(pair: Any) -> None:
    with pytest.raises(ValueError, match=r"pair is .*; it must be an instance of a subclass of pv\.Pair"):
        fit(pair, data())


def test_numbers_of_numpy_and_torch_are_taken(tmp_path: Path) -> None:
    given: dict[str, Any] = {
        "epochs": numpy.int64(2),
        "batch_size": torch.tensor(16),
        "seed": numpy.uint8(3),
        "patience": numpy.int32(5),
        "validation": numpy.float32(0.25),
        "lr": numpy.float64(0.01),
        "beta": numpy.float32(0.5),
        "warmup": numpy.int64(1),
        "clip_norm": torch.tensor(2.0),
    }
    plain = {"epochs": 2, "batch_size": 16, "seed": 3, "patience": 5, "validation": 0.25, "lr": 0.01}
    plain |= {"beta": 0.5, "warmup": 1, "clip_norm": 2.0}
    ours, theirs = vae(), vae()
    fit(ours, data(), **given, run_dir=tmp_path)
    fit(theirs, data(), **plain)
    assert torch.equal(weights(ours), weights(theirs))
    fit(vae(), data(), **plain, run_dir=tmp_path, resume=True)
