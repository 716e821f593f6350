"""Figures of a run; each is a function of the pair, its data set and its metrics."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.figure
import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.ticker import LogFormatter
from torch import Tensor

from pyro_vae.conditionals.priors import MixtureOfGaussians
from pyro_vae.data import AnyDataSet, DataSet
from pyro_vae.diagnostics.collapse import CollapseReport, noise_modules
from pyro_vae.likelihood.posterior import posterior
from pyro_vae.pair.pair import Pair
from pyro_vae.predict.generate import generate
from pyro_vae.predict.reconstruction import reconstruct
from pyro_vae.predict.super_resolution import SuperResolution, super_resolve
from pyro_vae.runtime.files import write_whole
from pyro_vae.runtime.random_state import own_random_state

__all__ = ["FIGURES", "Figure", "collapse", "image_grid", "save_figure", "scatter_classes", "super_resolution_grid"]

Figure = matplotlib.figure.Figure
COLOURS: Any = matplotlib.colormaps["tab10"]
Draw = Callable[[Pair, AnyDataSet, list[dict[str, Any]]], Figure | None]


def image_grid(rows: list[Tensor], labels: list[str], title: str, columns: list[str] | None = None) -> Figure:
    """Draw rows of images.

    Args:
        rows: images of each row, (N, C, H, W), with values in [0, 1].
        labels: label of each row.
        title: title of the figure.
        columns: title of each column, or None.

    >>> image_grid([torch.rand(3, 1, 4, 4)], ["x"], "noise").get_suptitle()
    'noise'
    """
    count = max(len(row) for row in rows)
    figure = Figure(figsize=(1.3 + 0.75 * count, 0.6 + 0.75 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), count, squeeze=False)
    for i, (row, label) in enumerate(zip(rows, labels, strict=True)):
        for j in range(count):
            ax = axes[i, j]
            ax.set_xticks([])
            ax.set_yticks([])
            if j >= len(row):
                ax.axis("off")
                continue
            image = row[j].detach().cpu().clamp(0, 1).permute(1, 2, 0).squeeze(-1).numpy()
            ax.imshow(image, cmap=None if image.ndim == 3 else "gray", vmin=0, vmax=1, interpolation="nearest")
            if j == 0:
                ax.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)
            if i == 0 and columns is not None:
                ax.set_title(columns[j], fontsize=9)
    figure.suptitle(title, fontsize=11)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, whole or not at all."""
    write_whole(path, lambda file: figure.savefig(file, dpi=120, format="png"))


def loss(pair: Pair, data: AnyDataSet, metrics: list[dict[str, Any]]) -> Figure | None:
    """Draw the training loss, the validation −ELBO and its terms by epoch."""
    if not metrics:
        return None
    epochs = [record["epoch"] for record in metrics]
    figure = Figure(figsize=(8.4, 3.4), layout="constrained")
    axes = figure.subplots(1, 2)
    axes[0].plot(epochs, [r["loss"] for r in metrics], label="training loss")
    if metrics[-1]["validation_loss"] is not None:
        axes[0].plot(epochs, [r["validation_loss"] for r in metrics], label="validation −ELBO")
    axes[0].set_ylabel("nats per datum")
    for name in metrics[-1]["terms"]:
        axes[1].plot(epochs, [r["terms"][name] for r in metrics], label=name)
    axes[1].set_ylabel("share of −ELBO by site (nats)")
    for ax in axes:
        ax.set_xlabel("epoch")
        ax.legend(fontsize=8)
        ax.grid(alpha=0.3)
    return figure


