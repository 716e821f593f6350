"""What one of several processes does; run as a program it writes what it found, called in a test it is one process."""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.cli.main import main as command_line
from pyro_vae.likelihood.shared import shared_log_likelihood
from pyro_vae.models import VAE, LinearGaussianVAE
from pyro_vae.runtime.distributed import join

# Two processes with batches of 4 are one with batches of 8: four batches of 8 an epoch, and one of a single datum.
SIZE, WHOLE_BATCH, EPOCHS = 33, 8, 4


class Given(dist.Normal):
    """N(loc, scale²) whose draw is made of noise that was given."""

    def __init__(self, loc: Tensor, scale: Tensor, noise: Tensor) -> None:
        super().__init__(loc, scale)
        self.noise = noise

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        return self.loc + self.scale * self.noise.expand(*sample_shape, *self.loc.shape)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Given:
        return Given(*(tensor.expand(batch_shape) for tensor in (self.loc, self.scale, self.noise)))


class Noisy(pv.Pair):
    """A VAE whose guide is given its noise, with a parameter that no loss depends on."""

    x_shape = (3,)

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.encoder, self.decoder = nn.Linear(3, 4), nn.Linear(2, 3)
        self.idle = nn.Parameter(torch.ones(2))

    def model(self, x: Tensor, noise: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z.tanh()), 0.7).to_event(1), obs=x)

    def guide(self, x: Tensor, noise: Tensor) -> None:
        with pyro.plate("data", len(x)):
            loc, raw = self.encoder(x).chunk(2, -1)
            pyro.sample("z", Given(loc, raw.exp(), noise).to_event(1))


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fit(pair: pv.Pair, data: Any, **kwargs: Any) -> pv.Run:
    """Train with plain gradient steps: Adam would hide a gradient of the wrong size."""
    batch_size = WHOLE_BATCH // join().size
    options: dict[str, Any] = {
        "optimizer": lambda p: torch.optim.SGD(p, lr=0.005, momentum=0.9, weight_decay=0.01),
        "epochs": EPOCHS,
        "batch_size": batch_size,
        "progress": False,
        "device": "cpu",
    }
    return pv.fit(pair, data, **(options | kwargs))


def trajectory(**kwargs: Any) -> dict[str, Any]:
    """Train with given noise and return the losses and the parameters."""
    pair = Noisy()
    held_out = (draw(7, 3, seed=4), draw(7, 2, seed=5))
    run = fit(pair, (draw(SIZE, 3), draw(SIZE, 2, seed=2)), validation=held_out, **kwargs)
    losses = [[record["loss"], record["validation_loss"], *record["terms"].values()] for record in run.metrics]
    return {"losses": torch.tensor(losses), "state": dict(pair.state_dict())}


TRAJECTORIES: dict[str, dict[str, Any]] = {
    "eager": {"capture": False},
    "captured": {"capture": True},
    "particles": {"capture": True, "loss": Trace_ELBO(num_particles=2), "clip_norm": 1.0},
    "objective": {"capture": False, "loss": pv.objectives.elbo},
}


def small_vae() -> VAE:
    torch.manual_seed(3)
    network = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    return VAE((4,), pv.StandardNormal(2), encoder=network, decoder=nn.Linear(2, 4))


def resumed(folder: Path) -> dict[str, Any]:
    """Train unbroken and in two parts; noise is each process's own."""
    start, x = small_vae(), draw(32, 4)
    whole, part, rest = (copy.deepcopy(start) for _ in range(3))
    fit(whole, x, run_dir=folder / "whole")
    fit(part, x, epochs=2, run_dir=folder / "parts")
    fit(rest, x, run_dir=folder / "parts", resume=True)
    return {"unbroken": dict(whole.state_dict()), "resumed": dict(rest.state_dict()), "noise": torch.rand(1)}


def message(function: Callable[..., object], *args: Any, **kwargs: Any) -> str:
    """Return the message of the ValueError that a call raises."""
    try:
        function(*args, **kwargs)
    except ValueError as error:
        return str(error)
    return "nothing was raised"


def refusals(folder: Path) -> dict[str, str]:
    """Return what is said where one process only, or the first one only, could know."""
    rank, x = join().rank, draw(32, 4)
    overflowing = x.clone()
    # Its square overflows, in whichever process it falls.
    overflowing[5] = 1e200
    return {
        "data": message(fit, small_vae(), x + rank),
        "folder": message(fit, small_vae(), x, run_dir=folder / "whole"),
        "batch": message(fit, small_vae(), x, batch_size=32),
        "finite": message(fit, LinearGaussianVAE(4, 2), overflowing, run_dir=folder / "finite"),
    }


def likelihoods() -> dict[str, Tensor]:
    """Return the log-likelihoods of a pair whose every weight is log p(x), shared out and exact."""
    torch.manual_seed(3)
    pair, x = LinearGaussianVAE(4, 2), draw(9, 4)

    def estimate(part: Tensor, seed: int) -> pv.LogLikelihood:
        return pv.log_likelihood(pair, part, num_particles=4, seed=seed)

    ll = shared_log_likelihood(join(), estimate, x, seed=0)
    return {"estimate": ll.per_datum, "curve": ll.curve, "exact": pair.exact_log_likelihood(x).detach()}


def commands(folder: Path) -> list[int]:
    """Train and evaluate from the command line, and return the exit statuses."""
    os.chdir(folder)
    train = ("train", "vae", "--data", "digits", "--latent", "2", "--epochs", "1", "--run-dir", "run")
    evaluate = ("evaluate", "run", "--num-particles", "2", "--size", "21")
    return [command_line(train), command_line(evaluate), command_line(("sample", "run"))]


def main(folder: Path) -> None:
    """Do all of it, and write what this process found."""
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    rank = join().rank
    found: dict[str, Any] = {name: trajectory(**options) for name, options in TRAJECTORIES.items()}
    found |= {"resumed": resumed(folder), "refusals": refusals(folder), "likelihoods": likelihoods()}
    torch.set_default_dtype(torch.float32)
    found["commands"] = commands(folder)
    torch.save(found, folder / f"{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
