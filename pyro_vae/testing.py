"""The contract of a pair, checked: for this package's pairs and for users' own."""

from __future__ import annotations

from typing import Literal, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.distributions import MixtureSameFamily
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_vae.pair.checks import check_batch
from pyro_vae.pair.modes import device_of, evaluation, rehearsal, to_pair
from pyro_vae.pair.pair import Pair
from pyro_vae.pair.terms import log_terms
from pyro_vae.pair.trace import (
    bare,
    check_measures,
    particle_dim,
    point_masses,
    sample_sites,
    site_log_prob,
    trace_pair,
)
from pyro_vae.runtime.random_state import own_random_state

__all__ = ["Finding", "PairContract", "check_pair"]


class Finding(NamedTuple):
    """One thing that :func:`check_pair` has to say about a pair."""

    level: Literal["not trainable this way", "not log p(x)"]
    site: str
    message: str


def check_pair(pair: Pair, batch: Tensor | tuple[Tensor, ...]) -> list[Finding]:
    """Check a pair against the contract that every function of the package relies on.

    The pair is run in evaluation mode and left as it was; no parameter changes.

    Args:
        pair: any pair.
        batch: ``x``, or ``x`` and the pair's conditions; at least two data.

    Returns:
        Findings at two levels: "not trainable this way" (a guide site without rsample, a mixture in the guide,
        parameters that get no gradient, data coupled while training), each with what to use instead, and
        "not log p(x)" (a point mass on a continuous site). An empty list is a clean pair.

    Raises:
        ValueError: for what is wrong however it is used: different latent sites in model and guide, a site outside the
            data plate, a subsampling plate, x read outside ``obs=``, parameters in Pyro's global store, coupled data.

    >>> import torch, pyro_vae as pv
    >>> check_pair(pv.models.LinearGaussianVAE(5, 2), torch.randn(4, 5))
    []
    """
    batch = (batch,) if isinstance(batch, Tensor) else tuple(batch)
    check_batch(pair, batch, "batch")
    if len(batch[0]) < 2:
        raise ValueError(
            "check_pair needs a batch of at least two data, to see whether they stay apart; where a datum is a graph, "
            "two graphs on the same nodes"
        )
    batch = to_pair(pair, batch)
    with own_random_state(0, device_of(pair)):
        stored = set(pyro.get_param_store())
        with evaluation(pair), torch.inference_mode(False), torch.no_grad():
            guide, model = trace_pair(pair, *batch)
            _check_plates(pair, guide, model)
            check_measures(guide, model)
            _check_reads_x_only_as_obs(pair, batch, guide)
            if _couples(pair, batch, guide):
                raise ValueError(
                    "data are coupled: one datum's terms change with the others of its batch, so that they are not per "
                    "datum; use LayerNorm or GroupNorm for BatchNorm, and no statistics over the batch"
                )
        if new := sorted(set(pyro.get_param_store()) - stored):
            for name in new:
                pyro.get_param_store().__delitem__(name)
            raise ValueError(f"{new} live in Pyro's global store: keep parameters in the module, as nn.Parameter")
        return [
            *_untrainable(pair, batch),
            *_without_gradient(pair, batch),
            *_coupled_in_training(pair, batch),
            *_joint(guide, model),
        ]


class PairContract:
    """Inherit this in a test class and give it ``make_pair`` and ``make_batch``: the contract then is tested.

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
        """The pair has no finding beyond those expected, (level, site)."""
        findings = check_pair(self.make_pair(), self.make_batch())
        assert {(f.level, f.site) for f in findings} == set(self.expected_findings), findings

    def test_shapes(self) -> None:
        """Log-terms are (K, B)."""
        batch = self.make_batch()
        terms = log_terms(self.make_pair(), *batch, num_particles=3)
        assert all(term.shape == (3, len(batch[0])) for term in terms)
        assert terms.log_weights.shape == (3, len(batch[0]))

    def test_nothing_in_the_store(self) -> None:
        """A step of Pyro's own SVI updates the module and leaves the global store as it was."""
        pair, batch = self.make_pair(), self.make_batch()
        before = set(pyro.get_param_store())
        optimizer = pyro.optim.Adam({"lr": 1e-3})
        pyro.infer.SVI(pair.model, pair.guide, optimizer, pyro.infer.Trace_ELBO()).step(*batch)
        assert set(pyro.get_param_store()) == before


def _check_plates(pair: Pair, guide: Trace, model: Trace) -> None:
    dim = particle_dim(pair)
    for trace in (guide, model):
        for name, site in sample_sites(trace).items():
            site_log_prob(site, dim)
            if not isinstance(site["scale"], (int, float)) or site["scale"] != 1:
                raise ValueError(f"site '{name}' is scaled inside the pair: leave scales to training (beta) and Pyro")
    if not any(site["is_observed"] for site in sample_sites(model).values()):
        raise ValueError("the model observes nothing: pass obs=x at the data's site")


