"""A pair is at home in Pyro's own tools, unchanged, and leaves nothing in its store."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pyro
import pyro.optim
import pytest
import torch
from pyro import poutine
from pyro.contrib.autoname import scope
from pyro.infer import (
    MCMC,
    NUTS,
    SVI,
    Predictive,
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    TraceTMC_ELBO,
    config_enumerate,
)
from pyro.infer.inspect import get_model_relations
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.models import SRVAE, VAE, LinearGaussianMixtureVAE, LinearGaussianVAE, LinearTwoStageVAE

LOSSES = {
    "Trace": Trace_ELBO(),
    "vectorised": Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1),
    "TraceMeanField": TraceMeanField_ELBO(),
    "TraceGraph": TraceGraph_ELBO(),
    "Renyi": RenyiELBO(alpha=0.3, num_particles=2),
}


def vae(prior: Any = None) -> VAE:
    return VAE((5,), prior or pv.StandardNormal(2))


def srvae(transition: Any = "delta") -> SRVAE:
    levels = 2 if transition == "discretised" else None
    return SRVAE((1, 4, 4), scale=2, prior=pv.MixtureOfGaussians(3, 2), transition=transition, levels=levels)


def state(pair: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in pair.state_dict().items()}


def adam() -> pyro.optim.PyroOptim:
    return pyro.optim.Adam({"lr": 1e-3})


def make(kind: str) -> pv.Pair:
    mixture = pv.MixtureOfGaussians(3, 2)
    pairs: dict[str, Callable[[], pv.Pair]] = {
        "vae": vae,
        "mixture vae": lambda: vae(mixture),
        "srvae delta": lambda: srvae("delta"),
        "srvae gaussian": lambda: srvae("gaussian"),
        "srvae discretised": lambda: srvae("discretised"),
        "linear": lambda: LinearGaussianVAE(4, 2),
        "linear mixture": lambda: LinearGaussianMixtureVAE(4, mixture),
        "linear two-stage": lambda: LinearTwoStageVAE(4, 2, mixture, 2),
    }
    return pairs[kind]()


KINDS = ["vae", "mixture vae", "srvae delta", "srvae gaussian", "srvae discretised", "linear"]
# Their component is sampled from a categorical, which TraceMeanField_ELBO refuses.
DISCRETE = ["linear mixture", "linear two-stage"]


def moved(pair: pv.Pair, loss: Any, guide: Any = None) -> bool:
    """Take one step of plain SVI; tell whether every parameter moved and the store stayed empty."""
    x = torch.rand(3, *pair.x_shape)
    before = state(pair)
    SVI(pair.model, guide or pair.guide, adam(), loss).step(x)
    after = pair.state_dict()
    still = [name for name, _ in pair.named_parameters() if torch.equal(before[name], after[name])]
    assert still == []
    return len(pyro.get_param_store()) == 0


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("kind", [*KINDS, *DISCRETE])
def test_svi_moves_every_parameter(kind: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind in DISCRETE and name == "TraceMeanField":
        with pytest.raises(NotImplementedError, match="fully reparameterized"):
            moved(make(kind), LOSSES[name])
        return
    if kind == "srvae gaussian" and name == "TraceMeanField":
        # The guide draws u from a sampled y, so that the closed divergence would be wrong; Pyro notices.
        with pytest.warns(UserWarning, match="mean field restriction"):
            assert moved(make(kind), LOSSES[name])
        return
    assert moved(make(kind), LOSSES[name])


@pytest.mark.parametrize("loss", [TraceEnum_ELBO(max_plate_nesting=1), TraceTMC_ELBO(max_plate_nesting=1)])
def test_enumeration_moves_every_parameter_and_is_exact(loss: Any) -> None:
    pair = LinearGaussianMixtureVAE(4, pv.MixtureOfGaussians(3, 2))
    guide = config_enumerate(pair.guide, "parallel")
    if isinstance(loss, TraceEnum_ELBO) and not isinstance(loss, TraceTMC_ELBO):
        x = torch.randn(3, 4)
        exact = float(pair.exact_log_likelihood(x).detach().sum())
        torch.testing.assert_close(loss.loss(pair.model, guide, x), -exact, rtol=1e-10, atol=1e-10)
    assert moved(pair, loss, guide)


def test_reweighted_wake_sleep_moves_every_parameter() -> None:
    pair, x = vae(), torch.randn(3, 5)
    before = state(pair)
    loss = ReweightedWakeSleep(num_particles=3, vectorize_particles=True, max_plate_nesting=1)
    SVI(pair.model, pair.guide, adam(), loss).step(x)
    assert not [n for n, p in pair.named_parameters() if torch.equal(before[n], p)]


def trajectory(pairs: list[pv.Pair], batches: list[Tensor], loss: Any) -> list[dict[str, Tensor]]:
    """Step each pair in turn, each with noise of its own, and return their last states."""
    steps = [SVI(pair.model, pair.guide, adam(), loss) for pair in pairs]
    for i, x in enumerate(batches):
        for svi in steps:
            torch.manual_seed(i)
            svi.step(x)
    return [state(pair) for pair in pairs]


@pytest.mark.parametrize("name", ["Trace", "TraceGraph", "TraceMeanField"])
def test_two_pairs_of_a_class_do_not_influence_each_other(name: str) -> None:
    first, second = vae(), vae()
    batches = list(torch.randn(5, 4, 5))
    alone = [trajectory([copy.deepcopy(pair)], batches, LOSSES[name])[0] for pair in (first, second)]
    together = trajectory([first, second], batches, LOSSES[name])
    for ours, theirs in zip(together, alone, strict=True):
        assert all(torch.equal(ours[n], theirs[n]) for n in theirs)


def batches_of(x: Tensor, epochs: int, batch_size: int, seed: int) -> list[Tensor]:
    """Return fit's batches: an epoch's order depends on seed and epoch alone."""
    batches = []
    for epoch in range(epochs):
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        batches += [x[rows] for rows in order.split(batch_size)]
    return batches


@pytest.mark.parametrize("transition", ["delta", "gaussian"])
def test_fit_plain_svi_and_a_hand_written_loop_follow_one_trajectory(transition: str) -> None:
    x, size, seed = pv.data.load("digits").train[:320], 32, 3
    start = SRVAE((1, 8, 8), scale=2, prior=pv.MixtureOfGaussians(4, 3), transition=transition)  # type: ignore[arg-type]
    fitted, stepped, by_hand = (copy.deepcopy(start) for _ in range(3))
    run = pv.fit(fitted, x, epochs=5, batch_size=size, seed=seed, lr=1e-3, device="cpu", progress=False)
    batches = batches_of(x, 5, size, seed)
    assert len(batches) == 50

    torch.manual_seed(seed)
    # Pyro sums over the batch, fit takes its mean.
    mean = poutine.scale(scale=1 / size)
    svi = SVI(mean(stepped.model), mean(stepped.guide), adam(), Trace_ELBO())
    losses = [svi.step(batch) for batch in batches]

    torch.manual_seed(seed)
    optimizer = torch.optim.Adam(by_hand.parameters(), lr=1e-3)
    for batch in batches:
        optimizer.zero_grad()
        (-pv.log_terms(by_hand, batch).log_weights.mean()).backward()
        optimizer.step()

    for epoch, record in enumerate(run.metrics):
        assert record["loss"] == pytest.approx(sum(losses[10 * epoch : 10 * epoch + 10]) / 10, rel=1e-8)
    moved_by = 0.0
    for name, value in fitted.state_dict().items():
        # Sums are taken in three orders; Adam carries their rounding through 50 steps of at most 1e-3 each.
        torch.testing.assert_close(stepped.state_dict()[name], value, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(by_hand.state_dict()[name], value, rtol=1e-8, atol=1e-10)
        moved_by = max(moved_by, float((value - start.state_dict()[name]).abs().max()))
    assert moved_by > 1e-2


def test_two_pairs_in_one_program() -> None:
    first, second = vae(), vae()
    twins = [copy.deepcopy(first), copy.deepcopy(second)]
    x = torch.randn(4, 5)

    def both(program: str) -> Callable[[Tensor], None]:
        def run(data: Tensor) -> None:
            for prefix, pair in (("a", first), ("b", second)):
                scope(prefix=prefix)(getattr(pair, program))(data)

        return run

    before = [state(first), state(second)]
    torch.manual_seed(0)
    SVI(both("model"), both("guide"), adam(), Trace_ELBO()).step(x)
    for old, pair in zip(before, (first, second), strict=True):
        assert not [n for n, p in pair.named_parameters() if torch.equal(old[n], p)]
    # The two losses add, so each pair moves as it would alone: the first one's noise is drawn first in both.
    trajectory(twins[:1], [x], Trace_ELBO())
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), twins[0].parameters(), strict=True))


def test_the_elbo_is_a_module_with_the_pairs_parameters() -> None:
    pair, x = vae(), torch.randn(4, 5)
    loss = Trace_ELBO()(pair.model, pair.guide)
    own = {id(p) for p in pair.parameters()}
    assert {id(p) for p in loss.parameters()} == own
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.1)
    twin = copy.deepcopy(pair)
    torch.manual_seed(0)
    loss(x).backward()
    optimizer.step()
    torch.manual_seed(0)
    gradients = torch.autograd.grad(-pv.log_terms(twin, x).log_weights.sum(), list(twin.parameters()))
    for moved, old, gradient in zip(pair.parameters(), twin.parameters(), gradients, strict=True):
        torch.testing.assert_close(moved, old - 0.1 * gradient, rtol=1e-11, atol=1e-11)


def test_a_program_follows_the_pairs_mode() -> None:
    pair = vae()
    assert pair.model.training
    pair.eval()
    assert not pair.model.training


# Prediction


def test_predictive_draws_from_the_model_and_from_the_guide() -> None:
    pair = LinearGaussianVAE(3, 2)
    x = torch.randn(4, 3)
    draws = Predictive(pair.model, guide=pair.guide, num_samples=4000, parallel=True)(x)
    assert draws["z"].shape[-2:] == (4, 2)
    z = draws["z"].reshape(4000, 4, 2)
    posterior = pair.exact_posterior(x)
    error = (posterior.variance / 4000).sqrt()
    assert ((z.mean(0) - posterior.mean).abs() <= 4 * error).all()
    prior = Predictive(poutine.uncondition(pair.model), num_samples=4000, parallel=True)(x)
    drawn = prior["x"].reshape(-1, 3)
    covariance = pair.weight @ pair.weight.mT + pair.scale() ** 2 * torch.eye(3)
    assert ((drawn.mean(0) - pair.bias).abs() <= 4 * (covariance.diagonal() / len(drawn)).sqrt()).all()


def test_uncondition_frees_the_observed_site() -> None:
    pair, x = LinearGaussianVAE(3, 2), torch.randn(4, 3)
    trace = poutine.trace(poutine.uncondition(pair.model)).get_trace(x)
    assert not trace.nodes["x"]["is_observed"]
    assert not torch.equal(trace.nodes["x"]["value"], x)


# Structure


def test_relations_are_those_of_the_factorisation() -> None:
    relations = get_model_relations(srvae().model, (torch.rand(2, 1, 4, 4),))
    assert relations["sample_sample"] == {"u": [], "y": ["u"], "z": ["u", "y"], "x": ["y", "z"]}
    assert relations["observed"] == ["x"]
    assert relations["plate_sample"] == {"data": ["u", "y", "z", "x"]}


def test_the_model_can_be_drawn() -> None:
    # Its source only: no picture is made of it, so that no other program is needed.
    source = pyro.render_model(srvae().model, (torch.rand(2, 1, 4, 4),)).source
    for edge in ("u -> y", "u -> z", "y -> z", "y -> x", "z -> x"):
        assert edge in source
    assert "u -> x" not in source


# Markov chains


def chains(pair: pv.Pair, x: Tensor, num_samples: int, warmup: int) -> dict[str, Tensor]:
    mcmc = MCMC(NUTS(pair.model), num_samples=num_samples, warmup_steps=warmup, disable_progbar=True)
    mcmc.run(x)
    return mcmc.get_samples()


def test_nuts_finds_the_exact_posterior() -> None:
    pair, x = LinearGaussianVAE(3, 1, scale=1.0), torch.randn(2, 3)
    z = chains(pair.requires_grad_(False), x, 400, 100)["z"]
    posterior = pair.exact_posterior(x)
    assert z.shape == (400, 2, 1)
    # Batch means over 20 batches of 20 draws give the standard error of a mean of dependent draws.
    error = z.reshape(20, 20, 2, 1).mean(1).std(0) / 20**0.5
    assert ((z.mean(0) - posterior.mean).abs() <= 4 * error).all()
    squares = (z - posterior.mean) ** 2
    error = squares.reshape(20, 20, 2, 1).mean(1).std(0) / 20**0.5
    assert ((squares.mean(0) - posterior.variance).abs() <= 4 * error).all()


def test_nuts_takes_a_mixture_prior() -> None:
    pair, x = vae(pv.MixtureOfGaussians(3, 2)), torch.randn(2, 5)
    u = chains(pair.requires_grad_(False), x, 50, 50)["z"]
    assert u.shape == (50, 2, 2)
    assert torch.isfinite(u).all()
    assert (u.std(0) > 0).all()
