"""Test that a pair follows the contract that the package relies on."""

from __future__ import annotations

from typing import Literal, NamedTuple

import pyro
from pyro.distributions import MixtureSameFamily
from torch import Tensor

from pyro_vae.inspection import inspect
from pyro_vae.inspection.arrays import takes_arrays
from pyro_vae.inspection.contract.checks import couples_in_training
from pyro_vae.inspection.contract.leaves import without_gradient
from pyro_vae.pair.modes import drawing, rehearsal
from pyro_vae.pair.pair import Pair
from pyro_vae.pair.trace import PairTrace, log_terms
from pyro_vae.runtime.threads import one_at_a_time

__all__ = ["Finding", "PairContract", "check_pair"]


class Finding(NamedTuple):
    """A finding of :func:`check_pair`: its level, the site or parameter, and the way out."""

    level: Literal["not trainable this way", "not log p(x)"]
    site: str
    message: str


@one_at_a_time
@takes_arrays
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
    if len(batch[0]) < 2:
        raise ValueError(
            "check_pair needs a batch of at least two data, to see whether they stay apart; if a datum is a graph, "
            "pass two graphs on the same nodes"
        )
    inspection = inspect(pair, batch, "batch")
    with drawing(pair, seed=0):
        idle = without_gradient(pair, inspection.batch)
    with rehearsal(pair, seed=0):
        coupled = couples_in_training(pair, inspection.batch)
    return [*_untrainable(inspection.training), *_idle(idle), *_coupled(coupled), *_joint(inspection.trace)]


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


def _idle(names: list[str]) -> list[Finding]:
    return [Finding("not trainable this way", n, "this parameter gets no gradient: use it or remove it") for n in names]


def _coupled(coupled: bool) -> list[Finding]:
    message = (
        "in training mode one datum's terms change with the others of its batch (BatchNorm, a batch-optimal scale): "
        "the training loss is then no bound; trust the evaluation only"
    )
    return [Finding("not trainable this way", "", message)] if coupled else []


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