def _check_reads_x_only_as_obs(pair: Pair, batch: tuple[Tensor, ...], guide: Trace) -> None:
    """Run the model on other data with the same latents: no distribution may change."""
    x = batch[0]
    # NaN spreads from whatever reads it; integers have none, so they move on by one datum.
    other = torch.full_like(x, torch.nan) if x.is_floating_point() else x.roll(1, 0)
    traces = []
    for data in (x, other):
        with pyro.plate("particles", 1, dim=particle_dim(pair)), pyro.validation_enabled(False):
            model = poutine.uncondition(poutine.replay(type(pair).model, trace=guide))
            torch.manual_seed(0)
            traces.append(sample_sites(poutine.trace(model).get_trace(pair, data, *batch[1:])))
    for name, site in traces[0].items():
        with pyro.validation_enabled(False):
            value = site["infer"]["obs"] if site["infer"].get("was_observed") else site["value"]
            same = torch.equal(site["fn"].log_prob(value), traces[1][name]["fn"].log_prob(value))
        if not same:
            raise ValueError(
                f"the model reads x outside obs=: the distribution at site '{name}' changes with it, so that x is not "
                "generated and log p(x) means nothing; pass what it needs as a condition"
            )


def _couples(pair: Pair, batch: tuple[Tensor, ...], guide: Trace) -> bool:
    """Score the same latents with copies of the first datum in place of the others: its terms may not change."""
    copies = tuple(tensor[:1].expand_as(tensor) for tensor in batch)
    first = []
    for data in (batch, copies):
        with pyro.plate("particles", 1, dim=particle_dim(pair)), pyro.validation_enabled(False):
            first.append(torch.stack([term[..., 0].squeeze() for term in _rescored(pair, data, guide)]))
    # Products over another batch may be summed in another order: a few hundred roundings.
    eps = 1000 * torch.finfo(first[0].dtype).eps
    return not torch.allclose(first[0], first[1], rtol=eps, atol=eps, equal_nan=True)


def _rescored(pair: Pair, batch: tuple[Tensor, ...], guide: Trace) -> list[Tensor]:
    """Return both programs' log-densities, site by site, at the latents of a trace.

    A flow without an inverse scores its own draws only: the guide then draws again, from one seed, so that the first
    datum has the same noise whatever the others are.
    """
    dim = particle_dim(pair)
    for latents in (guide, None):
        torch.manual_seed(0)
        q = poutine.trace(type(pair).guide if latents is None else poutine.replay(type(pair).guide, trace=latents))
        drawn = q.get_trace(pair, *batch)
        try:
            terms = [site_log_prob(site, dim) for site in sample_sites(drawn).values()]
            break
        except (KeyError, NotImplementedError):
            if latents is None:
                raise
    model = poutine.trace(poutine.replay(type(pair).model, trace=drawn)).get_trace(pair, *batch)
    return terms + [site_log_prob(site, dim) for site in sample_sites(model).values()]


def _untrainable(pair: Pair, batch: tuple[Tensor, ...]) -> list[Finding]:
    findings = []
    with rehearsal(pair):
        guide, _ = trace_pair(pair, *batch)
    for name, site in sample_sites(guide).items():
        if site["fn"].has_rsample:
            continue
        distribution = bare(site["fn"])
        if isinstance(distribution, MixtureSameFamily):
            advice = "a mixture has no rsample: make its component a site of model and guide, or use a flow"
        else:
            advice = (
                f"{type(distribution).__name__} has no rsample: train with Trace_ELBO, TraceGraph_ELBO or "
                "TraceEnum_ELBO, or relax it (RelaxedOneHotCategorical)"
            )
        findings.append(Finding("not trainable this way", name, advice))
    return findings


def _without_gradient(pair: Pair, batch: tuple[Tensor, ...]) -> list[Finding]:
    if not any(parameter.requires_grad for parameter in pair.parameters()):
        return []
    flags = {module: module.training for module in pair.modules()}
    kept = {parameter: parameter.grad for parameter in pair.parameters()}
    try:
        pair.eval()
        pair.zero_grad()
        with torch.enable_grad():
            log_terms(pair, *batch).log_weights.sum().backward()
        idle = [n for n, p in pair.named_parameters() if p.requires_grad and p.grad is None]
    finally:
        for module, flag in flags.items():
            module.training = flag
        for parameter, gradient in kept.items():
            parameter.grad = gradient
    return [Finding("not trainable this way", n, "this parameter gets no gradient: use it or remove it") for n in idle]


def _coupled_in_training(pair: Pair, batch: tuple[Tensor, ...]) -> list[Finding]:
    """Look for coupling in training mode: BatchNorm, batch-optimal scales."""
    buffers = {name: value.clone() for name, value in pair.state_dict().items()}
    flags = {module: module.training for module in pair.modules()}
    try:
        pair.train()
        with torch.no_grad():
            guide, _ = trace_pair(pair, *batch)
            coupled = _couples(pair, batch, guide)
    finally:
        pair.load_state_dict(buffers)
        for module, flag in flags.items():
            module.training = flag
    if not coupled:
        return []
    message = (
        "in training mode one datum's terms change with the others of its batch (BatchNorm, a batch-optimal scale): "
        "the training loss is then no bound; trust the evaluation only"
    )
    return [Finding("not trainable this way", "", message)]


def _joint(guide: Trace, model: Trace) -> list[Finding]:
    return [
        Finding(
            "not log p(x)",
            name,
            f"the guide fixes the continuous site '{name}' to a point mass: the bound is on the joint "
            f"log p(x, {name}), which depends on its unit; make it a latent with a density, or discrete",
        )
        for name in sorted(point_masses(guide))
        if not sample_sites(model)[name]["fn"].support.is_discrete
    ]
