"""Facts about a pair, from one run of its programs on a few data."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.utils._pytree import tree_leaves

from pyro_vae.inspection.contract.checks import check_contract, probe, trace_few
from pyro_vae.inspection.data import check_batch, check_conditions, refuse_outside
from pyro_vae.pair.modes import drawing, evaluation, rehearsal, to_pair
from pyro_vae.pair.pair import Pair
from pyro_vae.pair.site import Site
from pyro_vae.pair.trace import PairTrace, trace_pair

__all__ = ["Inspection", "inspect"]


@dataclass(frozen=True)
class Inspection:
    """Facts about a pair that training, evaluation and reports need.

    Inspect once per public call, and hand the result down.

    Args:
        pair: the pair.
        batch: at most three rows of the data and conditions, on the pair's device.
        trace: guide and model on this batch, in evaluation mode, one particle.
        networks: the pair's outermost modules that hold parameters and return tensors.
    """

    pair: Pair
    batch: tuple[Tensor, ...]
    trace: PairTrace
    networks: tuple[nn.Module, ...]

    @property
    def x(self) -> Site:
        """The site that observes ``x``."""
        return self.trace.x

    @property
    def is_discrete(self) -> bool:
        """Whether every observed site is a probability mass."""
        return all(site.is_discrete for site in self.trace.model.values() if site.is_observed and not site.is_factor)

    @property
    def quantity(self) -> str:
        """Name of the quantity that the guide's log-weights estimate.

        * "log p(x)", whatever the name of the site that observes x, for a guide without point masses;
        * "log p(x, y)", a joint density, for a point mass on a continuous site ``y``, and for another observed ``y``;
        * "lower bound on …" for a point mass on a discrete site;
        * "… with the factor 'f'", which is no density, for a model with ``pyro.factor``.
        """
        target = self._log_p(self._fixed_continuous)
        return target if len(self._fixed_continuous) == len(self.trace.point_masses) else f"lower bound on {target}"

    @property
    def prior_quantity(self) -> str:
        """Name of the quantity that draws from the prior estimate, :attr:`quantity` without point masses."""
        return self._log_p([])

    @property
    def beside(self) -> str:
        """A clause on the sites that :attr:`quantity` concerns beside x; empty for log p(x) or a bound on it."""
        fixed = [f"the guide fixes the continuous site '{name}' to a point mass" for name in self._fixed_continuous]
        return ", and ".join([*self._beside_in_the_model, *fixed])

    @property
    def prior_beside(self) -> str:
        """The clause for :attr:`prior_quantity`."""
        return ", and ".join(self._beside_in_the_model)

    @cached_property
    def training(self) -> PairTrace:
        """Guide and model in training mode, one particle; a pair may e.g. relax discrete draws there."""
        with rehearsal(self.pair, seed=0):
            return trace_pair(self.pair, *self.batch)

    def check(self, batch: tuple[Tensor, ...], argument: str, seen: Tensor | None = None) -> None:
        """Refuse more data, e.g. for validation, as :func:`inspect` does.

        Args:
            batch: data and conditions.
            argument: the argument's name, for messages.
            seen: True at the entries of ``x`` to check; all of them without it.

        Raises:
            ValueError: naming the argument, the fault and the way out.
        """
        check_batch(self.pair, batch, argument)
        refuse_outside(self.x, batch[0], argument, seen)
        check_conditions(self.pair, self.trace.model, self.batch, batch)

    @property
    def _fixed_continuous(self) -> list[str]:
        fixed = self.trace.point_masses
        return [name for name, site in self.trace.model.items() if name in fixed and not site.is_discrete]

    @property
    def _others(self) -> list[Site]:
        """The observed sites beside that of x, factors included."""
        return [site for name, site in self.trace.model.items() if site.is_observed and name != self.x.name]

    @property
    def _beside_in_the_model(self) -> list[str]:
        return [
            f"the model has a factor '{site.name}', and no density"
            if site.is_factor
            else f"the model observes '{site.name}' too"
            for site in self._others
        ]

    def _log_p(self, joint: list[str]) -> str:
        names = [*(site.name for site in self._others if not site.is_factor), *joint]
        # The data are x whatever their site is called, unless another site has the name.
        name = f"log p({', '.join([self.x.name if 'x' in names else 'x', *names])})"
        factors = [f"the factor '{site.name}'" for site in self._others if site.is_factor]
        return f"{name} with {' and '.join(factors)}" if factors else name


def inspect(pair: Pair, batch: tuple[Tensor, ...], argument: str = "x", seen: Tensor | None = None) -> Inspection:
    """Check data against a pair, and the pair against its contract on a few of them, and return facts about it.

    On a few data, a datum's log-densities must be the same alone, beside others and under an axis of particles. The
    model must read ``x`` only where it observes it. All that is trainable must be a parameter of the pair. The pair and
    the caller's random state are left unchanged.

    Args:
        pair: any pair.
        batch: ``x`` (N, …) and the pair's conditions.
        argument: the data's argument, for messages.
        seen: True at the entries of ``x`` to check; all of them without it.

    Returns:
        :class:`Inspection`.

    Raises:
        ValueError: for data that the pair cannot take or outside the likelihood's support; for a guide with other
            sites, or another kind of density, than the model's; for a pair that breaks its contract, with the site, the
            module where it can be found, and the way out.

    >>> import torch, pyro_vae as pv
    >>> inspect(pv.models.LinearGaussianVAE(5, 2), (torch.zeros(3, 5),)).quantity
    'log p(x)'
    """
    check_batch(pair, batch, argument)
    few = to_pair(pair, probe(batch))
    if any(isinstance(parameter, UninitializedParameter) for parameter in pair.parameters()):
        # Lazy layers draw their parameters now, as others do when they are made: from the caller's random state.
        with evaluation(pair), torch.inference_mode(False), torch.no_grad():
            trace_pair(pair, *few)
    finder = _NetworkFinder(pair)
    with drawing(pair, seed=0):
        with finder:
            trace = trace_few(pair, few)
        refuse_outside(trace.x, batch[0], argument, seen)
        check_conditions(pair, trace.model, few, batch)
        check_contract(pair, few, trace)
    return Inspection(pair, few, trace, finder.networks())


class _NetworkFinder:
    """Record by hooks which modules call which while a pair runs.

    Neither the pair nor a module that returns a distribution is a network.
    """

    def __init__(self, pair: Pair) -> None:
        self.modules = [module for module in pair.modules() if module is not pair]
        self.others = {module for module in self.modules if not any(True for _ in module.parameters())}
        self.calls: dict[nn.Module, list[tuple[nn.Module, ...]]] = {}
        self.running: list[nn.Module] = []
        self.handles: list[Any] = []

    def __enter__(self) -> None:
        for module in self.modules:
            self.handles += [
                module.register_forward_pre_hook(self._enter),
                module.register_forward_hook(self._leave),
            ]

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def networks(self) -> tuple[nn.Module, ...]:
        """Return the outermost modules that hold parameters and return tensors."""
        return tuple(
            module
            for module, outer in self.calls.items()
            if module not in self.others and any(set(above) <= self.others for above in outer)
        )

    def _enter(self, module: nn.Module, _: Any) -> None:
        self.calls.setdefault(module, []).append(tuple(self.running))
        self.running.append(module)

    def _leave(self, module: nn.Module, _: Any, output: Any) -> None:
        self.running.pop()
        if not all(isinstance(leaf, Tensor) for leaf in tree_leaves(output)):
            self.others.add(module)
