"""The contract that every number about a pair relies on, checked on a few data.

A pair's log-densities belong to one datum each: they are the same for a datum alone, beside others, and under an axis
of particles. The model reads ``x`` only where it observes it. Every parameter lives in the module.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pyro
import torch
from torch import Tensor
from torch.distributions import constraints
from torch.nn.parameter import is_lazy

from pyro_vae.inspection.contract.agreement import agree
from pyro_vae.inspection.contract.leaves import check_leaves
from pyro_vae.inspection.contract.numerics import check_numerics
from pyro_vae.inspection.contract.reference import Reference
from pyro_vae.inspection.contract.scores import densities, runs, scores
from pyro_vae.inspection.contract.watch import axis_fault, watched
from pyro_vae.pair.agreement import AUTOMATIC, check_masks, check_measures
from pyro_vae.pair.failures import COARSE, TOO_COARSE, automatic_guide, invalid
from pyro_vae.pair.pair import Pair
from pyro_vae.pair.site import Site
from pyro_vae.pair.trace import PairTrace, run_guide, trace_pair

__all__ = ["check_contract", "check_parameters", "couples_in_training", "probe", "trace_few"]

# Data that the programs are run on.
DATA = 3


def probe(batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return at most three data, from both ends and the middle."""
    count = len(batch[0])
    rows = sorted({0, count // 2, count - 1}) if count > DATA else list(range(count))
    return tuple(torch.stack([tensor.detach()[row] for row in rows]) for tensor in batch)


def trace_few(pair: Pair, batch: tuple[Tensor, ...]) -> PairTrace:
    """Run the guide, and the model at its draws, with one particle.

    Args:
        pair: any pair, in evaluation mode.
        batch: a few data and their conditions, on the pair's device.

    Raises:
        ValueError: for parameters of half precision, other latent sites in guide and model, and programs that fail once
            there is an axis of particles.
    """
    if name := automatic_guide(pair):
        raise ValueError(AUTOMATIC.format(f"{name} is one"))
    _check_precision(pair)
    check_parameters(pair)

    def run() -> PairTrace:
        trace = trace_pair(pair, *batch)
        # Data outside their support are refused by the checks of the data; scoring them may fail in torch's words.
        if all(site.is_supported for site in trace.model.values() if site.is_observed):
            for site in (*trace.guide.values(), *trace.model.values()):
                _ = site.log_prob
        return trace

    try:
        with _tidy_store():
            return run()
    except Exception as failure:
        if not runs(pair, batch, None):
            raise
        raise ValueError(axis_fault(watched(pair, run), failure, (1, len(batch[0])))) from failure


def check_contract(pair: Pair, batch: tuple[Tensor, ...], trace: PairTrace) -> None:
    """Run a pair in several ways on a few data, and refuse it unless its log-densities agree.

    Args:
        pair, batch: as for :func:`trace_few`.
        trace: that function's result.

    Raises:
        ValueError: naming the site, and the module where it can be found, and the way out.
    """
    _check_sites(pair, trace)
    check_measures(trace.guide, trace.model)
    check_masks(trace.guide, trace.model)
    with _tidy_store() as stored:
        check_leaves(pair, batch, stored)
        reference = Reference(pair, batch)
        reference.check_shapes()
        reference.check_masked_latents_are_not_read()
        reference.check_reads_x_only_as_obs()
        # The last one: a flow forgets the draws that the sites hold.
        check_numerics("guide", reference.guide)
        check_numerics("model", reference.model)


def couples_in_training(pair: Pair, batch: tuple[Tensor, ...]) -> bool:
    """Return whether one datum's log-densities in training mode change with the data and latents of others.

    Args:
        pair: any pair, in training mode.
        batch: at least two data and their conditions.
    """
    others = tuple(torch.cat([tensor[:1], tensor[:1].expand_as(tensor[1:])]) for tensor in batch)
    torch.manual_seed(0)
    drawn = {name: site.drawn for name, site in run_guide(pair, *batch, num_particles=1).items()}
    torch.manual_seed(1)
    moved = run_guide(pair, *batch, num_particles=1)
    noise = not scores(moved)
    values = {}
    for name, site in moved.items():
        # The first datum keeps its draw, the others get new ones.
        first = drawn[name].narrow(site.data_dim, 0, 1)
        rest = site.drawn.narrow(site.data_dim, 1, len(batch[0]) - 1)
        values[name] = torch.cat([first, rest], site.data_dim)
    rows = [densities(pair, data, held, 1, noise)[0] for data, held in ((batch, drawn), (others, values))]
    return any(not agree(rows[0][name][..., 0], rows[1][name][..., 0]) for name in rows[0])


def check_parameters(pair: Pair) -> None:
    """Refuse parameters that are NaN or infinite.

    Raises:
        ValueError: naming the first.
    """
    for name, parameter in pair.named_parameters():
        if is_lazy(parameter):
            continue
        value = parameter.detach()
        # One pass without a temporary; a sum of finite numbers may overflow, so the entries decide. A frozen parameter
        # may hold infinities on purpose, e.g. as a mask of attention.
        if not bool(value.sum().isfinite()) and bool((value.isnan() | (value.isinf() & parameter.requires_grad)).any()):
            raise ValueError(
                f"parameter '{name}' has NaN or infinite values: load parameters from before they became so, or make "
                "the pair anew and train it with a smaller lr"
            )


def _check_precision(pair: Pair) -> None:
    for name, parameter in pair.named_parameters():
        if parameter.dtype in COARSE:
            raise ValueError(TOO_COARSE.format(name, parameter.dtype))


@contextmanager
def _tidy_store() -> Iterator[set[str]]:
    """Remove from Pyro's global store all that the block adds to it; yield the names that were there before."""
    stored = set(pyro.get_param_store())
    try:
        yield stored
    finally:
        for name in set(pyro.get_param_store()) - stored:
            pyro.get_param_store().__delitem__(name)


def _check_sites(pair: Pair, trace: PairTrace) -> None:
    for program, sites in (("guide", trace.guide), ("model", trace.model)):
        for name, site in sites.items():
            # Raises for a site outside the data plate.
            log_prob = site.log_prob
            if bool(log_prob.isnan().any()):
                _refuse_nan(pair, f"the {program}'s site '{name}'", site)
            parts = (part for part in vars(site.bare).values() if isinstance(part, Tensor))
            if any(part.dtype in COARSE for part in (log_prob, *parts)):
                raise ValueError(
                    f"the {program}'s site '{site.name}' has parameters in half precision, too coarse for a "
                    "log-density: convert them, e.g. loc.float(), and leave autocast"
                )


def _refuse_nan(pair: Pair, place: str, site: Site) -> None:
    """Raise for a log-density that is NaN before any training: name the distribution's parameter at fault."""
    for parameter, constraint in site.bare.arg_constraints.items():
        # A parameter may be derived from another one on request, at the cost of a decomposition.
        value = vars(site.bare).get(parameter)
        if isinstance(value, Tensor) and not constraints.is_dependent(constraint):
            given = f"{place} was given its parameter '{parameter}'"
            if bool(value.isnan().any()):
                raise ValueError(invalid(pair, given, constraint, is_nan=True))
            if not bool(constraint.check(value).all()):
                raise ValueError(invalid(pair, given, constraint, is_nan=False))
    raise ValueError(f"{place} has a log-density that is NaN: look at its distribution, a {site.family}, at its value")
