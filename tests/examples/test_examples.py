"""Every example runs, small, in a process of its own, and each has an entry here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
ARGUMENTS = {
    "basics/plot_srvae_digits.py": ("--epochs", "1", "--num-particles", "2"),
    "basics/plot_vae_digits.py": ("--epochs", "1", "--num-particles", "2"),
    "basics/train_with_plain_svi.py": ("--epochs", "1"),
    "models/plot_beta_vae_sprites.py": ("--epochs", "1", "--size", "128", "--num-votes", "5"),
    "models/plot_categorical_vae_mnist.py": ("--epochs", "1", "--size", "128", "--num-particles", "2"),
    "models/plot_denoising_vae_mnist.py": ("--epochs", "1", "--size", "128", "--num-particles", "2"),
    "models/plot_flow_vae.py": ("--epochs", "1", "--num-particles", "2"),
    "models/plot_gaussian_mixture_vae.py": ("--epochs", "2"),
    "models/plot_ladder_vae.py": ("--epochs", "1", "--num-particles", "2"),
    "models/plot_srvae_mnist.py": ("--epochs", "1", "--size", "64", "--num-particles", "2"),
    "models/plot_vamp_prior_vae.py": ("--epochs", "1", "--num-particles", "2"),
    "models/plot_vgae.py": ("--epochs", "1"),
    "evaluation/plot_arviz.py": ("--epochs", "1", "--size", "30"),
    "evaluation/plot_pitfalls.py": (),
    "comparisons/plot_autoencoders.py": ("--epochs", "1"),
    "comparisons/plot_em.py": ("--size", "60", "--epochs", "2", "--draws", "2"),
    "comparisons/plot_gradient_variance.py": ("--draws", "3", "--epochs", "1"),
    "comparisons/plot_latent_sizes.py": ("--data", "digits", "--size", "200", "--epochs", "1"),
    "comparisons/plot_mixture_prior.py": ("--epochs", "1"),
}


def test_every_example_is_run() -> None:
    assert {path.relative_to(EXAMPLES).as_posix() for path in EXAMPLES.rglob("*.py")} == set(ARGUMENTS)


def test_every_example_is_short() -> None:
    assert all(len(path.read_text().splitlines()) <= 80 for path in EXAMPLES.rglob("*.py"))


@pytest.mark.parametrize("name", ARGUMENTS)
def test_example_runs(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    # As in the tests' process: the tensors are small, and a second thread costs more than it gives.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if any(word in name for word in ("mnist", "vgae")):
        environment["PYRO_VAE_DATA"] = str(request.getfixturevalue("shared_data"))
    command = [sys.executable, "-W", "error", str(EXAMPLES / name), *ARGUMENTS[name]]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    figures = list(tmp_path.glob("runs/*/*.png"))
    assert figures or not Path(name).name.startswith("plot_")
