"""Test that a pair follows the contract that the package relies on."""

from __future__ import annotations

from typing import Literal, NamedTuple

import pyro
import torch
from pyro.distributions import MixtureSameFamily
from torch import Tensor

from pyro_vae.pair.checks import check_batch
from pyro_vae.pair.modes import drawing, rehearsal, to_pair
from pyro_vae.pair.pair import Pair
from pyro_vae.pair.trace import PairTrace, check_measures, log_terms, run_guide, run_model, trace_pair

__all__ = ["Finding", "PairContract", "check_pair"]


class Finding(NamedTuple):
    """A finding of :func:`check_pair`: its level, the site or parameter, and the way out."""

    level: Literal["not trainable this way", "not log p(x)"]
    site: str
    message: str


def check_pair(pair: Pair, batch: Tensor | tuple[Tensor, ...]) -> list[Finding]:
    """Check a pair against the contract that every function of the package relies on.

    The pair and the caller's random state are left unchanged.

    Args:
        pair: any pair.
        batch: ``x``, or ``x`` and the pair's conditions; at least two data.

    Returns:
        Findings, each with the way out; an empty list for a clean pair. The levels are:

        * "not trainable this way": a guide site without rsample, a mixture in the guide, a parameter without a
          gradient, data coupled while training;
        * "not log p(x)": a point mass on a continuous site.

    Raises:
        ValueError: for a broken contract: different latent sites in model and guide, a site outside the data plate, a
            subsampling plate, x read outside ``obs=``, parameters in Pyro's global store, coupled data.

    >>> import torch, pyro_vae as pv
    >>> check_pair(pv.models.LinearGaussianVAE(5, 2), torch.randn(4, 5))
    []
    """
    batch = (batch,) if isinstance(batch, Tensor) else tuple(batch)
    check_batch(pair, batch, "batch")
    if len(batch[0]) < 2:
        raise ValueError(
            "check_pair needs a batch of at least two data, to see whether they stay apart; if a datum is a graph, "
            "pass two graphs on the same nodes"
        )
    batch = to_pair(pair, batch)
    stored = set(pyro.get_param_store())
    with drawing(pair, seed=0):
        trace = trace_pair(pair, *batch)
        _check_plates(trace)
        check_measures(trace)
        _check_reads_x_only_as_obs(pair, batch, trace)
        if _couples(pair, batch, trace):
            raise ValueError(
                "data are coupled: one datum's terms change with the others of its batch; use LayerNorm or GroupNorm "
                "for BatchNorm, and no statistics over the batch"
            )
        idle = _without_gradient(pair, batch)
    if new := sorted(set(pyro.get_param_store()) - stored):
        for name in new:
            pyro.get_param_store().__delitem__(name)
        raise ValueError(f"{new} live in Pyro's global store: store parameters in the module, as nn.Parameter")
    with rehearsal(pair, seed=0):
        training = trace_pair(pair, *batch)
        coupled = _coupled_in_training(pair, batch, training)
    return [*_untrainable(training), *idle, *coupled, *_joint(trace)]


class PairContract:
    """Test the contract: inherit from this in a test class, and write ``make_pair`` and ``make_batch``.

    >>> import torch, pyro_vae as pv
    >>> class TestMine(PairContract):
    ...     def make_pair(self): return pv.models.LinearGaussianVAE(5, 2)
    ...     def make_batch(self): return (torch.randn(4, 5),)
    >>> TestMine().test_contract()
    """

    expected_findings: tuple[tuple[str, str], ...] = ()

    def make_pair(self) -> Pair:
        """Return a new pair."""
        raise NotImplementedError(f"{type(self).__name__} needs a method make_pair")

    def make_batch(self) -> tuple[Tensor, ...]:
        """Return a batch of at least two data, with the pair's conditions."""
        raise NotImplementedError(f"{type(self).__name__} needs a method make_batch")

    def test_contract(self) -> None:
        """The pair has the expected findings, (level, site), and no other."""
        findings = check_pair(self.make_pair(), self.make_batch())
        assert {(f.level, f.site) for f in findings} == set(self.expected_findings), findings

    def test_shapes(self) -> None:
        """Log-terms are (K, B)."""
        batch = self.make_batch()
        terms = log_terms(self.make_pair(), *batch, num_particles=3)
        assert all(term.shape == (3, len(batch[0])) for term in (terms.log_lik, terms.log_prior, terms.log_guide))
        assert terms.log_weights.shape == (3, len(batch[0]))

    def test_nothing_in_the_store(self) -> None:
        """A step of Pyro's SVI updates the module, and adds nothing to the global store."""
        pair, batch = self.make_pair(), self.make_batch()
        before = set(pyro.get_param_store())
        optimizer = pyro.optim.Adam({"lr": 1e-3})
        pyro.infer.SVI(pair.model, pair.guide, optimizer, pyro.infer.Trace_ELBO()).step(*batch)
        assert set(pyro.get_param_store()) == before


