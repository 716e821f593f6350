"""``fit``: what it reaches, what it resumes, what it refuses, and what it leaves when something goes wrong."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.capture.tracer import CaptureError
from pyro_vae.models import VAE, LinearGaussianMixtureVAE, LinearGaussianVAE
from pyro_vae.objectives.bounds import elbo, iwae
from pyro_vae.pair.terms import LogTerms
from pyro_vae.training.trainer import Trainer


def vae() -> VAE:
    return VAE((4,), pv.StandardNormal(2), encoder=nn.Linear(4, 4), decoder=nn.Linear(2, 4))


def data(size: int = 64) -> Tensor:
    return torch.randn(size, 4, generator=torch.Generator().manual_seed(1))


def fit(pair: pv.Pair, x: Any, **kwargs: Any) -> pv.Run:
    return pv.fit(pair, x, **{"epochs": 2, "batch_size": 16, "progress": False, "device": "cpu"} | kwargs)


def state(pair: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in pair.state_dict().items()}


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def without_time(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in record.items() if name != "seconds"} for record in metrics]


# What training reaches


def ppca_log_likelihood(x: Tensor, latent_size: int) -> float:
    """Return the largest mean log-likelihood of probabilistic PCA, from the covariance's eigenvalues λ.

    −½ [D log 2π + Σ_{i ≤ L} log λ_i + (D − L) log σ² + D],   σ² the mean of the other λ   (Tipping and Bishop, 1999)
    """
    values = torch.linalg.eigvalsh(torch.cov(x.mT, correction=0)).flip(0)
    kept, rest = values[:latent_size], values[latent_size:]
    log_det = kept.log().sum() + len(rest) * rest.mean().log()
    return -0.5 * float(len(values) * math.log(2 * math.pi) + log_det + len(values))


def test_probabilistic_pca_reaches_its_maximum() -> None:
    x = torch.randn(200, 2) @ torch.tensor([[2.0, 0, 1, 0, 1], [0, 1, 0, -1, 1]]) + 0.5 * torch.randn(200, 5) + 1
    pair = LinearGaussianVAE(5, 2)
    fit(pair, x, epochs=300, batch_size=200, lr=0.05)
    with torch.no_grad():
        reached = pair.exact_log_likelihood(x)
    maximum = ppca_log_likelihood(x, 2)
    assert float(reached.mean()) <= maximum + 1e-10
    # Every weight is log p(x), so that full batches make it gradient descent without noise. Fisher's information puts
    # a draw of the data within d/2N nats of its maximum, d = 5·2 − 1 + 5 + 1 parameters: a tenth of that is closer
    # than the data themselves can tell.
    assert float(reached.mean()) >= maximum - 0.1 * 15 / (2 * 200)


def test_a_free_guide_reaches_the_best_diagonal_gaussian() -> None:
    weight, scale = torch.tensor([[1.0, 0.5], [0, 1], [1, 1]]), 0.7
    x = torch.randn(20, 3)
    decoder = nn.Linear(2, 3)
    pair = VAE((3,), pv.StandardNormal(2), pv.Gaussian(pv.FixedScale(scale)), pv.FreeGaussian(20, 2), decoder=decoder)
    with torch.no_grad():
        decoder.weight.copy_(weight)
        decoder.bias.zero_()
    decoder.requires_grad_(False)
    index = torch.arange(20)
    loss = Trace_ELBO(num_particles=20, vectorize_particles=True, max_plate_nesting=1)
    fit(pair, (x, index), epochs=400, batch_size=20, lr=0.02, loss=loss)
    # KL(q ‖ N(m, Λ⁻¹)) over diagonal q is least at mean m and variances 1/Λ_jj, where it is ½ [Σ log Λ_jj − log det Λ].
    precision = torch.eye(2) + weight.mT @ weight / scale**2
    best_gap = 0.5 * float(precision.diagonal().log().sum() - torch.logdet(precision))
    mean = torch.linalg.solve(precision, weight.mT @ x.mT / scale**2).mT
    with torch.no_grad():
        q = pair.q_z(x, index)
        exact = dist.MultivariateNormal(mean, precision_matrix=precision)
        gap = torch.distributions.kl_divergence(dist.MultivariateNormal(q.mean, q.variance.diag_embed()), exact)
    assert best_gap > 0.01
    assert (gap >= best_gap - 1e-12).all()
    # A mean off by a tenth of q's scale costs ½ · 0.1², a scale off by a tenth 0.1²: no coordinate may be further off.
    assert (gap <= best_gap + 2 * (0.5 + 1) * 0.1**2).all()


def test_more_epochs_lower_the_loss() -> None:
    run = fit(vae(), data(), epochs=20, lr=0.02, validation=0.25)
    assert run.metrics[-1]["loss"] < run.metrics[0]["loss"]
    assert run.metrics[-1]["validation_loss"] < run.metrics[0]["validation_loss"]


# What a run records


def test_a_record_says_what_happened() -> None:
    pair, x = vae(), data()
    run = fit(pair, x, epochs=3, validation=0.25)
    assert run.pair is pair
    assert run.run_dir is None
    assert not pair.training
    for epoch, record in enumerate(run.metrics, 1):
        assert (record["epoch"], record["beta"]) == (epoch, 1.0)
        assert set(record["terms"]) == {"x", "z"}
        assert record["validation_loss"] == pytest.approx(sum(record["terms"].values()), rel=1e-12)
    assert list(run.metrics[-1]["monitor"].values()) == [float(pair.p_x.head.scale().detach())]


def test_followed_terms_average_to_the_closed_loss() -> None:
    pair, x = vae(), data(512)
    run = fit(pair, x, epochs=1, validation=x)
    torch.manual_seed(5)
    with torch.no_grad():
        loss = pv.analytic_loss(pair, x, num_particles=200)
        spread = torch.stack([pv.log_terms(pair, x).log_weights[0] for _ in range(100)]).std(0)
    # One draw per datum: the mean's standard error is the root of the mean of their variances over N.
    error = float((spread**2).mean().sqrt()) / 512**0.5
    assert abs(run.metrics[-1]["validation_loss"] - float(loss.total.mean())) <= 4 * error


def test_warmup_raises_beta_linearly() -> None:
    betas: list[float] = []

    class Recorded(TraceMeanField_ELBO):
        def loss_and_grads(self, model: Any, guide: Any, *args: Any) -> float:
            with pyro.poutine.trace() as seen:
                pyro.sample("probe", dist.Normal(0.0, 1.0))
            betas.append(float(seen.trace.nodes["probe"]["scale"]))
            return float(super().loss_and_grads(model, guide, *args))

    run = fit(vae(), data(), epochs=4, loss=Recorded(), beta=0.5, warmup=2)
    steps = [0.5 * min(1.0, step / 8) for step in range(16)]
    assert betas == pytest.approx(steps, rel=1e-12)
    assert [record["beta"] for record in run.metrics] == pytest.approx(steps[3::4], rel=1e-12)


def test_the_optimiser_is_the_users_own() -> None:
    pair, x, made = vae(), data(), []

    def make(parameters: Any) -> torch.optim.Optimizer:
        made.append(torch.optim.SGD(parameters, lr=0.0))
        return made[0]

    before = state(pair)
    fit(pair, x, optimizer=make)
    assert len(made) == 1
    assert same(before, state(pair))


def test_clipping_bounds_each_step() -> None:
    pair, x = vae(), 100 * data(16)
    before = state(pair)
    fit(pair, x, epochs=1, clip_norm=0.01, optimizer=lambda p: torch.optim.SGD(p, lr=1.0))
    moved = torch.stack([(before[name] - value).norm() for name, value in pair.state_dict().items()]).norm()
    assert float(moved) == pytest.approx(0.01, rel=1e-6)


def test_the_validation_share_is_never_trained_on() -> None:
    # Each datum has parameters of its own, which no step can move but one on that datum.
    pair = VAE((4,), pv.StandardNormal(2), posterior=pv.FreeGaussian(40, 2), decoder=nn.Linear(2, 4))
    fit(pair, (data(40), torch.arange(40)), epochs=2, batch_size=10, validation=0.25)
    assert isinstance(pair.q_z, pv.FreeGaussian)
    assert int(pair.q_z.loc.ne(0).any(-1).sum()) == 30


def test_early_stopping_restores_the_best() -> None:
    x = data(32)
    held_out = data(64)[32:]
    pair = LinearGaussianVAE(4, 2)
    # Far too large a step: the validation loss rises sooner or later.
    run = fit(pair, x, epochs=200, batch_size=32, lr=0.5, validation=held_out, patience=3)
    losses = [record["validation_loss"] for record in run.metrics]
    best = min(range(len(losses)), key=losses.__getitem__)
    assert len(losses) == best + 1 + 3 < 200
    # Every weight is log p(x), whatever was drawn, so that the loss identifies the parameters.
    with torch.no_grad():
        assert -float(pair.exact_log_likelihood(held_out).mean()) == pytest.approx(losses[best], rel=1e-10)


def test_an_epoch_without_a_validation_loss_is_never_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    follow = Trainer._follow

    def nan_at_first(trainer: Trainer) -> dict[str, Any]:
        record = follow(trainer)
        return record | {"validation_loss": math.nan} if trainer.epoch == 0 else record

    monkeypatch.setattr(Trainer, "_follow", nan_at_first)
    pair, other = vae(), vae()
    other.load_state_dict(pair.state_dict())
    fit(pair, data(), epochs=3, validation=0.25, patience=1)
    fit(other, data(), epochs=1, validation=0.25)
    # The loss falls from epoch to epoch here: the third is the best.
    assert not same(state(pair), state(other))


# Randomness


def test_the_callers_random_state_is_left() -> None:
    pair = vae()
    before = torch.get_rng_state()
    fit(pair, data(), validation=0.25)
    assert torch.equal(before, torch.get_rng_state())


def test_the_callers_random_state_is_left_by_an_error() -> None:
    def interrupt(terms: LogTerms) -> Tensor:
        torch.rand(3)
        raise KeyboardInterrupt

    pair = vae()
    before = torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt):
        fit(pair, data(), loss=interrupt)
    assert torch.equal(before, torch.get_rng_state())


def test_the_callers_random_state_does_not_enter() -> None:
    pair = vae()
    twin = copy.deepcopy(pair)
    torch.manual_seed(11)
    fit(pair, data())
    torch.manual_seed(12)
    fit(twin, data())
    assert same(state(pair), state(twin))


def test_another_seed_is_another_run() -> None:
    pair = vae()
    twin = copy.deepcopy(pair)
    fit(pair, data())
    fit(twin, data(), seed=1)
    assert not same(state(pair), state(twin))


# What fit refuses


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"batch_size": 65}, "batch_size is 65; there are 64 training data"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"beta": -0.1}, "beta is -0.1"),
        ({"warmup": -1}, "warmup -1"),
        ({"epochs": 0}, "epochs is 0; it must be at least 1"),
        ({"lr": 0.0}, "lr is 0.0; it must be positive"),
        ({"loss": elbo, "num_particles": 0}, "num_particles is 0"),
        ({"loss": iwae, "beta": 0.5}, "beta weighs the divergence"),
        ({"loss": iwae, "warmup": 1}, "beta weighs the divergence"),
        ({"num_particles": 2}, "num_particles is 2; a Pyro ELBO holds its own"),
        ({"patience": 2}, "patience needs validation data"),
        ({"validation": 1.5}, "validation is 1.5; as a share"),
        ({"validation": 1}, "validation"),
        ({"validation": 0.999}, "holds no data"),
        ({"resume": True}, "resume needs run_dir"),
        ({"device": "gpu"}, "device 'gpu' is unknown"),
    ],
)
def test_bad_settings_are_refused_before_any_step(kwargs: dict[str, Any], message: str) -> None:
    pair = vae()
    before = state(pair)
    with pytest.raises(ValueError, match=message):
        fit(pair, data(), **kwargs)
    assert same(before, state(pair))


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for CUDA where there is none")
def test_cuda_is_refused_where_there_is_none() -> None:
    with pytest.raises(ValueError, match=r"device 'cuda' was asked for, but .* no CUDA device: use device='auto'"):
        fit(vae(), data(), device="cuda")


def test_bad_data_are_refused() -> None:
    x = data()
    x[3, 2] = math.nan
    with pytest.raises(ValueError, match=r"data has 1 NaN or infinite value, the first at index \(3, 2\)"):
        fit(vae(), x)
    with pytest.raises(ValueError, match=r"validation has shape \(5, 3\)"):
        fit(vae(), data(), validation=torch.zeros(5, 3))


@pytest.mark.parametrize("argument", ["data", "validation"])
def test_gray_values_in_a_bernoulli_list_what_would_take_them(argument: str) -> None:
    pair = VAE((4,), pv.StandardNormal(2), pv.Bernoulli())
    good, gray = data().gt(0).double(), data().gt(0).double()
    gray[7, 1] = 0.5
    batch, held_out = (gray, good) if argument == "data" else (good, gray)
    message = (
        rf"{argument} has 1 values? outside the support of site 'x' .* 0.5 at index \(7, 1\)"
        ".*Bernoulli.*binarise.*continuous Bernoulli.*discretised logistic.*Gaussian"
    )
    with pytest.raises(ValueError, match=message):
        fit(pair, batch, validation=held_out)


def test_a_discrete_guide_needs_a_pyro_loss() -> None:
    pair = LinearGaussianMixtureVAE(4, pv.MixtureOfGaussians(3, 2))
    before = state(pair)
    with pytest.raises(ValueError, match="'c' \\(Categorical\\) has no rsample"):
        fit(pair, data(), loss=iwae, num_particles=3)
    assert same(before, state(pair))
    fit(pair, data(), loss=TraceGraph_ELBO())
    assert not same(before, state(pair))


def test_a_run_of_one_batch_per_epoch_is_recorded_too() -> None:
    class Deciding(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if float(x.detach().sum()) > -1e9 else x

    pair = pv.models.VAE((3,), pv.StandardNormal(1), encoder=Deciding(3, 2), decoder=nn.Linear(1, 3))
    with pytest.raises(CaptureError):
        pv.fit(pair, torch.zeros(8, 3), epochs=3, batch_size=8, capture=True, progress=False)


def test_a_run_is_not_continued_to_fewer_epochs(tmp_path: Path) -> None:
    pair, x = pv.models.LinearGaussianVAE(3, 1), torch.zeros(8, 3)
    pv.fit(pair, x, epochs=2, batch_size=8, run_dir=tmp_path, progress=False)
    with pytest.raises(ValueError, match="a run of 2 epochs: ask"):
        pv.fit(pair, x, epochs=1, batch_size=8, run_dir=tmp_path, resume=True, progress=False)


@pytest.mark.parametrize("setting", [{"lr": float("inf")}, {"beta": float("inf")}, {"beta": float("nan")}])
def test_settings_are_finite(setting: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="finite"):
        pv.fit(pv.models.LinearGaussianVAE(3, 1), torch.zeros(8, 3), batch_size=8, progress=False, **setting)
