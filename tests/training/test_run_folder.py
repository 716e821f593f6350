"""Run folders and checkpoints: resumed runs equal unbroken ones, and nothing half-written replaces something whole."""

from __future__ import annotations

import copy
import json
import math
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, BinaryIO

import pyro
import pytest
import safetensors.torch
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.models import VAE, LinearGaussianVAE
from pyro_vae.runtime.files import FolderLock, read_json, write_text, write_whole
from pyro_vae.training.run_folder import PREVIOUS, load_parameters, load_state, save_parameters, save_state
from pyro_vae.training.step import NonFiniteLossError

FILES = {"config.json", "metrics.jsonl", "checkpoint/state.pt", "checkpoint/pair.safetensors"}


def vae(size: int = 4) -> VAE:
    return VAE((size,), pv.StandardNormal(2), encoder=nn.Linear(size, 4), decoder=nn.Linear(2, size))


def data() -> Tensor:
    return torch.randn(64, 4, generator=torch.Generator().manual_seed(1))


def fit(pair: pv.Pair, x: Any, **kwargs: Any) -> pv.Run:
    return pv.fit(pair, x, **{"epochs": 4, "batch_size": 16, "progress": False, "device": "cpu"} | kwargs)


def state(pair: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in pair.state_dict().items()}


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def without_time(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in record.items() if name != "seconds"} for record in metrics]


