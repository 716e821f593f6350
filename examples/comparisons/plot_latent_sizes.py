"""Draw new digits from VAEs with 2, 5, 10 and 20 latents, and measure the gain and the cost of more latents.

Sharpness is the mean difference of neighbouring pixels of E[x | z], relative to that of test digits. Confidence is a
classifier's mean largest probability: how much a drawn digit is one of the ten. Between them lies the claim that more
latents make sharper pictures of less structure.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from sklearn.ensemble import RandomForestClassifier
from torch import Tensor

import pyro_vae as pv
from pyro_vae.networks.mlp import MLP
from pyro_vae.report.figures import image_grid


@dataclass(frozen=True)
class Options:
    """Compare sizes of the latent."""

    data: str = "mnist"
    """Data set with labels."""
    data_root: str | None = None
    """Folder of the data sets; else $PYRO_VAE_DATA."""
    size: int = 5000
    """Training images."""
    epochs: int = 20
    """Passes over the data."""
    out: Path = Path("runs/plot_latent_sizes")
    """Folder of the figure."""


def main(options: Options) -> None:
    """Train one VAE per size, measure, draw."""
    data = pv.data.load(options.data, options.data_root)
    train = pv.data.subset_after_shuffle(data.train, options.size)
    labels = pv.data.subset_after_shuffle(data.train_labels, options.size)
    test, test_labels = data.test[:1000], data.test_labels[:1000]
    classifier = RandomForestClassifier(100, random_state=0).fit(train.flatten(1).numpy(), labels.numpy())
    accuracy = classifier.score(test.flatten(1).numpy(), test_labels.numpy())
    binary = pv.data.binarise(train, generator=torch.Generator().manual_seed(0))
    rows, names = [test[:12]], [f"test\n1.00, {confidence(classifier, test):.2f}"]
    print(f"classifier: accuracy {accuracy:.3f} on test images, confidence {confidence(classifier, test):.3f}")
    for latent in (2, 5, 10, 20):
        torch.manual_seed(0)
        networks = {"encoder": MLP([data.x_shape], 2 * latent), "decoder": MLP([(latent,)], data.x_shape[1] ** 2)}
        pair = pv.models.VAE(data.x_shape, pv.StandardNormal(latent), pv.Bernoulli(), **networks)
        run = pv.fit(pair, binary, epochs=options.epochs, progress=False, device="cpu")
        drawn = pv.generate(pair, 1000, seed=0).mean
        sharp, sure = edges(drawn) / edges(test), confidence(classifier, drawn)
        loss = run.metrics[-1]["loss"]
        print(f"{latent:2d} latents: −ELBO {loss:.1f} nats, sharpness {sharp:.2f}, confidence {sure:.2f}")
        rows.append(drawn[:12])
        names.append(f"{latent} latents\n{sharp:.2f}, {sure:.2f}")
    options.out.mkdir(parents=True, exist_ok=True)
    figure = image_grid(rows, names, "E[x | z], z ~ N(0, I); beside: sharpness, classifier's confidence")
    figure.savefig(options.out / "latent_sizes.png", dpi=120)


def edges(images: Tensor) -> float:
    """Return the mean absolute difference of neighbouring pixels."""
    return float(images.diff(dim=-1).abs().mean() + images.diff(dim=-2).abs().mean())


def confidence(classifier: RandomForestClassifier, images: Tensor) -> float:
    """Return the mean largest probability of a class."""
    return float(classifier.predict_proba(images.flatten(1).numpy()).max(1).mean())


if __name__ == "__main__":
    main(tyro.cli(Options))
