"""Time pythae's ``get_nll`` on another process's networks and data. ``benchmarks.speed.likelihood`` runs this script.

python -m benchmarks.harness.peers.pythae_likelihood NETWORK DATA_COUNT NUM_PARTICLES BATCH_SIZE THREADS
"""

from __future__ import annotations

import json
import sys
import time

import torch
from pythae.models import VAE, VAEConfig
from pythae.models.base.base_utils import ModelOutput
from pythae.models.nn import BaseDecoder, BaseEncoder
from torch import Tensor, nn
from torch.nn.functional import linear, silu, softplus


class Encoder(BaseEncoder):
    """The encoder whose outputs are a location and the inverse softplus of a scale."""

    def __init__(self, layers: list[tuple[Tensor, Tensor]]) -> None:
        BaseEncoder.__init__(self)
        self.layers = nn.ParameterList(tensor for layer in layers for tensor in layer)

    def forward(self, x: Tensor) -> ModelOutput:
        first, first_bias, last, last_bias = self.layers
        loc, raw = linear(silu(linear(x, first, first_bias)), last, last_bias).chunk(2, -1)
        return ModelOutput(embedding=loc, log_covariance=2 * (softplus(raw) + 1e-4).log())


class Decoder(BaseDecoder):
    """The decoder, with probabilities for its outputs."""

    def __init__(self, layers: list[tuple[Tensor, Tensor]]) -> None:
        BaseDecoder.__init__(self)
        self.layers = nn.ParameterList(tensor for layer in layers for tensor in layer)

    def forward(self, z: Tensor) -> ModelOutput:
        first, first_bias, last, last_bias = self.layers
        return ModelOutput(reconstruction=linear(silu(linear(z, first, first_bias)), last, last_bias).sigmoid())


def main(path: str, count: int, num_particles: int, batch_size: int, threads: int) -> None:
    """Print the seconds that the data took and the mean log-likelihood, in nats."""
    torch.set_num_threads(threads)
    network = torch.load(path, weights_only=True)
    x = network["x"][:count]
    latent = network["decoder"][0][0].shape[1]
    config = VAEConfig(input_dim=(x.shape[1],), latent_dim=latent, reconstruction_loss="bce")
    model = VAE(config, Encoder(network["encoder"]), Decoder(network["decoder"])).eval()
    with torch.no_grad():
        model.get_nll(x[:1], num_particles, batch_size)
        start = time.perf_counter()
        mean = float(model.get_nll(x, num_particles, batch_size))
        print(json.dumps({"seconds": time.perf_counter() - start, "mean": mean}))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
