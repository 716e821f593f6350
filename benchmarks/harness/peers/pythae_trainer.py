"""Run epochs of pythae's trainer, whose DataLoader delivers every batch. Answers ``launch.Peer``."""

from __future__ import annotations

import logging
import sys
import tempfile
from importlib.metadata import version

import torch
from pythae.data.datasets import BaseDataset
from pythae.models import VAE, VAEConfig
from pythae.models.base.base_utils import ModelOutput
from pythae.models.nn import BaseDecoder, BaseEncoder
from pythae.trainers import BaseTrainer, BaseTrainerConfig
from torch import nn

from benchmarks.harness.peers.turns import turns

BATCH, PIXELS, HIDDEN, LATENT, DATA, THREADS = map(int, sys.argv[1:])
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
    """Take an epoch over DATA data for each line read, and answer with its seconds, as JSON."""
    torch.set_num_threads(THREADS)
    logging.disable(logging.WARNING)
    sys.stdout = sys.stderr
    x = torch.rand(DATA, 1, PIXELS).gt(0.7).float()
    config = VAEConfig(input_dim=(1, PIXELS), latent_dim=LATENT, reconstruction_loss="bce")
    training = BaseTrainerConfig(
        output_dir=folder,
        num_epochs=1,
        per_device_train_batch_size=BATCH,
        optimizer_cls="Adam",
        learning_rate=1e-3,
        no_cuda=not torch.cuda.is_available(),
    )
    trainer = BaseTrainer(VAE(config, Encoder(), Decoder()), BaseDataset(x, torch.zeros(len(x))), None, training)
    trainer.prepare_training()
    trainer.train_step(1)
    device = next(trainer.model.parameters()).device.type
    for _ in turns({"version": version("pythae"), "device": device}, answers=ANSWERS):
        trainer.train_step(1)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(folder)
