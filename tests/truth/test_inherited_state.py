"""Methods, modes and storages that a pair has from elsewhere: right for this pair, or refused."""

from __future__ import annotations

import math
from pathlib import Path
from types import MethodType, SimpleNamespace
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.report.files import write_loss_terms
from pyro_vae.training.run_folder import load_parameters


def data(size: int = 64) -> Tensor:
    return torch.randn(size, 4, generator=torch.Generator().manual_seed(1))


def fit(pair: pv.Pair, x: Any, **kwargs: Any) -> pv.Run:
    return pv.fit(pair, x, **{"epochs": 1, "batch_size": 16, "progress": False, "device": "cpu"} | kwargs)


def networks() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {"encoder": nn.Linear(4, 4), "decoder": nn.Linear(2, 4)}


# A closed form of other programs


class Wide(pv.models.VAE):
    """A VAE with z ~ N(0, 2² I)."""

    def model(self, x: Tensor, *conditions: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 2.0).to_event(1))
            pyro.sample("x", self.p_x(z), obs=x)


class Sharp(pv.models.VAE):
    """A VAE whose guide draws with half the scale."""

    def guide(self, x: Tensor, *conditions: Tensor) -> None:
        with pyro.plate("data", len(x)):
            q = self.q_z(x).base_dist
            pyro.sample("z", dist.Normal(q.loc, q.scale / 2).to_event(1))


class WideLater(Wide):
    """A class between says nothing."""


class WideModel:
    """A program from a mixin."""

    def model(self, x: Tensor, *conditions: Tensor) -> None:
        Wide.model(self, x)


class Mixed(WideModel, pv.models.VAE):
    """Mixin and VAE."""


class WideWithItsForm(Wide):
    """The closed form beside its model."""

    def closed_form(self, x: Tensor, *conditions: Tensor, num_particles: int, mixture_kl: Any) -> Any:
        inherited = super().closed_form(x, num_particles=num_particles, mixture_kl=mixture_kl)
        q = self.q_z(x).base_dist
        return inherited._replace(z=torch.distributions.kl_divergence(q, dist.Normal(torch.zeros(2), 2.0)).sum(-1))


class Coloured(pv.models.VAE):
    """Neither program is redefined."""


@pytest.mark.parametrize("kind", [Wide, Sharp, WideLater, Mixed])
def test_a_closed_form_of_other_programs_is_refused(kind: Any, tmp_path: Path) -> None:
    pair = kind((4,), pv.StandardNormal(2), **networks())
    with pytest.raises(ValueError, match=r"inherits closed_form from a class with another (model|guide): define"):
        pv.analytic_loss(pair, data())
    write_loss_terms(tmp_path, pair, SimpleNamespace(test=data()))  # type: ignore[arg-type]
    assert not (tmp_path / "loss_terms.json").exists()


def test_a_program_of_the_instance_is_another_one_too() -> None:
    pair = pv.models.VAE((4,), pv.StandardNormal(2), **networks())
    vars(pair)["model"] = MethodType(Wide.model, pair)
    with pytest.raises(ValueError, match="another model: define"):
        pv.analytic_loss(pair, data())


def test_the_inherited_form_would_have_been_of_the_other_prior() -> None:
    pair, x = Wide((4,), pv.StandardNormal(2), **networks()), data()
    inherited = pair.closed_form(x, num_particles=1, mixture_kl=pv.convex_kl_bound).z
    q = pair.q_z(x).base_dist
    # KL(N(m, s²) ‖ N(0, 4)) = log(2/s) + (s² + m²)/8 − ½, by entries.
    kl = (math.log(2) - q.scale.log() + (q.scale**2 + q.loc**2) / 8 - 0.5).sum(-1)
    assert (inherited - kl).abs().max() > 0.1
    own = pv.analytic_loss(WideWithItsForm((4,), pv.StandardNormal(2), **networks()), x)
    torch.testing.assert_close(own._asdict()["z"], kl, rtol=1e-12, atol=1e-12)


def test_a_subclass_with_the_same_programs_keeps_its_form(tmp_path: Path) -> None:
    pair, plain = (kind((4,), pv.StandardNormal(2), **networks()) for kind in (Coloured, pv.models.VAE))
    ours, theirs = (pv.analytic_loss(each, data())._asdict()["z"] for each in (pair, plain))
    torch.testing.assert_close(ours, theirs)
    write_loss_terms(tmp_path, pair, SimpleNamespace(test=data()))  # type: ignore[arg-type]
    assert (tmp_path / "loss_terms.json").exists()


def test_exact_steps_of_another_model_are_refused() -> None:
    class Shifted(pv.models.LinearGaussianVAE):
        def model(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.ones(1), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(z @ self.weight.mT, 1.0).to_event(1), obs=x)

    with pytest.raises(ValueError, match="inherits e_step from a class with another model"):
        pv.em(Shifted(4, 1), data())


# Frozen layers in evaluation mode


def normalised() -> pv.models.VAE:
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 4))
    return pv.models.VAE((4,), pv.StandardNormal(2), encoder=encoder, decoder=nn.Linear(2, 4))


def frozen(pair: pv.models.VAE) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in pair.q_z.state_dict().items()}


def freeze(pair: pv.models.VAE) -> dict[str, Tensor]:
    pair.q_z.requires_grad_(False)
    pair.q_z.eval()
    return frozen(pair)