def _check_plates(trace: PairTrace) -> None:
    for site in (*trace.guide.values(), *trace.model.values()):
        # Raises for a site outside the data plate.
        _ = site.log_prob
        if site.is_scaled:
            raise ValueError(f"site '{site.name}' is scaled inside the pair: leave scales to training (beta) and Pyro")
    if not any(site.is_observed for site in trace.model.values()):
        raise ValueError("the model observes nothing: pass obs=x at the data's site")


def _check_reads_x_only_as_obs(pair: Pair, batch: tuple[Tensor, ...], trace: PairTrace) -> None:
    """Run the model on other data with the same latents; no distribution may change."""
    x = batch[0]
    # NaN spreads from whatever reads it. Integers have none; they move on by one datum.
    other = torch.full_like(x, torch.nan) if x.is_floating_point() else x.roll(1, 0)
    values = {name: site.drawn for name, site in trace.guide.items()}
    runs = []
    for data in (x, other):
        with pyro.validation_enabled(False):
            torch.manual_seed(0)
            runs.append(run_model(pair, data, *batch[1:], num_particles=1, values=values, observe=False))
    for name, site in runs[0].items():
        with pyro.validation_enabled(False):
            value = site.drawn if site.observation is None else site.observation
            same = torch.equal(site.fn.log_prob(value), runs[1][name].fn.log_prob(value))
        if not same:
            raise ValueError(
                f"the model reads x outside obs=: the distribution at site '{name}' changes with it, and log p(x) "
                "means nothing; pass the part that it needs as a condition"
            )


def _couples(pair: Pair, batch: tuple[Tensor, ...], trace: PairTrace) -> bool:
    """Replace all data by copies of the first, with the same latents; its terms may not change."""
    copies = tuple(tensor[:1].expand_as(tensor) for tensor in batch)
    values = {name: site.drawn for name, site in trace.guide.items()}
    first = []
    for data in (batch, copies):
        with pyro.validation_enabled(False):
            first.append(torch.stack([term[..., 0].squeeze() for term in _rescored(pair, data, values)]))
    # A matmul over another batch may sum in another order: a few hundred roundings.
    eps = 1000 * torch.finfo(first[0].dtype).eps
    return not torch.allclose(first[0], first[1], rtol=eps, atol=eps, equal_nan=True)


def _rescored(pair: Pair, batch: tuple[Tensor, ...], values: dict[str, Tensor]) -> list[Tensor]:
    """Return both programs' log-densities, site by site, at given latents.

    A flow without an inverse scores only its latest draws. The guide then draws again from one seed, and the first
    datum has the same noise in every batch.
    """
    for latents in (values, None):
        torch.manual_seed(0)
        guide = run_guide(pair, *batch, num_particles=1, values=latents)
        try:
            terms = [site.log_prob for site in guide.values()]
            break
        except (KeyError, NotImplementedError):
            if latents is None:
                raise
    drawn = {name: site.drawn for name, site in guide.items()}
    model = run_model(pair, *batch, num_particles=1, values=drawn)
    return terms + [site.log_prob for site in model.values()]


def _untrainable(trace: PairTrace) -> list[Finding]:
    findings = []
    for name, site in trace.guide.items():
        if site.is_reparameterised:
            continue
        if isinstance(site.bare, MixtureSameFamily):
            advice = "a mixture has no rsample: make its component a site of model and guide, or use a flow"
        else:
            advice = (
                f"{site.family} has no rsample: train with Trace_ELBO, TraceGraph_ELBO or "
                "TraceEnum_ELBO, or relax it (RelaxedOneHotCategorical)"
            )
        findings.append(Finding("not trainable this way", name, advice))
    return findings


def _without_gradient(pair: Pair, batch: tuple[Tensor, ...]) -> list[Finding]:
    if not any(parameter.requires_grad for parameter in pair.parameters()):
        return []
    saved = {parameter: parameter.grad for parameter in pair.parameters()}
    try:
        pair.zero_grad()
        with torch.enable_grad():
            log_terms(pair, *batch).log_weights.sum().backward()
        idle = [n for n, p in pair.named_parameters() if p.requires_grad and p.grad is None]
    finally:
        for parameter, gradient in saved.items():
            parameter.grad = gradient
    return [Finding("not trainable this way", n, "this parameter gets no gradient: use it or remove it") for n in idle]


def _coupled_in_training(pair: Pair, batch: tuple[Tensor, ...], trace: PairTrace) -> list[Finding]:
    if not _couples(pair, batch, trace):
        return []
    message = (
        "in training mode one datum's terms change with the others of its batch (BatchNorm, a batch-optimal scale): "
        "the training loss is then no bound; trust the evaluation only"
    )
    return [Finding("not trainable this way", "", message)]


def _joint(trace: PairTrace) -> list[Finding]:
    return [
        Finding(
            "not log p(x)",
            name,
            f"the guide fixes the continuous site '{name}' to a point mass: the bound is on the joint "
            f"log p(x, {name}), which depends on its unit; make it a latent with a density, or discrete",
        )
        for name in sorted(trace.point_masses)
        if not trace.model[name].is_discrete
    ]
