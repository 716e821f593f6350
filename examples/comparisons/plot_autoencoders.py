"""Compare PCA, a deterministic, a denoising and a variational auto-encoder of one size on digits.

Each squeezes 64 pixels through as many latents. Measured: the error of test digits restored from clean and from noisy
input, and the distance of drawn digits, their codes from the training codes' Gaussian, to the nearest training digit.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from sklearn.decomposition import PCA

import pyro_vae as pv
from pyro_vae.networks.mlp import MLP
from pyro_vae.report.figures import image_grid


@dataclass(frozen=True)
class Options:
    """Compare auto-encoders."""

    latent: int = 8
    """Size of the code."""
    epochs: int = 100
    """Passes over the data."""
    noise: float = 0.25
    """Of the input, a standard deviation."""
    out: Path = Path("runs/plot_autoencoders")
    """Folder of the figure."""


def main(options: Options) -> None:
    """Train four, measure, draw."""
    x, train = (data := pv.data.load("digits")).test, data.train
    torch.manual_seed(0)
    noisy = x + options.noise * torch.randn_like(x)
    codes = {"PCA": pca(train, options.latent), "auto-encoder": autoencoder(train, options, 0.0)}
    codes["denoising auto-encoder"] = autoencoder(train, options, options.noise)
    pair = pv.models.VAE(data.x_shape, pv.StandardNormal(options.latent), pv.Gaussian(pv.LearnedScale(0.2)))
    pv.fit(pair, train, epochs=options.epochs, lr=2e-3, progress=False, device="cpu")
    codes["VAE"] = (lambda t: pair.q_z(t).mean, lambda z: pair.p_x(z).mean)
    rows, labels = [x[:10], noisy[:10]], ["test x", "noisy x"]
    print(f"{'mean squared error':24s} {'clean':>7s} {'noisy':>7s} {'drawn':>7s}")
    for name, (encode, decode) in codes.items():
        with torch.no_grad():
            z = encode(train)
            drawn = decode(torch.distributions.MultivariateNormal(z.mean(0), torch.cov(z.mT)).sample((500,)))
            clean, cleaned = (((decode(encode(t)) - x) ** 2).mean() for t in (x, noisy))
            nearest = torch.cdist(drawn.flatten(1), train.flatten(1)).min(1).values.square().mean() / 64
            rows += [decode(encode(noisy[:10])), drawn[:10]]
        labels += [f"{name}: from noisy", "drawn"]
        print(f"{name:24s} {clean:7.4f} {cleaned:7.4f} {nearest:7.4f}")
    options.out.mkdir(parents=True, exist_ok=True)
    image_grid(rows, labels, f"{options.latent} latents").savefig(options.out / "autoencoders.png", dpi=120)


def pca(train: torch.Tensor, latent: int):
    """Return the encoder and decoder of principal components."""
    fitted = PCA(latent).fit(train.flatten(1).numpy())
    axes, mean = (torch.from_numpy(array).to(train) for array in (fitted.components_, fitted.mean_))
    return lambda t: (t.flatten(1) - mean) @ axes.mT, lambda z: (z @ axes + mean).reshape(-1, 1, 8, 8)


def autoencoder(train: torch.Tensor, options: Options, noise: float):
    """Return the encoder and decoder that restore digits, from noisy ones where there is noise."""
    encode, decode = MLP([(1, 8, 8)], options.latent), MLP([(options.latent,)], 64)
    optimizer = torch.optim.Adam([*encode.parameters(), *decode.parameters()], lr=2e-3)
    for _ in range(options.epochs):
        for x in train[torch.randperm(len(train))].split(128):
            optimizer.zero_grad()
            ((decode(encode(x + noise * torch.randn_like(x))) - x.flatten(1)) ** 2).mean().backward()
            optimizer.step()
    return encode, lambda z: decode(z).reshape(-1, 1, 8, 8)


if __name__ == "__main__":
    main(tyro.cli(Options))
