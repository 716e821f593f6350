"""The command line does what its help says, and tells a user what is wrong, where, and how to mend it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO

import pyro_vae as pv
from pyro_vae.cli.main import main
from pyro_vae.cli.recipes import RECIPES
from pyro_vae.cli.recipes.vae import VAERecipe
from pyro_vae.cli.runs import load_run
from pyro_vae.cli.training import Training
from pyro_vae.data import DataSet
from pyro_vae.likelihood.estimate import likelihood_rows
from pyro_vae.likelihood.saved_chunks import SavedChunks
from pyro_vae.report.files import likelihood_record
from pyro_vae.runtime.files import read_json
from pyro_vae.training.fit import fit
from pyro_vae.training.run_folder import load_state
from tests.support.cli_cases import SMALL, error


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_list_names_models_and_data(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in (*RECIPES, *pv.data.NAMES))


@pytest.mark.usefixtures("few_digits")
def test_a_run_from_training_to_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "srvae", *SMALL, "--components", "3", "--run-dir", "run"]) == 0
    assert main(["evaluate", "run", "--num-particles", "3"]) == 0
    assert main(["sample", "run"]) == 0
    assert main(["super-resolve", "run"]) == 0
    assert "log p(x, y)" in capsys.readouterr().out
    report = Path("run/report.md").read_text()
    for name in ("loss", "reconstructions", "samples", "super_resolution", "latent_map"):
        assert f"figures/{name}.png" in report
        with Image.open(f"run/figures/{name}.png") as image:
            assert image.width > 300
    assert "closed, convex" in report
    assert "depends on the unit of each site" in report
    record = json.loads(Path("run/log_likelihood.json").read_text())
    assert record["num_particles"] == 3
    assert "bits_per_dimension" not in record


@pytest.mark.usefixtures("few_digits")
def test_terminal_and_report_show_one_table(capsys: pytest.CaptureFixture[str]) -> None:
    main(["train", "vae", *SMALL, "--run-dir", "run"])
    assert "Log-likelihood" not in Path("run/report.md").read_text()
    capsys.readouterr()
    assert main(["evaluate", "run", "--num-particles", "30"]) == 0
    shown, report = capsys.readouterr().out, Path("run/report.md").read_text()
    for label, value in likelihood_rows(read_json(Path("run/log_likelihood.json"))):
        assert f"| {label} | {value} |" in report
        assert label in shown
        assert value in shown
    for name in ("likelihood_curve", "pareto_k", "guide_against_settled", "error_against_draws"):
        assert f"![{name}](figures/{name}.png)" in report
        assert Path(f"run/figures/{name}.png").exists()


def test_an_interrupted_evaluation_is_continued_by_the_same_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, few_digits: DataSet
) -> None:
    main(["train", "vae", *SMALL, "--run-dir", "run"])
    monkeypatch.setattr("pyro_vae.likelihood.importance.CHUNK", 10)
    calls = iter(range(2))

    def interrupted(kept: SavedChunks, *chunk: Any) -> None:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        write(kept, *chunk)

    write = SavedChunks.write
    with monkeypatch.context() as patched:
        patched.setattr(SavedChunks, "write", interrupted)
        assert main(["evaluate", "run", "--num-particles", "30"]) == 130
    assert "interrupted with 20 of 32 data evaluated" in " ".join(capsys.readouterr().out.split())
    assert not Path("run/log_likelihood.json").exists()
    kept = {path: path.stat().st_mtime_ns for path in Path("run/log_likelihood").rglob("*.safetensors")}
    assert main(["evaluate", "run", "--num-particles", "30"]) == 0
    # As many of the guide alone, in a folder of their own.
    assert len(list(Path("run/log_likelihood").rglob("*.safetensors"))) == 8
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    pair, _ = load_run(Path("run"))
    unbroken = pv.log_likelihood(pair, few_digits.test, num_particles=30, seed=0)
    guide = pv.log_likelihood(pair, few_digits.test, num_particles=30, seed=0, proposal="guide")
    assert read_json(Path("run/log_likelihood.json")) == likelihood_record(unbroken, guide)


@pytest.mark.usefixtures("few_digits")
def test_evaluate_takes_every_proposal(capsys: pytest.CaptureFixture[str]) -> None:
    main(["train", "vae", *SMALL, "--run-dir", "run"])
    capsys.readouterr()
    few = ("--size", "6")
    assert main(["evaluate", "run", *few, "--num-particles", "400", "--tolerance", "0.2"]) == 0
    record = json.loads(Path("run/log_likelihood.json").read_text())
    assert record["tolerance"][0] == 0.2
    assert record["guide"]["mean"] < record["mean"]
    assert "from the guide alone" in capsys.readouterr().out
    assert Path("run/figures/guide_against_settled.png").exists()
    assert main(["evaluate", "run", *few, "--num-particles", "30", "--proposal", "prior"]) == 0
    assert json.loads(Path("run/log_likelihood.json").read_text())["settled"][0][0][0] == "prior"
    # An evaluation without a guide beside it leaves no figure of another one.
    assert not Path("run/figures/guide_against_settled.png").exists()
    capsys.readouterr()
    chains = ("--temperatures", "5", "--chains", "4")
    assert main(["evaluate", "run", *few, "--proposal", "annealed", *chains]) == 0
    assert "by annealing" in capsys.readouterr().out
    assert len(json.loads(Path("run/annealed.json").read_text())["per_datum"]) == 6
    assert main(["evaluate", "run", *few, "--bounds", *chains]) == 0
    assert "between" in capsys.readouterr().out
    bounds = json.loads(Path("run/bounds.json").read_text())
    assert sum(bounds["lower"]) < sum(bounds["upper"])
    assert main(["evaluate", "run", "--tolerance", "0"]) == 2


@pytest.mark.usefixtures("few_digits")
@pytest.mark.parametrize("likelihood", ["discretised-logistic", "gaussian", "continuous-bernoulli"])
def test_evaluate_gives_bits_for_masses_only(likelihood: str) -> None:
    assert main(["train", "vae", *SMALL, "--likelihood", likelihood, "--run-dir", "run"]) == 0
    assert main(["evaluate", "run", "--num-particles", "3", "--size", "10"]) == 0
    record = json.loads(Path("run/log_likelihood.json").read_text())
    assert ("bits_per_dimension" in record) == (likelihood == "discretised-logistic")
    assert record["data"] == 10


@pytest.mark.usefixtures("few_digits")
def test_evaluation_reads_what_training_wrote(monkeypatch: pytest.MonkeyPatch) -> None:
    # On processors without bfloat16 instructions too.
    monkeypatch.setattr("pyro_vae.training.precision.has_bfloat16", lambda _: True)
    how = ("--loss", "iwae", "--num-particles", "3", "--precision", "bf16-mixed", "--capture", "true")
    main(["train", "vae", *SMALL, *how, "--run-dir", "run"])
    settings = json.loads(Path("run/config.json").read_text())["fit"]
    assert (settings["loss"], settings["num_particles"], settings["precision"]) == ("iwae", 3, "bf16-mixed")
    pair, data = load_run(Path("run"))
    again, _ = load_run(Path("run"))
    a, b = (pv.log_likelihood(p, data.test, num_particles=4, seed=0).per_datum for p in (pair, again))
    assert torch.equal(a, b)


@pytest.mark.usefixtures("few_digits")
def test_the_demo_needs_no_argument_and_a_second_one_spares_the_first() -> None:
    for folder in ("runs/demo", "runs/demo-2"):
        assert main(["demo", "--epochs", "1"]) == 0
        assert Path(folder, "report.md").exists()


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize(("name", "kind"), [("elbo", Trace_ELBO), ("mean-field", TraceMeanField_ELBO)])
def test_particles_are_the_elbos_own(name: Any, kind: type, count: int) -> None:
    pair = pv.models.LinearGaussianVAE(3, 1)
    loss, beside = Training(loss=name, num_particles=count).make_loss(None, pair)
    assert (type(loss), beside) == (kind, 1)
    assert loss.num_particles == count
    # All draws are made in one pass: one value of the latent site holds them.
    assert loss.vectorize_particles == (count > 1)


def test_unknown_model_lists_the_known(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["train", "gan"])
    assert exit_.value.code == 2
    message = capsys.readouterr().err
    assert "srvae" in message
    assert "vae" in message


def test_unknown_data_lists_the_known(capsys: pytest.CaptureFixture[str]) -> None:
    message = error(capsys, "train", "vae", "--data", "mnits")
    assert all(name in message for name in pv.data.NAMES)


def test_absent_data_says_where_to_put_which_files(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    message = error(capsys, "train", "vae", "--data", "mnist", "--data-root", str(tmp_path))
    for word in ("train-images-idx3-ubyte", str(tmp_path), "--download", "PYRO_VAE_DATA"):
        assert word in message


@pytest.mark.usefixtures("few_digits")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("srvae", "--factor", "3"), "scale is 3, the image 8 × 8"),
        (("vae", "--likelihood", "bernoulli"), "values outside the support of site 'x'"),
        (("vae", "--batch-size", "4096"), "batch_size is 4096; there are"),
        (("vae", "--beta", "-1"), "beta is -1"),
        (("vae", "--latent", "0"), "size is 0"),
        (("vae", "--resume"), "does not exist"),
    ],
)
def test_bad_settings_cost_no_file(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    assert message in error(capsys, "train", *arguments)
    assert not Path("runs").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="states what happens on a machine without CUDA")
def test_cuda_asked_for_and_absent(capsys: pytest.CaptureFixture[str]) -> None:
    assert "no CUDA device" in error(capsys, "train", "vae", "--device", "cuda")


@pytest.mark.usefixtures("few_digits")
def test_a_folder_that_holds_a_run_is_spared(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "vae", *SMALL]) == 0
    before = Path("runs/vae-digits/checkpoint/state.pt").read_bytes()
    assert "already holds a run" in error(capsys, "train", "vae", *SMALL)
    assert Path("runs/vae-digits/checkpoint/state.pt").read_bytes() == before
    assert main(["train", "vae", "--latent", "2", "--epochs", "2", "--resume"]) == 0
    assert len(Path("runs/vae-digits/metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.usefixtures("few_digits")
def test_damaged_foreign_and_mistaken_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert "does not exist" in error(capsys, "evaluate", "nowhere")
    main(["train", "vae", *SMALL, "--run-dir", "run"])
    assert "num_particles is 0" in error(capsys, "evaluate", "run", "--num-particles", "0")
    assert "has no low-resolution stage" in error(capsys, "super-resolve", "run")
    checkpoint = Path("run/checkpoint/pair.safetensors")
    whole = checkpoint.read_bytes()
    checkpoint.write_bytes(whole[:100])
    assert "is damaged" in error(capsys, "evaluate", "run")
    main(["train", "srvae", *SMALL, "--components", "3", "--run-dir", "other"])
    shutil.copy("other/checkpoint/pair.safetensors", checkpoint)
    assert "is a checkpoint of SRVAE, not of VAE" in error(capsys, "evaluate", "run")
    Path("run/config.json").write_text("{")
    assert "is damaged" in error(capsys, "evaluate", "run")


def test_an_interrupted_run_says_how_to_resume(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, few_digits: DataSet
) -> None:
    calls = iter(range(3))

    class Interrupted(pv.models.VAE):
        def guide(self, x: torch.Tensor) -> None:
            if self.training and next(calls, None) is None:
                raise KeyboardInterrupt
            super().guide(x)

    with monkeypatch.context() as patched:
        patched.setattr("pyro_vae.cli.recipes.vae.VAE", Interrupted)
        assert main(["train", "vae", *SMALL, "--epochs", "3", "--run-dir", "run"]) == 130
    assert "--resume" in capsys.readouterr().out
    pair = VAERecipe(latent=2).build(few_digits)
    assert load_state(Path("run/checkpoint/state.pt"), "Interrupted")["epoch"] >= 0
    with pytest.raises(ValueError, match="holds a run of Interrupted"):
        fit(pair, few_digits.train, epochs=3, validation=0.1, run_dir="run", resume=True, progress=False)


@pytest.mark.usefixtures("few_digits")
def test_a_terminated_run_is_an_interrupted_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    epochs = iter(range(2))

    def update(*_: object, **__: object) -> None:
        if next(epochs, None) is None:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("rich.progress.Progress.update", update)
    assert main(["train", "vae", "--latent", "2", "--epochs", "100000", "--run-dir", "run"]) == 130
    assert "run holds epoch 3: continue it by the same call" in " ".join(capsys.readouterr().out.split())
    assert len(Path("run/metrics.jsonl").read_text().splitlines()) == 3
    assert signal.getsignal(signal.SIGTERM) == before


def test_continuing_a_finished_run_keeps_its_evaluation(few_digits: DataSet) -> None:
    main(["train", "vae", *SMALL, "--run-dir", "run"])
    main(["evaluate", "run", "--num-particles", "3"])
    assert main(["train", "vae", *SMALL, "--run-dir", "run", "--resume"]) == 0
    assert Path("run/log_likelihood.json").exists()


def test_a_models_own_loss_has_its_own_draws(few_digits: DataSet, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "categorical-vae", *SMALL, "--num-particles", "2", "--run-dir", "run"]) == 2
    assert "leave --num-particles out" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("beta-vae", "--loss", "elbo"), "leave --loss out"),
        (("beta-vae", "--beta", "4"), "leave --beta and --warmup out"),
        (("categorical-vae", "--gradient", "score-function", "--loss", "mean-field"), "has no rsample"),
    ],
)
def test_options_that_a_models_own_loss_cannot_take(
    few_digits: DataSet, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    assert main(["train", *arguments, *SMALL, "--run-dir", "run"]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not Path("run").exists()


def test_a_weight_of_the_losss_own_is_not_reported_as_beta(few_digits: DataSet) -> None:
    assert main(["train", "beta-vae", *SMALL, "--likelihood", "gaussian", "--run-dir", "run"]) == 0
    report = Path("run/report.md").read_text()
    assert "beta_elbo(4)" in report
    assert "β = 1" not in report
    assert "β of unit noise" not in report


@pytest.mark.parametrize("locale", ["C", "POSIX"])
def test_a_locale_without_our_letters_shows_tables(locale: str) -> None:
    # Coercion to UTF-8 off, as under locales that Python does not coerce.
    plain = {"LC_ALL": locale, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-m", "pyro_vae", "list"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONIOENCODING"} | plain
    done = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"srvae" in done.stdout
    assert done.stdout.isascii()
