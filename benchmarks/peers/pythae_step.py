"""pythae's step: one epoch of its own trainer over a data set of STEPS batches. Answers ``peers.Peer``."""

from __future__ import annotations

import json
import logging
import sys
import tempfile
import time
from importlib.metadata import version

import torch
from pythae.data.datasets import BaseDataset
from pythae.models import VAE, VAEConfig
from pythae.models.base.base_utils import ModelOutput
from pythae.models.nn import BaseDecoder, BaseEncoder
from pythae.trainers import BaseTrainer, BaseTrainerConfig
from torch import nn

BATCH, PIXELS, HIDDEN, LATENT, STEPS, THREADS = map(int, sys.argv[1:])
ANSWERS = sys.stdout


class Encoder(BaseEncoder):
    """The network x → (μ, log σ²)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(PIXELS, HIDDEN), nn.SiLU())
        self.loc, self.log_variance = nn.Linear(HIDDEN, LATENT), nn.Linear(HIDDEN, LATENT)

    def forward(self, x):
        """Return both as pythae wants them."""
        h = self.body(x.flatten(1))
        return ModelOutput(embedding=self.loc(h), log_covariance=self.log_variance(h))


class Decoder(BaseDecoder):
    """The network z → probabilities, since pythae's loss takes those."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(LATENT, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, PIXELS), nn.Sigmoid())

    def forward(self, z):
        """Return them as pythae wants them."""
        return ModelOutput(reconstruction=self.body(z).unflatten(1, (1, PIXELS)))


def main(folder: str) -> None:
    """Take STEPS steps for each line read, and answer with the seconds of one, as JSON."""
    torch.set_num_threads(THREADS)
    logging.disable(logging.WARNING)
    sys.stdout = sys.stderr
    x = torch.rand(STEPS * BATCH, 1, PIXELS).gt(0.7).float()
    config = VAEConfig(input_dim=(1, PIXELS), latent_dim=LATENT, reconstruction_loss="bce")
    training = BaseTrainerConfig(
        output_dir=folder,
        num_epochs=1,
        per_device_train_batch_size=BATCH,
        optimizer_cls="Adam",
        learning_rate=1e-3,
        no_cuda=True,
    )
    trainer = BaseTrainer(VAE(config, Encoder(), Decoder()), BaseDataset(x, torch.zeros(len(x))), None, training)
    trainer.prepare_training()
    trainer.train_step(1)
    print(json.dumps({"version": version("pythae")}), file=ANSWERS, flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        trainer.train_step(1)
        print(json.dumps([(time.perf_counter() - start) / STEPS]), file=ANSWERS, flush=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(folder)
