"""Train a pair in a plain SVI script, without this package's training."""

from __future__ import annotations

from dataclasses import dataclass

import pyro
import torch
import tyro
from pyro.infer import SVI, Predictive, Trace_ELBO

import pyro_vae as pv


@dataclass(frozen=True)
class Options:
    """Train SRVAE on the bundled digits by Pyro's SVI."""

    epochs: int = 50
    """Passes over the data."""
    batch_size: int = 128
    """Data per step."""


def main(options: Options) -> None:
    """Train, then use two more of Pyro's tools."""
    pyro.set_rng_seed(0)
    data = pv.data.load("digits")
    pair = pv.models.SRVAE(data.x_shape, scale=2, prior=pv.MixtureOfGaussians(10, 16), transition="delta")

    svi = SVI(pair.model, pair.guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
    for epoch in range(options.epochs):
        order = torch.randperm(len(data.train))
        loss = sum(svi.step(data.train[rows]) for rows in order.split(options.batch_size)) / len(order)
        if epoch % 10 == 0 or epoch == options.epochs - 1:
            print(f"epoch {epoch:3d}: −ELBO {loss:8.3f} nats per datum")

    draws = Predictive(pair.model, guide=pair.guide, num_samples=5)(data.test[:3])
    print("Predictive drew", {name: tuple(value.shape) for name, value in draws.items()})
    print(pv.log_likelihood(pair, data.test[:50], num_particles=200))


if __name__ == "__main__":
    main(tyro.cli(Options))