@pytest.mark.parametrize("capture", [False, True])
@pytest.mark.parametrize("when", ["before the first run", "after a run"])
def test_frozen_layers_in_evaluation_mode_stay_as_they_are(when: str, capture: bool) -> None:
    pair = normalised()
    if when == "after a run":
        fit(pair, data(), capture=False)
    before, decoder = freeze(pair), pair.p_x.network.weight.detach().clone()
    modes = []
    hook = pair.q_z.network[2].register_forward_hook(lambda module, *_: modes.append(module.training))
    for _ in range(2):
        fit(pair, data(), capture=capture, validation=0.25)
    hook.remove()
    assert modes
    assert not any(modes)
    after = frozen(pair)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(p.requires_grad for p in pair.q_z.parameters())
    assert not torch.equal(decoder, pair.p_x.network.weight)


def test_all_other_layers_train_in_every_run() -> None:
    pair = normalised()
    norm = pair.q_z.network[1]
    for count in (4, 8):
        fit(pair, data())
        assert int(norm.num_batches_tracked) == count
        assert not pair.training
    # Only the norm is put in evaluation mode: its parameters train, its averages stay.
    pair.train()
    norm.eval()
    weight = norm.weight.detach().clone()
    for _ in range(2):
        fit(pair, data())
    assert int(norm.num_batches_tracked) == 8
    assert not torch.equal(weight, norm.weight)
    pair.train()
    fit(pair, data())
    assert int(norm.num_batches_tracked) == 12


# Storages that several names share


class Transposed(nn.Module):
    """Decode by a part of the encoder's matrix."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight, self.bias = weight, nn.Parameter(torch.zeros(4))

    def forward(self, z: Tensor) -> Tensor:
        return z @ self.weight[:2] + self.bias


def tied(seed: int = 0) -> pv.models.VAE:
    torch.manual_seed(seed)
    encoder = nn.Linear(4, 4)
    return pv.models.VAE((4,), pv.StandardNormal(2), encoder=encoder, decoder=Transposed(encoder.weight))


def registered_twice(seed: int = 0) -> pv.models.VAE:
    torch.manual_seed(seed)
    pair = pv.models.VAE((4,), pv.StandardNormal(2), encoder=nn.Linear(4, 4), decoder=nn.Linear(2, 4))
    pair.again = pair.p_x.network
    return pair


def with_buffers_of_one_storage(seed: int = 0) -> pv.models.VAE:
    pair = registered_twice(seed)
    whole = torch.arange(6.0)
    pair.register_buffer("low", whole[:4])
    pair.register_buffer("high", whole[2:])
    return pair


@pytest.mark.parametrize("make", [tied, registered_twice, with_buffers_of_one_storage])
def test_shared_storages_are_saved_and_resumed(make: Any, tmp_path: Path) -> None:
    unbroken, broken, again, loaded = make(), make(), make(seed=1), make(seed=2)
    fit(unbroken, data(), epochs=3)
    fit(broken, data(), epochs=1, run_dir=tmp_path / "run")
    load_parameters(loaded, tmp_path / "run/checkpoint/pair.safetensors")
    fit(again, data(), epochs=3, run_dir=tmp_path / "run", resume=True)
    for ours, theirs in ((loaded, broken), (again, unbroken)):
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
        assert all(torch.equal(a, b) for a, b in zip(ours.buffers(), theirs.buffers(), strict=True))
        assert len(list(ours.parameters())) < len(ours.state_dict())


@pytest.mark.parametrize("place", ["new", "new/inside", "old"])
def test_a_run_that_cannot_begin_leaves_no_folder(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "notes.txt").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="config holds a value that config"):
        fit(tied(), data(), run_dir=tmp_path / place, config={"weights": torch.zeros(2)})
    assert sorted(tmp_path.rglob("*")) == before

    def full(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("pyro_vae.training.run_folder.save_tensors", full)
    with pytest.raises(OSError, match="no space left"):
        fit(tied(), data(), run_dir=tmp_path / place)
    assert sorted(tmp_path.rglob("*")) == before


# Layers that need more than one datum, or a first one


@pytest.mark.parametrize(("size", "sizes"), [(33, [16, 17]), (34, [16, 16, 2]), (17, [17]), (16, [16])])
def test_a_last_datum_joins_the_batch_before_it_under_a_batch_norm(size: int, sizes: list[int]) -> None:
    pair, found = normalised(), []
    pair.q_z.network[1].register_forward_pre_hook(
        lambda module, inputs: found.append(len(inputs[0])) if module.training and torch.is_grad_enabled() else None
    )
    run = fit(pair, data(size), capture=False)
    assert found == sizes
    assert math.isfinite(run.metrics[-1]["loss"])


def test_a_last_datum_is_a_batch_where_nothing_normalises() -> None:
    pair, found = normalised(), []
    pair.q_z.network[1].eval()
    pair.q_z.network[0].register_forward_pre_hook(
        lambda module, inputs: found.append(len(inputs[0])) if torch.is_grad_enabled() else None
    )
    fit(pair, data(33), capture=False)
    assert found[-3:] == [16, 16, 1]


@pytest.mark.parametrize("size", [1, 5])
def test_batches_of_one_datum_are_refused_where_a_norm_cannot_take_them(size: int) -> None:
    with pytest.raises(ValueError, match="batch_size is 1, and the pair normalises by batches"):
        fit(normalised(), data(size), batch_size=1)
    pair = normalised()
    pair.q_z.network[1].eval()
    fit(pair, data(size), batch_size=1)


def test_lazy_layers_begin_from_the_callers_seed() -> None:
    def lazy(seed: int) -> pv.models.VAE:
        pair = pv.models.VAE((4,), pv.StandardNormal(2), encoder=nn.LazyLinear(4), decoder=nn.LazyLinear(4))
        torch.manual_seed(seed)
        fit(pair, data(), lr=1e-9)
        return pair

    first, again, other = (lazy(seed).q_z.network.weight for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert (first - other).abs().max() > 0.01