def scales(pair: Pair, data: AnyDataSet, metrics: list[dict[str, Any]]) -> Figure | None:
    """Draw γ by epoch, and the equivalent β of each data site; None for a pair without learned scales."""
    if not metrics or not metrics[-1]["monitor"]:
        return None
    epochs = [record["epoch"] for record in metrics]
    # Without fit's β, e.g. for an objective with a weight of the KL, γ has no equivalent β.
    noise = {} if metrics[-1]["beta"] is None else noise_modules(pair, data.test[:2])
    figure = Figure(figsize=(8.4 if noise else 4.4, 3.4), layout="constrained")
    axes = figure.subplots(1, 2 if noise else 1, squeeze=False)[0]
    for name in metrics[-1]["monitor"]:
        axes[0].plot(epochs, [r["monitor"][name] for r in metrics], label=name.removesuffix(".head.scale"))
    axes[0].set_ylabel("γ (unit of the data)")
    for site, name in noise.items():
        axes[1].plot(epochs, [r["beta"] * r["monitor"][name] ** 2 for r in metrics], label=f"site {site}")
    if noise:
        axes[1].axhline(1.0, linestyle="--", color="gray", linewidth=1, label="the ELBO at γ = 1")
        axes[1].set_ylabel("β of unit noise: training's β × γ²")
    for ax in axes:
        # β is 0 at the start of a warm-up, and its logarithm does not exist.
        ax.set_yscale("log", nonpositive="mask")
        ax.yaxis.set_major_formatter("{x:.3g}")
        ax.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.set_xlabel("epoch")
        ax.legend(fontsize=8)
        ax.grid(alpha=0.3)
    return figure


def reconstructions(pair: Pair, data: AnyDataSet, metrics: list[dict[str, Any]]) -> Figure | None:
    """Draw test data above their reconstructions; None for a graph."""
    if not isinstance(data, DataSet):
        return None
    x = data.test[:10]
    return image_grid(
        [x, reconstruct(pair, x, seed=0).mean[0]], ["test x", "E[x | z]"], f"Reconstructions, {data.name}"
    )


def samples(pair: Pair, data: AnyDataSet, metrics: list[dict[str, Any]]) -> Figure | None:
    """Draw means of p(x | …) for latents from the prior, one row per component; None for a graph."""
    if not isinstance(data, DataSet):
        return None
    prior, site = getattr(pair, "prior", None), "u" if hasattr(pair, "y_shape") else "z"
    if not isinstance(prior, MixtureOfGaussians):
        rows = list(generate(pair, 50, seed=0).mean.split(10))
        return image_grid(rows, [""] * len(rows), f"Samples, {data.name}")
    order = prior.logits.detach().softmax(-1).argsort(descending=True)[:10]
    weights = prior.logits.detach().softmax(-1)
    rows, labels = [], []
    with torch.no_grad(), own_random_state(0):
        for component in order.tolist():
            draws = prior.means[component] + prior.log_scales[component].exp() * torch.randn(
                10, prior.size, device=prior.means.device
            )
            rows.append(generate(pair, 10, given={site: draws}, seed=0).mean)
            labels.append(f"w = {float(weights[component]):.2f}")
    return image_grid(rows, labels, f"Samples by mixture component, {data.name}")


def super_resolution(pair: Pair, data: AnyDataSet, metrics: list[dict[str, Any]]) -> Figure | None:
    """Draw several x for each y, their mean and pixel-wise spread, and the true x; None for other models."""
    if not hasattr(pair, "low_resolution_guide"):
        return None
    x = data.test[:5]
    y = pair.down_scale(x)  # type: ignore[operator]
    return super_resolution_grid(x, y, super_resolve(pair, y, num_samples=64, seed=0), data.name)


def super_resolution_grid(x: Tensor, y: Tensor, result: SuperResolution, name: str) -> Figure:
    """Draw up to five y, each with five draws of x, their mean and spread, and the true x.

    Args:
        x: true images, (B, C, H, W).
        y: low-resolution images, (B, C, h, w).
        result: draws for each y.
        name: name of the data set.
    """
    result = SuperResolution(*(field.cpu() for field in result))
    shown = min(5, len(result.means))
    rows = []
    for i in range(min(5, len(x))):
        images = [_enlarge(y[i].cpu(), x.shape[-2:]), *result.means[:shown, i], result.samples[:, i].mean(0)]
        rows.append(torch.stack([*images, result.spread[i] / result.spread.max(), x[i].cpu()]))
    columns = ["y", *(f"E[x|y,z{k}]" for k in "₁₂₃₄₅"[:shown]), "mean", "spread", "true x"]
    title = f"Super-resolution, {name} (spread: white = {float(result.spread.max()):.2f})"
    return image_grid(rows, [""] * len(rows), title, columns)