def files(folder: Path) -> set[str]:
    """Return the files of a folder, without the checkpoint before the last one: few epochs are saved by the way."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.name != PREVIOUS}


# Run folders


def test_a_run_folder_holds_what_it_should(tmp_path: Path) -> None:
    pair, folder = vae(), tmp_path / "runs" / "first"
    run = fit(pair, data(), run_dir=folder, beta=0.5, config={"data": "made up"})
    assert run.run_dir == folder
    assert files(folder) == FILES
    config = json.loads((folder / "config.json").read_text())
    assert (config["pair"], config["data"], config["epochs"]) == ("VAE", "made up", 4)
    assert (config["fit"]["beta"], config["fit"]["batch_size"], config["fit"]["loss"]) == (
        0.5,
        16,
        "Trace_ELBO(num_particles=1)",
    )
    assert config["versions"]["pyro_vae"] == pv.__version__
    assert [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] == run.metrics
    other = vae()
    load_parameters(other, folder / "checkpoint" / "pair.safetensors")
    assert same(state(other), state(pair))


def test_a_folder_holds_one_run(tmp_path: Path) -> None:
    fit(vae(), data(), run_dir=tmp_path)
    before = (tmp_path / "metrics.jsonl").read_text()
    with pytest.raises(ValueError, match="already holds a run: choose another folder, or continue it"):
        fit(vae(), data(), run_dir=tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text() == before


# Resuming


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"validation": 0.25, "patience": 50}, {"beta": 2.0, "warmup": 3, "clip_norm": 1.0}],
    ids=["plain", "patience", "warmup"],
)
@pytest.mark.parametrize("optimal", [False, True], ids=["learned", "batch-optimal"])
def test_a_resumed_run_equals_an_unbroken_one(optimal: bool, kwargs: dict[str, Any], tmp_path: Path) -> None:
    start = vae()
    if optimal:
        # A scale with buffers that training moves.
        start.p_x.head.scale = pv.BatchOptimalScale()
    whole, first = copy.deepcopy(start), copy.deepcopy(start)
    unbroken = fit(whole, data(), epochs=5, run_dir=tmp_path / "whole", **kwargs)
    fit(first, data(), epochs=2, run_dir=tmp_path / "parts", **kwargs)
    second = vae() if not optimal else copy.deepcopy(start)
    resumed = fit(second, data(), epochs=5, run_dir=tmp_path / "parts", resume=True, **kwargs)
    assert same(state(second), state(whole))
    assert without_time(resumed.metrics) == without_time(unbroken.metrics)
    for folder in ("whole", "parts"):
        other = copy.deepcopy(start)
        load_parameters(other, tmp_path / folder / "checkpoint" / "pair.safetensors")
        assert same(state(other), state(whole))
        lines = (tmp_path / folder / "metrics.jsonl").read_text().splitlines()
        assert without_time([json.loads(line) for line in lines]) == without_time(unbroken.metrics)


def test_a_resumed_run_keeps_its_configuration(tmp_path: Path) -> None:
    fit(vae(), data(), run_dir=tmp_path, config={"data": "made up"})
    fit(vae(), data(), run_dir=tmp_path, resume=True, epochs=5)
    config = read_json(tmp_path / "config.json")
    assert (config["epochs"], config.get("data")) == (5, "made up")


# The names in config.json's section "fit" and in state.pt as version 0.1.0 wrote them.
FIT_OF_0_1_0 = [
    "batch_size",
    "lr",
    "beta",
    "warmup",
    "clip_norm",
    "num_particles",
    "patience",
    "seed",
    "loss",
    "optimizer",
    "scheduler",
    "compiled",
    "data",
    "validation",
    "precision",
    "tf32",
    "processes",
]
STATE_OF_0_1_0 = ["format", "model", "pair", "optimizer", "scheduler", "epoch", "metrics", "best", "rng", "cuda_rng"]


def test_a_folder_of_version_0_1_0_is_resumed(tmp_path: Path) -> None:
    start = vae()
    whole, first, second = (copy.deepcopy(start) for _ in range(3))
    unbroken = fit(whole, data(), epochs=4, warmup=3)
    fit(first, data(), epochs=2, warmup=3, run_dir=tmp_path)
    config = read_json(tmp_path / "config.json")
    assert sorted(config["fit"]) == sorted(FIT_OF_0_1_0)
    assert set(config) == {"run", "pair", "fit", "versions", "epochs"}
    del config["run"]
    described = {"loss": "Trace_ELBO(num_particles=1)", "scheduler": None, "precision": "float64", "processes": 1}
    described |= {"validation": "none", "clip_norm": None, "patience": None, "warmup": 3, "tf32": False}
    assert {name: config["fit"][name] for name in described} == described
    config["fit"] = {name: config["fit"][name] for name in FIT_OF_0_1_0}
    config["versions"]["pyro_vae"] = "0.1.0"
    (tmp_path / "config.json").write_text(json.dumps(config))
    saved = torch.load(tmp_path / "checkpoint" / "state.pt", weights_only=True)
    # Which has no checksum and no run.
    assert sorted(saved) == sorted([*STATE_OF_0_1_0, "run", "sha256"])
    torch.save({name: saved[name] for name in STATE_OF_0_1_0}, tmp_path / "checkpoint" / "state.pt")
    resumed = fit(second, data(), epochs=4, warmup=3, run_dir=tmp_path, resume=True)
    assert same(state(second), state(whole))
    assert without_time(resumed.metrics) == without_time(unbroken.metrics)


def test_nothing_is_left_to_do(tmp_path: Path) -> None:
    pair = vae()
    run = fit(pair, data(), run_dir=tmp_path)
    other = vae()
    again = fit(other, data(), run_dir=tmp_path, resume=True)
    assert again.metrics == run.metrics
    assert same(state(other), state(pair))


class Interrupted(Trace_ELBO):
    """Raise KeyboardInterrupt at its n-th step."""

    def __init__(self, at: float) -> None:
        super().__init__()
        self.at, self.calls = at, 0

    def loss_and_grads(self, model: Any, guide: Any, *args: Any) -> float:
        self.calls += 1
        if self.calls == self.at:
            raise KeyboardInterrupt
        return float(super().loss_and_grads(model, guide, *args))


@pytest.mark.parametrize("at", [1, 7])
def test_an_interrupt_leaves_a_run_that_can_be_continued(at: int, tmp_path: Path) -> None:
    start = vae()
    whole, broken = copy.deepcopy(start), copy.deepcopy(start)
    unbroken = fit(whole, data(), loss=Interrupted(math.inf))
    with pytest.raises(KeyboardInterrupt) as raised:
        fit(broken, data(), loss=Interrupted(at), run_dir=tmp_path)
    assert raised.value.__notes__ == [
        f"interrupted in epoch {at // 4 + 1}; {tmp_path} holds epoch {at // 4}: continue it by the same call with "
        "resume=True (the same command with --resume)"
    ]
    assert files(tmp_path) == FILES
    # The interrupted pair goes on as well as a new one: what counts is the checkpoint.
    for pair in (broken, vae()):
        folder = tmp_path.with_name(f"{tmp_path.name}-{pair is broken}")
        folder.mkdir()
        for name in FILES:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes((tmp_path / name).read_bytes())
        resumed = fit(pair, data(), loss=Interrupted(math.inf), run_dir=folder, resume=True)
        assert same(state(pair), state(whole))
        assert without_time(resumed.metrics) == without_time(unbroken.metrics)


def test_an_interrupt_without_a_folder_says_so() -> None:
    with pytest.raises(KeyboardInterrupt) as raised:
        fit(vae(), data(), loss=Interrupted(7))
    assert raised.value.__notes__ == ["interrupted in epoch 2"]


def test_resuming_on_other_terms_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config.json does not exist: .* is no run folder"):
        fit(vae(), data(), run_dir=tmp_path / "absent", resume=True)
    fit(vae(), data(), run_dir=tmp_path)
    other = vae()
    before = state(other)
    with pytest.raises(
        ValueError, match=r"begun with other settings: batch_size \(16, now 8\), lr \(0.001, now 0.1\), optimizer;"
    ):
        fit(other, data(), run_dir=tmp_path, resume=True, batch_size=8, lr=0.1)
    linear = LinearGaussianVAE(4, 2)
    with pytest.raises(ValueError, match="holds a run of VAE, not of LinearGaussianVAE"):
        fit(linear, data(), run_dir=tmp_path, resume=True)
    assert same(before, state(other))


def test_resuming_with_another_validation_share_is_refused(tmp_path: Path) -> None:
    # Another share is another split: what was held out would be trained on.
    fit(vae(), data(), run_dir=tmp_path, validation=0.25)
    with pytest.raises(ValueError, match="other settings: data, validation"):
        fit(vae(), data(), run_dir=tmp_path, validation=0.5, resume=True, epochs=6)


def test_resuming_another_shape_is_refused_in_words(tmp_path: Path) -> None:
    fit(vae(), data(), run_dir=tmp_path)
    other = VAE((4,), pv.StandardNormal(3), encoder=nn.Linear(4, 6), decoder=nn.Linear(3, 4))
    before = state(other)
    with pytest.raises(ValueError, match="other shapes or parts"):
        fit(other, data(), run_dir=tmp_path, resume=True, epochs=6)
    assert same(before, state(other))


class Touch:
    """Write a file when unpickled: what a checkpoint must never do."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "pickle", "foreign", "other"])
