"""Draw by how many nats common mistakes miss a known log p(x), beside pv.log_likelihood on the same pair."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
import tyro
from matplotlib.figure import Figure

import pyro_vae as pv


@dataclass(frozen=True)
class Options:
    """Draw the error of each mistake."""

    out: Path = Path("runs/plot_pitfalls")
    """Folder of the figure."""


class Wide(pv.models.LinearGaussianVAE):
    """Probabilistic PCA, whose log p(x) is known, with a guide 1.7 times as wide as the posterior."""

    def guide(self, x):
        exact = self.exact_posterior(x)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(exact.loc, scale_tril=1.7 * exact.scale_tril))


def log_mean(log_weights):
    return torch.logsumexp(log_weights, 0) - math.log(len(log_weights))


NORMAL, SIZE = dist.Normal(0.0, 1.0), 6

# Each mistake's mean log p(x), from log-weights and log-terms (K, B). Numbers: tests/documents/test_pitfalls_table.py.
WRONG = {
    "1: a joint density, log p(x, z)": lambda w, t: (t.log_lik + t.log_prior).mean(),
    "2: a plate's scale of 20 inside the log": lambda w, t: log_mean(20 * w).mean() / 20,
    "3: one weight for the whole batch": lambda w, t: log_mean(w.sum(1)) / w.shape[1],
    "10: mean over the batch inside the log": lambda w, t: log_mean(w.mean(1)),
    "10: weights upside down": lambda w, t: -log_mean(-w).mean(),
    "10: half of the draws, over their full number": lambda w, t: log_mean(w[::2]).mean() - math.log(2),
    "11: mean over the entries of x": lambda w, t: log_mean(t.log_lik / SIZE + t.log_prior - t.log_guide).mean(),
    "21: a latent the guide lacks": lambda w, t: log_mean(w + NORMAL.log_prob(torch.randn_like(w))).mean(),
}


def main(options: Options) -> None:
    """Compute, print, draw."""
    torch.manual_seed(0)
    pair = Wide(SIZE, 2)
    x = pv.generate(pair, 100).x
    with torch.no_grad():
        exact = float(pair.exact_log_likelihood(x).mean())
        terms = pv.log_terms(pair, x, num_particles=2000)
        found = {name: float(wrong(terms.log_weights, terms)) for name, wrong in WRONG.items()}
    ours = pv.log_likelihood(pair, x, num_particles=2000, proposal="guide")

    ax = Figure(figsize=(10, 3.8), layout="constrained").subplots()
    for row, (name, wrong) in enumerate(found.items()):
        print(f"{name:46} exact {exact:.3f}   wrong {wrong:.3f}   ours {ours.mean:.3f}")
        ax.text(wrong - exact, row - 0.25, f"{wrong - exact:+.2f}", ha="center")
    ax.plot([wrong - exact for wrong in found.values()], range(len(found)), "X", color="C3", ms=9, label="the mistake")
    ax.plot([ours.mean - exact] * len(found), range(len(found)), "o", color="C0", label="pv.log_likelihood")
    ax.set_yticks(range(len(found)), found)
    ax.set(xlabel="estimate − exact log p(x) (nats per datum)", ylim=(len(found) - 0.5, -0.8))
    ax.legend()
    options.out.mkdir(parents=True, exist_ok=True)
    ax.figure.savefig(options.out / "pitfalls.png", dpi=120)
    print(f"figure in {options.out}")


if __name__ == "__main__":
    main(tyro.cli(Options))