def latent_map(pair: Pair, data: AnyDataSet, metrics: list[dict[str, Any]]) -> Figure | None:
    """Draw the guide's means for test data, or for a graph's nodes, on their two leading principal axes.

    Returns:
        The figure; None for a pair without continuous latent vectors.
    """
    if isinstance(data, DataSet):
        x, classes = data.test[:1000], data.test_labels
        latents = posterior(pair, x, num_particles=8, seed=0).latents
    else:
        classes = data.links.train.labels
        # (K, 1, N, L): the graph is the only datum, and its nodes take the place of data.
        latents = {
            name: z.squeeze(1) for name, z in posterior(pair, data.train, num_particles=8, seed=0).latents.items()
        }
    continuous = [name for name, z in latents.items() if z.dim() == 3 and z.is_floating_point()]
    if not continuous:
        return None
    figure = Figure(figsize=(4.2 * len(continuous), 3.8), layout="constrained")
    axes = figure.subplots(1, len(continuous), squeeze=False)[0]
    for ax, name in zip(axes, continuous, strict=True):
        means = latents[name].mean(0).cpu()
        means = means - means.mean(0)
        _, _, directions = torch.linalg.svd(means, full_matrices=False)
        points = means @ directions[:2].mT if means.shape[-1] > 1 else torch.cat([means, 0 * means], -1)
        scatter_classes(ax, points[:, [0, -1]], None if classes is None else classes[: len(points)])
        ax.set_xlabel(f"first principal axis of E[{name} | x]")
        ax.set_ylabel("second")
    return figure


def scatter_classes(ax: Axes, points: Tensor, classes: Tensor | None, size: float = 8.0) -> None:
    """Draw points (N, 2) in the colours of their classes, (N,) from 0, with a colour bar."""
    across, up = points.mT.numpy()
    if classes is None:
        ax.scatter(across, up, s=size)
        return
    count = int(classes.max()) + 1
    # Distinct colours for few classes; more classes cannot be told apart by colour.
    few = count <= len(COLOURS.colors)
    how: dict[str, Any] = {"cmap": ListedColormap(COLOURS.colors[:count]) if few else "viridis"}
    drawn = ax.scatter(across, up, c=classes.numpy(), s=size, vmin=-0.5, vmax=count - 0.5, **how)
    ax.figure.colorbar(drawn, ax=ax, label="class", ticks=range(count) if few else None)


def _enlarge(image: Tensor, size: torch.Size) -> Tensor:
    return torch.nn.functional.interpolate(image[None], size, mode="nearest")[0]


FIGURES: dict[str, Draw] = {
    "loss": loss,
    "scales": scales,
    "reconstructions": reconstructions,
    "super_resolution": super_resolution,
    "samples": samples,
    "latent_map": latent_map,
}


def collapse(report: CollapseReport) -> Figure | None:
    """Draw the KL of each unit, or the variance of its posterior mean, and the use of components by site."""
    panels: list[tuple[str, str, Tensor, Tensor | None]] = []
    for name, site in report.sites.items():
        units = site.mean_variance if site.kl_per_dimension is None else site.kl_per_dimension
        label = "variance of the posterior mean" if site.kl_per_dimension is None else "KL (nats)"
        if units is not None:
            panels.append((f"unit of {name}", label, units, site.active))
        if site.usage is not None:
            panels.append((f"component of {name}", "mean responsibility", site.usage, None))
    if not panels:
        return None
    figure = Figure(figsize=(4.4 * len(panels), 3.2), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for ax, (unit, quantity, values, active) in zip(axes, panels, strict=True):
        order = values.argsort(descending=True)
        at, heights = torch.arange(len(order)) + 1, values[order]
        groups = [("", "tab:green", torch.ones(len(order), dtype=torch.bool))]
        if active is not None:
            on = active[order]
            groups = [(f"{int(on.sum())} active", "tab:blue", on), (f"{int((~on).sum())} idle", "tab:red", ~on)]
        for label, colour, which in groups:
            if which.any():
                ax.bar(at[which].numpy(), heights[which].numpy(), color=colour, label=label)
        ax.set_xlabel(f"{unit}, from the largest")
        ax.set_ylabel(quantity)
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.grid(alpha=0.3, axis="y")
        if active is not None:
            ax.legend(fontsize=8)
    return figure