def test_damaged_state_is_refused(damage: str, tmp_path: Path) -> None:
    fit(vae(), data(), run_dir=tmp_path)
    path = tmp_path / "checkpoint" / "state.pt"
    path.with_name(PREVIOUS).unlink(missing_ok=True)
    whole = path.read_bytes()
    expected = f"{path.name} is damaged"
    if damage == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "text":
        path.write_text("not a checkpoint")
    elif damage == "pickle":
        path.write_bytes(pickle.dumps(Touch(tmp_path / "executed")))
    elif damage == "foreign":
        torch.save({"weight": torch.zeros(2)}, path)
        expected = "was not written by pyro_vae"
    else:
        save_state({"model": "SRVAE"}, path)
        expected = "is a checkpoint of SRVAE, not of VAE"
    with pytest.raises(ValueError, match=expected):
        fit(vae(), data(), run_dir=tmp_path, resume=True, epochs=6)
    assert not (tmp_path / "executed").exists()
    with pytest.raises(ValueError, match=expected):
        load_state(path, "VAE")


def with_a_flipped_bit(path: Path, start: int) -> None:
    content = bytearray(path.read_bytes())
    content[start] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("damage", ["flipped", "gone", "another version's"])
def test_a_damaged_checkpoint_costs_an_epoch(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyro_vae.training.run_folder.SHARE_OF_SAVING", 1.0)
    start = vae()
    whole, first, second = (copy.deepcopy(start) for _ in range(3))
    unbroken = fit(whole, data(), epochs=6)
    fit(first, data(), epochs=4, run_dir=tmp_path)
    path = tmp_path / "checkpoint" / "state.pt"
    assert load_state(path.with_name(PREVIOUS), "VAE")["epoch"] == 3
    if damage == "flipped":
        # A weight's own bytes: the archive keeps them as they are.
        weight = first.q_z.network.weight.detach().numpy().tobytes()  # type: ignore[union-attr,operator]
        with_a_flipped_bit(path, path.read_bytes().index(weight))
    elif damage == "gone":
        path.unlink()
    else:
        save_state({"model": "VAE", "epoch": 4}, path)
    with pytest.warns(UserWarning, match="goes on from the checkpoint before, of epoch 3"):
        resumed = fit(second, data(), epochs=6, run_dir=tmp_path, resume=True)
    assert same(state(second), state(whole))
    assert without_time(resumed.metrics) == without_time(unbroken.metrics)
    assert load_state(path, "VAE")["epoch"] == 6


def test_files_of_another_run_are_refused(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours" / "checkpoint", tmp_path / "theirs" / "checkpoint"
    for folder in (ours, theirs):
        fit(vae(), data(), run_dir=folder.parent)
    for name in ("state.pt", "pair.safetensors"):
        shutil.copy(theirs / name, ours / name)
    (ours / PREVIOUS).unlink(missing_ok=True)
    with pytest.raises(ValueError, match=r"state\.pt is of another run than this folder"):
        fit(vae(), data(), run_dir=ours.parent, resume=True, epochs=6)
    with pytest.raises(ValueError, match=r"pair\.safetensors is of another run than this folder"):
        load_parameters(vae(), ours / "pair.safetensors")
    # Alone, it is a file of parameters.
    shutil.copy(theirs / "pair.safetensors", tmp_path / "p")
    load_parameters(vae(), tmp_path / "p")


def test_damaged_parameters_are_named_and_written_again(tmp_path: Path) -> None:
    pair = vae()
    fit(pair, data(), run_dir=tmp_path)
    path = tmp_path / "checkpoint" / "pair.safetensors"
    with_a_flipped_bit(path, path.stat().st_size - 3)
    other = vae()
    with pytest.raises(ValueError, match=r"differs from its checksum; .* resume the run \(--resume\)"):
        load_parameters(other, path)
    fit(vae(), data(), run_dir=tmp_path, resume=True)
    load_parameters(other, path)
    assert same(state(other), state(pair))


@pytest.mark.parametrize("dtype", [torch.float16, torch.int64, torch.complex64])
def test_parameters_of_another_kind_are_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {name: value.to(dtype) for name, value in vae().state_dict().items()}
    metadata = {"format": "pyro_vae", "model": "VAE"}
    safetensors.torch.save_file(tensors, tmp_path / "p", metadata)
    with pytest.raises(ValueError, match=rf"in {dtype}, which is no torch\.float64"):
        load_parameters(vae(), tmp_path / "p")


@pytest.mark.parametrize(("part", "value"), [("epoch", -5), ("epoch", 2.0), ("metrics", []), ("metrics", None)])
def test_states_whose_parts_disagree_are_refused(part: str, value: Any, tmp_path: Path) -> None:
    fit(vae(), data(), run_dir=tmp_path)
    path = tmp_path / "checkpoint" / "state.pt"
    path.with_name(PREVIOUS).unlink(missing_ok=True)
    save_state({**load_state(path, "VAE"), part: value}, path)
    with pytest.raises(ValueError, match="is damaged: its number of epochs"):
        fit(vae(), data(), run_dir=tmp_path, resume=True, epochs=6)


# Two at once


def test_one_process_trains_in_a_folder(tmp_path: Path) -> None:
    fit(vae(), data(), run_dir=tmp_path / "begun")
    for folder, resume in (("begun", True), ("new", False)):
        (tmp_path / folder).mkdir(exist_ok=True)
        lock = FolderLock(tmp_path / folder)
        held = files(tmp_path / folder)
        with pytest.raises(ValueError, match="another process is training in"):
            fit(vae(), data(), run_dir=tmp_path / folder, resume=resume, epochs=5)
        assert files(tmp_path / folder) == held
        lock.release()
        fit(vae(), data(), run_dir=tmp_path / folder, resume=resume, epochs=5)
        assert files(tmp_path / folder) == FILES


HOLD = """
import sys, time
from pathlib import Path
from pyro_vae.runtime.files import FolderLock
lock = FolderLock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match="another process is training in"):
            FolderLock(tmp_path)
        process.kill()
        process.wait()
    # What a killed process leaves keeps nobody out.
    assert (tmp_path / FolderLock.NAME).exists()
    lock = FolderLock(tmp_path)
    assert lock.is_held()
    lock.release()
    assert files(tmp_path) == set()


class Removing(Trace_ELBO):
    """Remove or replace the run folder at the eighth step, in the second epoch."""

    def __init__(self, folder: Path, replaced: bool) -> None:
        super().__init__()
        self.folder, self.replaced, self.calls = folder, replaced, 0

    def loss_and_grads(self, model: Any, guide: Any, *args: Any) -> float:
        self.calls += 1
        if self.calls == 8:
            shutil.rmtree(self.folder)
            if self.replaced:
                self.folder.mkdir()
                (self.folder / "other").write_text("")
        return super().loss_and_grads(model, guide, *args)


@pytest.mark.parametrize("replaced", [False, True])
def test_a_folder_that_vanishes_is_not_made_again(replaced: bool, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(ValueError, match="was removed or replaced while its run was training"):
        fit(vae(), data(), run_dir=folder, loss=Removing(folder, replaced), capture=False)
    assert files(tmp_path) == ({"run/other"} if replaced else set())


# Losses that are not finite


# Pyro warns of the NaN too, before the step refuses it.
@pytest.mark.filterwarnings("ignore:Encountered NaN")
def test_a_loss_that_is_not_finite_names_its_site_and_keeps_its_batch(tmp_path: Path) -> None:
    pair, x = LinearGaussianVAE(4, 2), data()
    # Large enough to overflow when squared, though finite itself.
    x[5] = 1e200
    before = state(pair)
    with pytest.raises(
        NonFiniteLossError, match=r"not finite in epoch 1, at .*non_finite_batch.pt.*lower lr"
    ) as raised:
        fit(pair, x, run_dir=tmp_path)
    assert " x" in str(raised.value).split(": lower")[0]
    assert files(tmp_path) == FILES | {"non_finite_batch.pt"}
    kept = torch.load(tmp_path / "non_finite_batch.pt", weights_only=True)["batch"]
    assert (kept[0] == 1e200).any()
    assert load_state(tmp_path / "checkpoint" / "state.pt", "LinearGaussianVAE")["epoch"] == 0
    restored = LinearGaussianVAE(4, 2)
    load_parameters(restored, tmp_path / "checkpoint" / "pair.safetensors")
    assert same(state(restored), before)
    assert all(torch.isfinite(parameter).all() for parameter in pair.parameters())
    assert pyro.settings.get("validate_distributions_pyro")


# Parameters


def test_parameters_come_back_bit_for_bit(tmp_path: Path) -> None:
    pair, other = vae(), vae()
    save_parameters(pair, tmp_path / "new" / "pair.safetensors")
    assert not same(state(pair), state(other))
    load_parameters(other, tmp_path / "new" / "pair.safetensors")
    assert same(state(pair), state(other))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("absent", "does not exist: this run has no checkpoint yet"),
        ("truncated", "is damaged, or no safetensors file"),
        ("text", "is damaged, or no safetensors file"),
        ("foreign", "was not written by pyro_vae"),
        ("model", "is a checkpoint of LinearGaussianVAE, not of VAE"),
        ("shape", "holds a VAE of other shapes or parts: p_x.network.bias"),
    ],
)
def test_other_parameter_files_are_refused_and_change_nothing(damage: str, message: str, tmp_path: Path) -> None:
    pair, path = vae(), tmp_path / "pair.safetensors"
    save_parameters(vae(), path)
    if damage == "absent":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-20])
    elif damage == "text":
        path.write_text("not a checkpoint")
    elif damage == "foreign":
        safetensors.torch.save_file(state(pair), path)
    elif damage == "model":
        save_parameters(LinearGaussianVAE(4, 2), path)
    else:
        save_parameters(vae(5), path)
    before = state(pair)
    with pytest.raises(ValueError, match=message):
        load_parameters(pair, path)
    assert same(before, state(pair))


# Files


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_text(path, "old")

    def fail(file: BinaryIO) -> None:
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_whole(path, fail)
    assert path.read_text() == "old"
    assert files(tmp_path) == {"metrics.jsonl"}


@pytest.mark.parametrize(("content", "message"), [("{", "is damaged"), ("[1]", "holds no JSON object")])
def test_damaged_json_is_named(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_json(path)
