"""Train β-VAEs on sprites whose factors are known, and look at which latent knows which factor.

The figure: the mutual information of each latent with each factor at β = 1, at β = 4, and with β = 4 on the total
correlation alone; and the effect of the last one's three most informative latents on an image. The text: MIG and the
β-VAE metric of each.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from matplotlib.figure import Figure

import pyro_vae as pv
from pyro_vae.report.figures import save_figure


@dataclass(frozen=True)
class Options:
    """Compare the codes for several β."""

    epochs: int = 9
    """Passes over the data."""
    size: int = 4608
    """Number of sprites."""
    latent: int = 8
    """Size of z."""
    num_votes: int = 200
    """Votes per factor of the β-VAE metric."""
    out: Path = Path("runs/plot_beta_vae_sprites")
    """Folder of the figure."""


def main(options: Options) -> None:
    """Train, score, draw."""
    data = pv.data.sprites(options.size)
    figure = Figure(figsize=(13, 3.4), layout="constrained")
    axes = figure.subplots(1, 4, width_ratios=(1, 1, 1, 1.6))
    for ax, name in zip(axes, ("β = 1", "β = 4", "β-TCVAE, β = 4"), strict=False):
        torch.manual_seed(0)
        beta = float(name[-1])
        pair = pv.models.BetaVAE(data.images.shape[1:], pv.StandardNormal(options.latent), beta=beta)
        loss = pair.total_correlation_elbo(len(data.images)) if "TC" in name else pair.objective()
        pv.fit(pair, data.images, epochs=options.epochs, batch_size=64, loss=loss)
        codes = pv.latent_means(pair, data.images)
        gap = pv.mutual_information_gap(codes, data.factors)
        metric = pv.beta_vae_metric(codes, data.factors, num_votes=options.num_votes)
        print(f"{name}: MIG {gap.gap:.3f}, β-VAE metric {100 * metric:.1f} %")
        shares = gap.information / gap.entropy
        image = ax.imshow(shares.mT.numpy(), vmin=0, vmax=1, cmap="viridis", aspect="auto")
        ax.set(title=f"{name}: MIG {gap.gap:.2f}", xlabel="latent", xticks=range(options.latent))
        ax.set(yticks=range(5), yticklabels=data.names)
    figure.colorbar(image, ax=axes[:3], label="I(latent; factor) / H(factor)")

    chosen = shares.sum(-1).topk(3).indices
    z = codes[:1].repeat(3, 8, 1)
    for i, latent in enumerate(chosen.tolist()):
        z[i, :, latent] = torch.linspace(-2, 2, 8)
    images = pv.generate(pair, 24, given={"z": z.flatten(0, 1)}, seed=0).mean.reshape(3, 8, 32, 32)
    axes[3].imshow(images.permute(0, 2, 1, 3).reshape(96, 256).numpy(), cmap="gray", vmin=0, vmax=1)
    axes[3].set(title="β-TCVAE: one latent from −2 to 2", xticks=[], yticks=[16, 48, 80])
    axes[3].set_yticklabels([f"z{latent}" for latent in chosen.tolist()])
    options.out.mkdir(parents=True, exist_ok=True)
    save_figure(figure, options.out / "factors.png")
    print(f"figure in {options.out}")


if __name__ == "__main__":
    main(tyro.cli(Options))
