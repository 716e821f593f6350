"""Models that ask more of the command line: a graph, clusters that start late, free bits, and bad options of each."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pyro_vae as pv
from pyro_vae.cli.main import main
from pyro_vae.cli.recipes import RECIPES
from pyro_vae.cli.recipes.recipe import ImageRecipe
from pyro_vae.cli.recipes.vae import VAERecipe
from pyro_vae.cli.recipes.vgae import VGAERecipe
from pyro_vae.cli.runs import load_run
from pyro_vae.data import DataSet
from pyro_vae.runtime.files import read_json
from pyro_vae.training.run_folder import load_state, save_parameters
from tests.support.cli_cases import SMALL, error


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write_network(root: Path) -> None:
    """Write two cliques of ten documents, each with words of its own, as Cora is stored."""
    clique = ~torch.eye(10, dtype=torch.bool)
    edges = pv.data.graph_of(torch.block_diag(clique, clique) > 0).edges
    words = np.repeat(np.arange(2, dtype=np.int32), 10)
    (root / "planetoid").mkdir()
    np.savez(
        root / "planetoid" / "cora.npz",
        edge_index=edges.numpy(),
        num_nodes=np.array(20),
        labels=words.astype(np.int64),
        x_data=np.ones(20, np.float32),
        x_indices=words,
        x_indptr=np.arange(21, dtype=np.int32),
        x_shape=np.array([20, 2]),
    )


@pytest.mark.parametrize("features", ["--features", "--no-features"])
def test_a_graph_is_trained_scored_and_evaluated(
    features: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_network(tmp_path)
    root, arguments = ("--data-root", str(tmp_path)), ("train", "vgae", "--latent", "4", features)
    assert main([*arguments, *root, "--epochs", "100", "--lr", "0.02", "--run-dir", "run"]) == 0
    shown, scores = capsys.readouterr().out, read_json(Path("run/scores.json"))
    # Links within cliques, and none between: every held-out link is above every unlinked pair.
    assert scores == pytest.approx(dict.fromkeys(scores, 1.0), rel=1e-12)
    assert {"AUC, test links", "average precision, validation links"} <= set(scores)
    assert "AUC, test links: 1.000" in shown
    report = Path("run/report.md").read_text()
    assert "| AUC, test links | 1.0000 |" in report
    assert "figures/latent_map.png" in report
    assert "reconstructions" not in report
    assert "BalancedGraphLoss" in json.loads(Path("run/config.json").read_text())["fit"]["loss"]
    pair, data = load_run(Path("run"), str(tmp_path))
    split = pv.data.split_links(pv.data.load_graph("cora", tmp_path), seed=0)
    assert torch.equal(data.train[0], split.train.adjacency())
    assert torch.equal(data.links.test_absent, split.test_absent)
    assert (pair.q_z.network.features is not None) == (features == "--features")
    assert main(["evaluate", "run", "--num-particles", "30", *root]) == 0
    assert json.loads(Path("run/log_likelihood.json").read_text())["data"] == 1
    assert main(["sample", "run", "--num-samples", "3", *root]) == 0
    drawn = np.load("run/samples.npz")["x"]
    assert drawn.shape == (3, 20, 20)
    assert (drawn == drawn.swapaxes(1, 2)).all()


def test_the_split_of_a_graph_has_a_seed_and_shares_of_its_own(tmp_path: Path) -> None:
    write_network(tmp_path)
    arguments = ("train", "vgae", "--data-root", str(tmp_path), "--epochs", "1", "--held-out-validation", "0")
    for seed in "01":
        assert main([*arguments, "--split-seed", seed, "--run-dir", seed]) == 0
    tests = [load_run(Path(seed), str(tmp_path))[1].links.test for seed in "01"]
    assert tests[0].shape == tests[1].shape == (2, 9)
    assert not torch.equal(*tests)
    assert "AUC, validation links" not in json.loads(Path("0/scores.json").read_text())


def test_what_a_graph_cannot_be_trained_by_is_told(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "looked for planetoid/cora.npz" in error(capsys, "train", "vgae", "--data-root", str(tmp_path))
    write_network(tmp_path)
    arguments = ("train", "vgae", "--data-root", str(tmp_path))
    assert "leave none of 90 edges" in error(capsys, *arguments, "--held-out-test", "1")
    assert "size is 0" in error(capsys, *arguments, "--latent", "0")
    with pytest.raises(ValueError, match="digits is no graph"):
        VGAERecipe().build(pv.data.load("digits"))
    with pytest.raises(SystemExit):
        main([*arguments, "--data", "digits"])
    assert "'cora', 'citeseer', 'pubmed'" in " ".join(capsys.readouterr().err.split())
    assert not Path("runs").exists()


def test_more_samples_than_fit_are_refused(
    few_digits: DataSet, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    main(["train", "vae", *SMALL, "--run-dir", "run"])
    monkeypatch.setattr("pyro_vae.cli.draw.MOST_BYTES", 10 * 64 * torch.get_default_dtype().itemsize)
    assert main(["sample", "run", "--num-samples", "10"]) == 0
    assert "ask for 10 at most" in error(capsys, "sample", "run", "--num-samples", "11")


CLUSTERED = ("train", "gaussian-mixture-vae", *SMALL, "--components", "3", "--run-dir", "run")


def test_clusters_start_where_the_data_lie_after_some_epochs(
    few_digits: DataSet, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[tuple[int, float]] = []

    def start(pair: Any, x: torch.Tensor, seed: int = 0) -> None:
        started.append((len(x), float(pair.prior.means.detach().sum())))
        begin(pair, x, seed)

    begin = pv.models.GaussianMixtureVAE.start_clusters
    monkeypatch.setattr(pv.models.GaussianMixtureVAE, "start_clusters", start)
    arguments = (*CLUSTERED, "--start-clusters-after", "2", "--warmup", "2")
    assert main(arguments) == 0
    # By the training data alone: a tenth of the 256 is held out.
    ((count, means),) = started
    assert count == 230
    early, late = (
        json.loads((Path("run") / part / "config.json").read_text())["fit"] for part in ("before_start", ".")
    )
    assert (early["warmup"], late["warmup"]) == (2, 0)
    assert len(Path("run/before_start/metrics.jsonl").read_text().splitlines()) == 2
    assert len(Path("run/metrics.jsonl").read_text().splitlines()) == 1
    before = load_state(Path("run/before_start/checkpoint/state.pt"), "GaussianMixtureVAE")["pair"]
    assert float(before["prior.means"].sum()) == means
    assert "clustering accuracy, test data" in capsys.readouterr().out
    # Continued, it does not start again; begun anew, it spares the folder.
    assert main([*arguments, "--epochs", "2", "--resume"]) == 0
    assert len(started) == 1
    assert "already holds a run" in error(capsys, *arguments)


def test_training_before_the_start_is_continued_too(few_digits: DataSet, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = [*CLUSTERED, "--start-clusters-after", "2"]
    with monkeypatch.context() as patched:
        patched.setattr(pv.models.GaussianMixtureVAE, "start_clusters", interrupt)
        assert main(arguments) == 130
    assert not Path("run/config.json").exists()
    assert main([*arguments, "--resume"]) == 0
    assert main([*arguments[:-2], "--start-clusters-after", "2", "--run-dir", "unbroken"]) == 0
    states = [
        load_state(Path(run) / "checkpoint" / "state.pt", "GaussianMixtureVAE")["pair"] for run in ("run", "unbroken")
    ]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.usefixtures("few_digits")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("gaussian-mixture-vae", "--start-clusters-after", "-1"), "start_clusters_after is -1"),
        (
            ("gaussian-mixture-vae", "--start-clusters-after", "1", "--components", "1000"),
            "1000 components cannot start at 230 training data",
        ),
        (("gaussian-mixture-vae", "--start-clusters-after", "1", "--warmup", "2"), "make the warm-up as short"),
        (("ladder-vae", "--batch-norm", "--layers", "1"), "of which 1 layer has none"),
        (("ladder-vae", "--rise", "2"), "rise is 2.0, but there are no free bits"),
        (("ladder-vae", "--free-bits", "-1"), "free bits are -1"),
        (("ladder-vae", "--free-bits", "1", "--rise", "-3"), "rise is -3"),
        (("ladder-vae", "--free-bits", "1", "--warmup", "2"), "leave --beta and --warmup out"),
        (("denoising-vae", "--corruptions", "0"), "corruptions is 0"),
        (("categorical-vae", "--final-temperature", "0"), "from one positive number to another"),
        (("vamp-prior-vae", "--pseudo-inputs", "0"), "pseudo_inputs is 0"),
        (("flow-vae", "--length", "-1"), "length is -1"),
    ],
)
def test_options_of_models_that_cannot_be(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    assert message in error(capsys, "train", *arguments)
    assert not Path("runs").exists()


@pytest.mark.usefixtures("few_digits")
def test_a_run_with_batch_norm_is_loaded_with_it() -> None:
    arguments = ("train", "ladder-vae", "--layers", "2", "--latent", "4", "--batch-norm", "--epochs", "1")
    assert main([*arguments, "--run-dir", "run"]) == 0
    pair, _ = load_run(Path("run"))
    norms = [module for module in pair.modules() if isinstance(module, torch.nn.BatchNorm1d)]
    assert norms
    # They were trained, and their averages kept.
    assert all(norm.num_batches_tracked > 0 for norm in norms)


@pytest.mark.usefixtures("few_digits")
def test_free_bits_and_a_warm_up_are_had_together() -> None:
    arguments = ("train", "ladder-vae", "--layers", "2", "--latent", "4", "--free-bits", "0.5", "--rise", "4")
    assert main([*arguments, "--epochs", "2", "--run-dir", "run"]) == 0
    config = json.loads(Path("run/config.json").read_text())
    assert config["fit"]["loss"] == "free_bits(0.5, 0 to 1 in 4 epochs)"
    pair, _ = load_run(Path("run"))
    # 230 data make two steps an epoch; the last of them stood at one and a half epochs.
    assert float(pair.beta()) == 1.5 / 4


# The options in config.json as version 0.1.0 stored them.
OPTIONS_OF_0_1_0: dict[str, dict[str, Any]] = {
    "vae": {
        "latent": 20,
        "components": 1,
        "likelihood": "discretised-logistic",
        "scale": "scalar",
        "posterior": "diagonal",
    },
    "srvae": {
        "latent": 16,
        "factor": 2,
        "components": 10,
        "transition": "delta",
        "likelihood": "gaussian",
        "scale": "scalar",
    },
    "beta-vae": {
        "latent": 10,
        "likelihood": "discretised-logistic",
        "penalty": "divergence",
        "weight": 4.0,
        "capacity": 25.0,
        "rise": 10.0,
    },
    "categorical-vae": {
        "latent": 20,
        "categories": 10,
        "likelihood": "discretised-logistic",
        "gradient": "relaxed",
        "temperature": 1.0,
        "final_temperature": 0.5,
        "annealing": 20.0,
    },
    "denoising-vae": {"latent": 20, "components": 1, "likelihood": "gaussian", "noise": 0.1, "corruptions": 5},
    "gaussian-mixture-vae": {
        "latent": 10,
        "components": 10,
        "likelihood": "continuous-bernoulli",
        "scale": "scalar",
        "start_clusters_after": 0,
    },
    "flow-vae": {
        "latent": 20,
        "flow": "planar",
        "length": 2,
        "prior": "normal",
        "prior_length": 2,
        "context": 32,
        "likelihood": "discretised-logistic",
    },
    "ladder-vae": {
        "layers": 3,
        "latent": 16,
        "likelihood": "discretised-logistic",
        "batch_norm": False,
        "free_bits": 0.0,
        "rise": 0.0,
    },
    "vamp-prior-vae": {"latent": 20, "pseudo_inputs": 50, "hidden": 100, "likelihood": "discretised-logistic"},
    "vgae": {
        "latent": 16,
        "components": 1,
        "hidden": 32,
        "features": True,
        "held_out_validation": 0.05,
        "held_out_test": 0.1,
        "split_seed": 0,
    },
}


@pytest.mark.parametrize("command", OPTIONS_OF_0_1_0)
def test_a_run_folder_of_0_1_0_is_loaded(command: str, tmp_path: Path) -> None:
    write_network(tmp_path)
    recipe, name = RECIPES[command](**OPTIONS_OF_0_1_0[command]), "cora" if command == "vgae" else "digits"
    saved = recipe.build(recipe.load_data(name, str(tmp_path)))
    save_parameters(saved, Path("run/checkpoint/pair.safetensors"))
    config = {"model": command, "data": name, "options": OPTIONS_OF_0_1_0[command]}
    Path("run/config.json").write_text(json.dumps(config))
    loaded, _ = load_run(Path("run"), str(tmp_path))
    assert all(torch.equal(value, saved.state_dict()[key]) for key, value in loaded.state_dict().items())


@pytest.mark.usefixtures("few_digits")
def test_a_model_is_added_by_a_recipe_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pyro_vae.cli.recipes.recipe.RECIPES", RECIPES)
    monkeypatch.setitem(RECIPES, "wide-vae", VAERecipe)

    @dataclass(frozen=True)
    class WideVAERecipe(ImageRecipe[pv.models.VAE], command="wide-vae"):
        """VAE with a wide latent."""

        latent: int = 3
        """Size of z."""

        def build(self, data: DataSet) -> pv.models.VAE:
            return pv.models.VAE(data.x_shape, pv.StandardNormal(self.latent))

    assert main(["train", "wide-vae", "--epochs", "1", "--run-dir", "run"]) == 0
    pair, _ = load_run(Path("run"))
    assert pair.prior.size == 3
    # It has no scores, and the report no section for them.
    assert not Path("run/scores.json").exists()
    assert "Scores" not in Path("run/report.md").read_text()


def test_importing_the_package_imports_neither_parser_nor_template_engine() -> None:
    code = "import sys, pyro_vae; sys.exit(any(name in sys.modules for name in ('tyro', 'jinja2')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
