"""Ask every public function about pairs with known values, and print where it is right and where it refuses.

    python -m benchmarks.accuracy.sweep

The pair is a Gaussian line whose guide is its exact posterior: every log-weight is log p(x), each divergence closed.
``docs/silent.md`` holds the table.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.distributions.kl import kl_standard_normal
from pyro_vae.distributions.mixture_kl import MixtureKL
from pyro_vae.objectives.reconstruction import reconstruction
from pyro_vae.runtime.threads import one_at_a_time

__all__ = ["COLUMNS", "END", "FUNCTIONS", "NO_PAIR", "PAGE", "START", "cell", "table"]

PAGE = Path(__file__).resolve().parents[2] / "docs" / "silent.md"
START, END = "<!-- sweep -->", "<!-- end of sweep -->"
# Rounding of a few dozen operations, relative to numbers of a few nats.
ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4}
NOISE = 0.5


class LineLoss(NamedTuple):
    """−ELBO by site."""

    x: Tensor
    z: Tensor

    @property
    def total(self) -> Tensor:
        return self.x + self.z


class Line(pv.Pair):
    """z ~ N(0, 1), x_j ~ N(w_j z + shift, 1/4) for two entries; the guide is the posterior.

    Args:
        kind: the column of the table.
    """

    x_shape = (2,)

    def __init__(self, kind: str = "") -> None:
        super().__init__()
        self.kind = kind
        self.w = nn.Parameter(torch.tensor([1.0, -0.5]))

    def read(self, x: Tensor, conditions: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the weights, residuals and marks of all that is observed, (B, 2 or 3)."""
        shift = conditions[0].unsqueeze(-1) if self.kind == "condition" else 0.0
        seen = conditions[0] if self.kind == "mask" else torch.ones_like(x, dtype=torch.bool)
        weights, residuals = self.w.expand_as(x), x - shift
        if self.kind == "second observed site":
            c = conditions[0].unsqueeze(-1)
            weights, residuals = torch.cat([weights, torch.ones_like(c)], -1), torch.cat([residuals, c], -1)
            seen = torch.ones_like(residuals, dtype=torch.bool)
        return weights * seen, residuals * seen, seen

    def posterior(self, x: Tensor, *conditions: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of z given what is observed, (B, 1)."""
        weights, residuals, _ = self.read(x, conditions)
        precision = 1 + (weights**2).sum(-1, keepdim=True) / NOISE**2
        return (weights * residuals).sum(-1, keepdim=True) / NOISE**2 / precision, precision**-0.5

    def exact(self, x: Tensor, *conditions: Tensor) -> Tensor:
        """Return log p of what is observed by the determinant and the inverse of its covariance, (B,)."""
        weights, residuals, seen = self.read(x, conditions)
        ratio = 1 + (weights**2).sum(-1) / NOISE**2
        squares = (residuals**2).sum(-1) / NOISE**2 - (weights * residuals).sum(-1) ** 2 / NOISE**4 / ratio
        return -0.5 * (squares + ratio.log() + seen.to(x.dtype).sum(-1) * math.log(2 * math.pi * NOISE**2))

    def model(self, x: Tensor, *conditions: Tensor) -> None:
        w = self.w
        if self.kind == "global latent":
            w = w * pyro.sample("shared", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("data", len(x)), poutine.scale(scale=0.5 if self.kind == "scale" else 1.0):
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            pyro.sample("x", self.likelihood(z, w, conditions), obs=x)
            if self.kind == "second observed site":
                pyro.sample("c", dist.Normal(z.squeeze(-1), NOISE), obs=conditions[0])

    def likelihood(self, z: Tensor, w: Tensor, conditions: tuple[Tensor, ...]) -> Any:
        shift = conditions[0].unsqueeze(-1) if self.kind == "condition" else 0.0
        entries = dist.Normal(w * z + shift, NOISE)
        return (entries.mask(conditions[0]) if self.kind == "mask" else entries).to_event(1)

    def guide(self, x: Tensor, *conditions: Tensor) -> None:
        if self.kind == "global latent":
            pyro.sample("shared", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("data", len(x)), poutine.scale(scale=0.5 if self.kind == "scale" else 1.0):
            pyro.sample("z", dist.Normal(*self.posterior(x, *conditions)).to_event(1))

    def closed_form(self, x: Tensor, *conditions: Tensor, num_particles: int, mixture_kl: MixtureKL) -> LineLoss:
        mean, scale = self.posterior(x, *conditions)
        z = dist.Normal(mean, scale).sample((num_particles,))
        return LineLoss(
            reconstruction(self.likelihood(z, self.w, conditions), x).mean(0), kl_standard_normal(mean, scale)
        )

    def e_step(self, x: Tensor) -> Any:
        return self.posterior(x)

    def elbo(self, x: Tensor, q: Any) -> Tensor:
        return self.exact(x)

    def m_step(self, x: Tensor, q: Any) -> None:
        """Leave the parameters: they are known."""


class Conditioned(Line):
    """The same with one condition."""

    # The line's hold for the same model under another signature.
    closed_form, e_step, elbo, m_step = Line.closed_form, Line.e_step, Line.elbo, Line.m_step

    def model(self, x: Tensor, condition: Tensor) -> None:
        super().model(x, condition)

    def guide(self, x: Tensor, condition: Tensor) -> None:
        super().guide(x, condition)


class Case(NamedTuple):
    """A pair of one column with data; ``particles`` is K."""

    pair: Line
    batch: tuple[Tensor, ...]
    particles: int = 1

    @property
    def exact(self) -> Tensor:
        with torch.no_grad():
            return self.pair.exact(*self.batch)

    @property
    def posterior_mean(self) -> Tensor:
        with torch.no_grad():
            return self.pair.posterior(*self.batch)[0]

    @property
    def decoded_mean(self) -> Tensor:
        """E[x~ | what is observed], (B, 2)."""
        shift = self.batch[1].unsqueeze(-1) if self.pair.kind == "condition" else 0.0
        return (self.pair.w * self.posterior_mean + shift).detach()


def case(column: str, count: int = 6) -> Case:
    """Return the pair and the data of a column, from a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 2, generator=generator, dtype=torch.float64)
    conditions: dict[str, Tensor] = {
        "mask": torch.tensor([[True, True], [True, False]]).repeat(count // 2, 1),
        "second observed site": torch.randn(count, generator=generator, dtype=torch.float64),
        "condition": torch.randn(count, generator=generator, dtype=torch.float64),
    }
    batch = (x, conditions[column]) if column in conditions else (x,)
    pair = (Conditioned if column in conditions else Line)(column).double()
    if column in ("float16", "bfloat16"):
        dtype = getattr(torch, column)
        return Case(pair.to(dtype), tuple(part.to(dtype) for part in batch))
    if column == "float32":
        return Case(pair.float(), tuple(part.float() for part in batch))
    if column == "requires_grad":
        return Case(pair, tuple(part.requires_grad_() for part in batch))
    return Case(pair, batch, particles=3 if column == "particle axis" else 1)


COLUMNS = (
    "particle axis",
    "mask",
    "scale",
    "second observed site",
    "condition",
    "global latent",
    "float32",
    "bfloat16",
    "float16",
    "requires_grad",
    "threads",
)


# Each function returns what it found and what is known; a third entry is the standard error of what it found.
Found = tuple[Any, Any] | tuple[Any, Any, Any]


def _terms(objective: Callable[[Any], Tensor]) -> Callable[[Case], Found]:
    return lambda c: (objective(pv.log_terms(c.pair, *c.batch, num_particles=c.particles)), c.exact)


def _number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def _site_terms(c: Case) -> Found:
    terms = pv.site_terms(c.pair, *c.batch, num_particles=c.particles)
    total: Any = sum(term.log_model - term.log_guide for term in terms.values())
    return total, c.exact.expand_as(total)


# Both seed torch's generators, which all threads share.
@one_at_a_time
def _split(c: Case) -> Found:
    torch.manual_seed(0)
    parts = pv.divergence_split(c.pair, *c.batch, num_particles=c.particles)
    torch.manual_seed(0)
    z = pv.site_terms(c.pair, *c.batch, num_particles=c.particles)["z"]
    return sum(parts), (z.log_guide - z.log_model).mean(0)


def _estimate(function: Callable[..., Any], **settings: Any) -> Callable[[Case], Found]:
    def find(c: Case) -> Found:
        result = function(c.pair, *c.batch, seed=0, **settings)
        return result.per_datum, c.exact, result.standard_error

    return find


def _bidirectional(c: Case) -> Found:
    pair, (x, *conditions) = c.pair, c.batch
    bounds = pv.bidirectional_log_likelihood(
        pair, len(x), *conditions, num_temperatures=10, num_chains=4, start="guide", seed=0
    )
    truth = pair.exact(bounds.x, *conditions).detach()
    return torch.stack([bounds.lower, bounds.upper]), torch.stack([truth, truth])


def _fit(loss: Callable[[int], Any]) -> Callable[[Case], Found]:
    def find(c: Case) -> Found:
        run = pv.fit(
            c.pair, c.batch, loss=loss(len(c.batch[0])), epochs=1, batch_size=len(c.batch[0]), lr=1e-12, progress=False
        )
        return _number(-run.metrics[-1]["loss"]), c.exact.mean()

    return find


@one_at_a_time
def _analytic(c: Case) -> Found:
    torch.manual_seed(0)
    loss = pv.analytic_loss(c.pair, *c.batch, num_particles=20_000)
    # A reconstruction term's deviation is below 5 nats.
    return -loss.total, c.exact, torch.full_like(c.exact, 5 / math.sqrt(20_000))


def _means(values: Tensor, truth: Tensor) -> Found:
    """Compare means over draws, the first dimension, with their truth."""
    return values.mean(0), truth, values.std(0) / math.sqrt(len(values))


def _generate(c: Case) -> Found:
    conditions = tuple(part[:1].expand(2000, *part.shape[1:]) for part in c.batch[1:])
    new = pv.generate(c.pair, 2000, *conditions, seed=0)
    shift = conditions[0][0] if c.pair.kind == "condition" else 0.0
    return _means(new.x, torch.zeros_like(new.x[0]) + shift)


def _reconstruct(c: Case) -> Found:
    return _means(pv.reconstruct(c.pair, *c.batch, num_particles=2000, seed=0).mean, c.decoded_mean)


def _posterior(c: Case) -> Found:
    weights = pv.posterior(c.pair, *c.batch, num_particles=c.particles, seed=0).log_weights
    return weights, c.exact.expand_as(weights)


def _impute(c: Case) -> Found:
    if c.pair.kind == "mask":
        # Seen and scored are the same entry here.
        x, seen = c.batch
        found = pv.impute(c.pair, x[1:2], seen[1], seen[1:2], num_samples=1000, sweeps=1, seed=0)
        return _means(found.samples[..., 1], c.decoded_mean[1:2, 1])
    x, *conditions = (part[:1] for part in c.batch)
    found = pv.impute(c.pair, x, torch.tensor([True, False]), *conditions, num_samples=1000, sweeps=3, seed=0)
    shift = conditions[0] if c.pair.kind == "condition" else 0.0
    w, rest = c.pair.w.detach(), (conditions[0] if c.pair.kind == "second observed site" else 0.0)
    extra = 1.0 if c.pair.kind == "second observed site" else 0.0
    precision = 1 + (w[0] ** 2 + extra) / NOISE**2
    mean = (w[0] * (x[:, 0] - shift) + extra * rest) / NOISE**2 / precision
    return _means(found.samples[..., 1], w[1] * mean + shift)


def _collapse(c: Case) -> Found:
    report = pv.collapse_report(c.pair, *c.batch, num_particles=2, seed=0)
    with torch.no_grad():
        exact = kl_standard_normal(*c.pair.posterior(*c.batch)).mean()
    return _number(report.sites["z"].kl), exact


def _gap(c: Case) -> Found:
    gap = pv.inference_gap(c.pair, *c.batch, num_particles=30, steps=2, seed=0)
    return torch.stack([gap.log_likelihood, gap.elbo]), torch.stack([c.exact, c.exact])


def _arviz(c: Case) -> Found:
    found = pv.to_arviz(c.pair, *c.batch, num_particles=10, num_draws=4, seed=0)
    return torch.tensor(found["log_likelihood"]["x"].values)[0, 0], c.exact


def _elpd(c: Case) -> Found:
    ll = pv.log_likelihood(c.pair, *c.batch, num_particles=10, seed=0, progress=False)
    return _number(float(pv.to_elpd(ll)["elpd_loo"])), c.exact.sum()


def _em(c: Case) -> Found:
    # It takes x alone.
    return _number(pv.em(c.pair, c.batch[0], steps=1).after_e[-1]), c.exact.mean()


def _check_pair(c: Case) -> Found:
    findings = pv.testing.check_pair(c.pair, c.batch)
    return _number(float(len(findings))), _number(0.0)


class TwoStages(pv.Pair):
    """u ~ N(0, 1), y_j ~ N(w_j u, 1/4) for two entries, x ~ N(y, 1/4); q(u | y) is the posterior.

    Args:
        line: a pair whose x is this one's y.
    """

    x_shape = y_shape = (2,)

    def __init__(self, line: Line) -> None:
        super().__init__()
        self.line = line

    def model(self, x: Tensor, *conditions: Tensor) -> None:
        w, kind = self.line.w, self.line.kind
        if kind == "global latent":
            w = w * pyro.sample("shared", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("data", len(x)), poutine.scale(scale=0.5 if kind == "scale" else 1.0):
            u = pyro.sample("u", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            y = pyro.sample("y", dist.Normal(w * u, NOISE).mask(self.seen()).to_event(1))
            pyro.sample("x", dist.Normal(y, NOISE).to_event(1), obs=x)

    def seen(self) -> Tensor:
        return torch.tensor([True, self.line.kind != "mask"])

    def guide(self, x: Tensor, *conditions: Tensor) -> None:
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Normal(x, NOISE).to_event(1))
        self.low_resolution_guide(y)

    def low_resolution_guide(self, y: Tensor) -> None:
        conditions = (self.seen().expand(y.shape),) if self.line.kind == "mask" else ()
        with pyro.plate("data", len(y)), poutine.scale(scale=0.5 if self.line.kind == "scale" else 1.0):
            pyro.sample("u", dist.Normal(*self.line.posterior(y, *conditions)).to_event(1))


class TwoStagesGiven(TwoStages):
    """The same with one condition, which ``super_resolve`` has no argument for."""

    def model(self, x: Tensor, condition: Tensor) -> None:
        super().model(x, condition)

    def guide(self, x: Tensor, condition: Tensor) -> None:
        super().guide(x, condition)


def _super_resolve(c: Case) -> Found:
    y, *given = c.batch
    stages = TwoStagesGiven if given and c.pair.kind != "mask" else TwoStages
    found = pv.super_resolve(stages(c.pair).to(y.dtype), y, num_samples=7, seed=0)
    # The mask's column leaves the second entry of every y out.
    seen = torch.tensor([True, False]).expand(y.shape) if c.pair.kind == "mask" else None
    with torch.no_grad():
        exact = c.pair.exact(y) if seen is None else c.pair.exact(y, seen)
    return found.log_weights, exact.expand_as(found.log_weights)


FUNCTIONS: dict[str, Callable[[Case], Found]] = {
    "log_terms": _terms(lambda terms: terms.log_weights.mean(0)),
    "site_terms": _site_terms,
    "objectives.elbo": _terms(pv.objectives.elbo),
    "objectives.iwae": _terms(pv.objectives.iwae),
    "objectives.renyi": _terms(pv.objectives.renyi(0.5)),
    "objectives.beta_elbo": _terms(pv.objectives.beta_elbo(1.0)),
    "fit": _fit(lambda size: None),
    "fit, loss=objectives.elbo": _fit(lambda size: pv.objectives.elbo),
    "fit, loss=DReG": _fit(lambda size: pv.DReG(3)),
    "fit, loss=TotalCorrelationELBO": _fit(lambda size: pv.TotalCorrelationELBO(1.0, size)),
    "em": _em,
    "analytic_loss": _analytic,
    "divergence_split": _split,
    "log_likelihood, proposal=guide": _estimate(pv.log_likelihood, num_particles=30, proposal="guide", progress=False),
    "log_likelihood": _estimate(pv.log_likelihood, num_particles=30, progress=False),
    "naive_log_likelihood": _estimate(pv.naive_log_likelihood, num_particles=3000, progress=False),
    "annealed_log_likelihood": _estimate(pv.annealed_log_likelihood, num_temperatures=10, num_chains=4, start="guide"),
    "bidirectional_log_likelihood": _bidirectional,
    "inference_gap": _gap,
    "collapse_report": _collapse,
    "latent_means": lambda c: (pv.latent_means(c.pair, *c.batch), c.posterior_mean),
    "posterior": _posterior,
    "reconstruct": _reconstruct,
    "generate": _generate,
    "impute": _impute,
    "super_resolve": _super_resolve,
    "to_arviz": _arviz,
    "to_elpd": _elpd,
    "testing.check_pair": _check_pair,
}
# Public functions that take numbers or distributions, and no pair of the table.
NO_PAIR = {
    "advance": "moves numbers of a module",
    "beta_vae_metric": "takes codes",
    "mutual_information_gap": "takes codes",
    "convex_kl_bound": "takes distributions; refuses masked ones",
    "monte_carlo_kl": "takes distributions; refuses masked ones",
    "variational_kl_bound": "takes distributions; refuses masked ones",
}


def cell(function: str, column: str) -> str:
    """Return "right", the refusal, or what is wrong."""
    pyro.clear_param_store()
    try:
        with ThreadPoolExecutor() as pool:
            # One call, or several at once.
            cases = [case(column) for _ in range(3 if column == "threads" else 1)]
            results = list(pool.map(FUNCTIONS[function], cases))
    except ValueError as refused:
        return f"refused: {refused}"
    except Exception as failure:
        return f"ERROR {type(failure).__name__}: {str(failure).splitlines()[0]}"
    dtype = torch.float64 if cases[0].batch[0].dtype == torch.float64 else torch.float32
    return max((_compared(*found, dtype=dtype) for found in results), key="right".__ne__)


def _compared(found: Tensor, truth: Tensor, *error: Tensor, dtype: torch.dtype) -> str:
    # Five standard errors: a few hundred comparisons in all.
    allowed = ROUNDING[dtype] + (5 * error[0].double() if error else 0.0)
    distance = (found.detach().double() - truth.double()).abs()
    return "right" if bool((distance <= allowed).all()) else f"WRONG by {float(distance.max()):.3g}"


def table() -> str:
    """Return the Markdown table, with each refusal once below it."""
    sentences: list[str] = []
    lines = ["| function | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for function in FUNCTIONS:
        cells = []
        for column in COLUMNS:
            found = cell(function, column)
            if found.startswith("refused: "):
                sentence = found.removeprefix("refused: ")
                if sentence not in sentences:
                    sentences.append(sentence)
                found = f"refused ({sentences.index(sentence) + 1})"
            cells.append(found)
        lines.append(f"| `{function}` | " + " | ".join(cells) + " |")
    lines += ["", *(f"{i}. {sentence}." for i, sentence in enumerate(sentences, 1))]
    return "\n".join(lines)


def main() -> None:
    """Print the table; with --write, put it into the page."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"put the table into {PAGE.name}")
    found = table()
    print(found)
    if parser.parse_args().write:
        text = PAGE.read_text()
        PAGE.write_text(text[: text.index(START) + len(START)] + f"\n{found}\n" + text[text.index(END) :])


if __name__ == "__main__":
    main()
