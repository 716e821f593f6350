"""A sample site: its distribution, value and log-density, laid out by particle and datum.

Outside ``pyro_vae.pair``, read a :class:`Site` in place of Pyro's site dictionaries.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, TypeVar

import torch
from pyro.distributions import Delta, Independent, MaskedDistribution, Unit, VonMises
from pyro.distributions.torch_distribution import ExpandedDistribution
from pyro.distributions.util import scale_and_mask
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import constraints

__all__ = ["DATA", "PARTICLES", "ExactSite", "Site", "bare", "exact", "is_point_mass", "scored_entries", "sites_of"]

R = TypeVar("R")
# Names of the two plates that a site's value and log-density are laid out by.
PARTICLES, DATA = "particles", "data"
# Exact types: a subclass, e.g. OneHots of Independent, is a family of its own.
WRAPPERS = (torch.distributions.Independent, Independent, ExpandedDistribution, MaskedDistribution)
# The real line, half-lines and intervals, of reals and of integers. Their ends are attributes; an open and a closed end
# of reals differ by no mass.
INTERVALS = tuple(
    map(
        type,
        (
            constraints.real,
            constraints.positive,
            constraints.nonnegative,
            constraints.less_than(0.0),
            constraints.unit_interval,
            constraints.half_open_interval(0.0, 1.0),
            constraints.nonnegative_integer,
            constraints.integer_interval(0, 1),
        ),
    )
)


class Site:
    """One sample site of one run of a program.

    Pyro orders a tensor's batch dimensions by the plates' ``dim``. A site lays its value and its log-density out as
    (K, B, …) instead. The axis K is absent if the program ran without a plate of particles. ``drawn`` is the value in
    Pyro's order.

    Args:
        node: Pyro's dictionary for the site.

    >>> import torch, pyro, pyro.distributions as dist
    >>> def program():
    ...     with pyro.plate("particles", 3, dim=-2), pyro.plate("data", 2):
    ...         pyro.sample("z", dist.Normal(torch.zeros(2, 4), 1.0).to_event(1))
    >>> (z,) = sites_of(pyro.poutine.trace(program).get_trace()).values()
    >>> z.name, z.value.shape, z.log_prob.shape
    ('z', torch.Size([3, 2, 4]), torch.Size([3, 2]))
    """

    def __init__(self, node: dict[str, Any]) -> None:
        self._node = node
        self.name: str = node["name"]
        self.fn: Any = node["fn"]
        self.drawn: Tensor = node["value"]
        self._plates: tuple[str, ...] = tuple(frame.name for frame in node["cond_indep_stack"])
        frames = [frame for frame in node["cond_indep_stack"] if frame.dim is not None]
        self._dims: dict[str, int] = {frame.name: frame.dim for frame in frames}
        self._sizes: dict[str, int] = {frame.name: frame.size for frame in frames}

    def __repr__(self) -> str:
        return f"Site(name={self.name!r}, {self.family}, plates={self.plates}, is_observed={self.is_observed})"

    @property
    def is_observed(self) -> bool:
        """Whether the program observed the site in this run."""
        return bool(self._node["is_observed"])

    @property
    def observation(self) -> Tensor | None:
        """The tensor passed as ``obs=``, also in a run that drew the site; None for a latent site."""
        if self.is_observed:
            return self.drawn
        infer = self._node["infer"]
        return infer.get("obs") if infer.get("was_observed", False) else None

    @property
    def bare(self) -> Any:
        """The distribution inside its wrappers: ``Independent``, expanded, masked."""
        return bare(self.fn)

    @property
    def family(self) -> str:
        """Name of the distribution's class, without wrappers."""
        return type(self.bare).__name__

    @property
    def is_point_mass(self) -> bool:
        """Whether the distribution is a ``Delta``."""
        return is_point_mass(self.fn)

    @property
    def is_discrete(self) -> bool:
        """Whether the distribution is a probability mass."""
        return bool(self.fn.support.is_discrete)

    @property
    def is_factor(self) -> bool:
        """Whether the site is a term of ``pyro.factor``, and no distribution."""
        return isinstance(self.bare, Unit)

    @property
    def is_auxiliary(self) -> bool:
        """Whether one of Pyro's AutoGuides sampled the site for itself."""
        return bool(self._node["infer"].get("is_auxiliary", False))

    @property
    def is_reparameterised(self) -> bool:
        """Whether draws have a gradient (``has_rsample``)."""
        return bool(self.fn.has_rsample)

    @property
    def is_scaled(self) -> bool:
        """Whether a handler inside the program multiplies the log-density (``poutine.scale``)."""
        scale = self._node["scale"]
        return not isinstance(scale, (int, float)) or scale != 1

    @property
    def handler_mask(self) -> Tensor | None:
        """The mask of ``poutine.mask``, broadcastable to the batch; None if every datum is scored."""
        mask = self._node["mask"]
        return None if mask is None or mask is True else torch.as_tensor(mask)

    @property
    def scored(self) -> Tensor | None:
        """True at the entries that masks leave scored, broadcastable to :attr:`drawn`; None without a mask."""
        return scored_entries(self.fn, self.handler_mask)

    @property
    def scored_value(self) -> Tensor | None:
        """:attr:`scored`, laid out and expanded as :attr:`value`; None without a mask."""
        scored = self.scored
        if scored is None:
            return None
        return self.lay_out(scored.expand(torch.broadcast_shapes(scored.shape, self.drawn.shape)))

    @property
    def entry_support(self) -> Any:
        """The support of one entry of the value."""
        support = self.fn.support
        while hasattr(support, "base_constraint"):
            support = support.base_constraint
        return support

    @property
    def is_supported(self) -> bool:
        """Whether the value lies in the distribution's support."""
        return self.is_factor or bool(self.fn.support.check(self.drawn).all())

    @property
    def interval(self) -> tuple[Any, Any] | None:
        """Lower and upper end of :attr:`entry_support`, numbers or tensors; None unless it is an interval."""
        support = self.entry_support
        if isinstance(self.bare, VonMises):
            # torch calls the support real; it is one turn of the circle.
            return -math.pi, math.pi
        if isinstance(support, type(constraints.boolean)):
            return 0, 1
        if not isinstance(support, INTERVALS):
            return None
        return getattr(support, "lower_bound", -math.inf), getattr(support, "upper_bound", math.inf)

    @property
    def plates(self) -> tuple[str, ...]:
        """Names of the plates along the leading axes of :attr:`value`."""
        leading = self._leading()
        ordered = sorted(self._dims, key=lambda name: self._dims[name])
        return (*leading, *(name for name in ordered if name not in leading))

    @cached_property
    def log_prob(self) -> Tensor:
        """Unscaled log-density, masked, summed over all other plates, (K, B), in nats.

        Raises:
            ValueError: for a site outside the data plate, and for a batch dimension that belongs to no plate.
        """
        self._check_data_plate()
        log_prob = scale_and_mask(self._scored_by(self.fn.log_prob), 1.0, self._node["mask"])
        self._check_batch_shape(log_prob.shape)
        others = self._other_dims(log_prob.dim())
        return log_prob.sum(others) if others else log_prob

    def _scored_by(self, score: Callable[[Tensor], R]) -> R:
        """Return a score of the value; name the site if torch's validation finds the value outside the support."""
        try:
            return score(self.drawn)
        except ValueError as error:
            if "within the support" not in str(error):
                raise
            raise ValueError(
                f"site '{self.name}' has values outside the support of its {self.family}, {self.entry_support}: pass "
                "such values, or give the site a distribution of the values it has"
            ) from error

    def check_plates(self) -> None:
        """Refuse a site outside the data plate, and a batch dimension that belongs to no plate.

        Raises:
            ValueError: naming the plates that it lies in, or the way out.
        """
        self._check_data_plate()
        self._check_batch_shape(self.fn.batch_shape)

    def _check_data_plate(self) -> None:
        if DATA in self._dims:
            return
        found = [name for name in self._plates if name != PARTICLES]
        if DATA in found:
            raise ValueError(
                f"site '{self.name}' lies in a loop over plate 'data': write 'with pyro.plate(…)' in place of it, "
                "which runs all data at once"
            )
        if found:
            raise ValueError(
                f"site '{self.name}' lies in the plates {found} and not in the data plate: call the plate of the data "
                "'data', pyro.plate('data', len(x))"
            )
        raise ValueError(
            f"site '{self.name}' lies outside the data plate: sample a latent of each datum inside "
            "pyro.plate('data', len(x)); make a latent that all data share, e.g. weights with a prior, an "
            "nn.Parameter (a point estimate), or train it by Pyro's SVI, since with it log p of the data is no sum "
            "over them"
        )

    @property
    def value(self) -> Tensor:
        """The value, expanded to (K, B, *other plates, *event)."""
        return self.lay_out(self.drawn)

    @property
    def data_dim(self) -> int:
        """Dimension of the data in :attr:`drawn`, negative."""
        return self._dims[DATA] - int(self.fn.event_dim)

    @property
    def particle_dim(self) -> int:
        """Dimension of the particles in :attr:`drawn`, negative."""
        return self._dims[PARTICLES] - int(self.fn.event_dim)

    def lay_out(self, tensor: Tensor, event_dim: int | None = None) -> Tensor:
        """Lay out a tensor in the program's order, e.g. the distribution's mean, as :attr:`value` is.

        Args:
            tensor: (*batch, *event), broadcastable against the site's plates.
            event_dim: number of trailing event dimensions; the distribution's without it.

        Returns:
            (K, B, *other plates, *event).

        Raises:
            ValueError: for a batch dimension that belongs to no plate.
        """
        count = self.fn.event_dim if event_dim is None else event_dim
        batch, event = tensor.shape[: tensor.dim() - count], tensor.shape[tensor.dim() - count :]
        self._check_batch_shape(batch)
        whole = tensor.expand(*self._batch_shape(), *event).squeeze(self._idle_dims(count))
        leading = self._leading_dims(count)
        return whole.movedim(leading, tuple(range(len(leading))))

    def as_drawn(self, value: Tensor) -> Tensor:
        """Put a tensor laid out as :attr:`value` back into the program's order, the inverse of :meth:`lay_out`."""
        leading = self._leading_dims(self.fn.event_dim)
        drawn = value.movedim(tuple(range(len(leading))), leading)
        for dim in sorted(self._idle_dims(self.fn.event_dim), reverse=True):
            drawn = drawn.unsqueeze(dim)
        return drawn

    def broadcast(self, weights: Tensor) -> Tensor:
        """Reshape weights (K, B) to multiply :attr:`drawn`."""
        rest = self.value.dim() - weights.dim()
        return self.as_drawn(weights[(..., *(None,) * rest)])

    def replace(self, *, fn: Any = None, drawn: Tensor | None = None) -> Site:
        """Return the same site with another distribution, or another value in the program's order."""
        changed = {"fn": self.fn if fn is None else fn, "value": self.drawn if drawn is None else drawn}
        return Site({**self._node, **changed})

    def _other_dims(self, count: int) -> list[int]:
        """Return the dimensions among ``count`` batch dimensions that belong to neither particles nor data."""
        leading = {self._dims[name] for name in self._leading()}
        return [dim for dim in range(-count, 0) if dim not in leading]

    def _leading(self) -> tuple[str, ...]:
        return tuple(name for name in (PARTICLES, DATA) if name in self._dims)

    def _leading_dims(self, event_dim: int) -> tuple[int, ...]:
        """Return the dimensions of particles and data after :meth:`_idle_dims` are squeezed."""
        order = sorted(self._dims.values())
        return tuple(order.index(self._dims[name]) - len(order) - event_dim for name in self._leading())

    def _idle_dims(self, event_dim: int) -> tuple[int, ...]:
        """Return the batch dimensions that belong to no plate, all of size one."""
        taken = self._dims.values()
        return tuple(dim - event_dim for dim in range(min(taken, default=0), 0) if dim not in taken)

    def _check_batch_shape(self, shape: torch.Size) -> None:
        for dim in range(-len(shape), 0):
            if shape[dim] != 1 and dim not in self._dims.values():
                raise ValueError(
                    f"site '{self.name}' has {shape[dim]} entries in dimension {dim} of its batch, which belongs to no "
                    "plate: particles and data come left of and in the pair's plates; make that dimension part of the "
                    "event (.to_event), or give it a plate"
                )

    def _batch_shape(self) -> list[int]:
        shape = [1] * -min(self._dims.values(), default=0)
        for name, dim in self._dims.items():
            shape[dim] = self._sizes[name]
        return shape


class ExactSite(Site):
    """A site whose log-density is summed in float64 over the entries that its distribution scores one by one.

    A joint density, e.g. of a multivariate Gaussian, is one entry.

    >>> import torch, pyro, pyro.distributions as dist
    >>> def program():
    ...     with pyro.plate("data", 2):
    ...         pyro.sample("z", dist.Normal(torch.zeros(2, 4), 1.0).to_event(1))
    >>> (z,) = exact(sites_of(pyro.poutine.trace(program).get_trace())).values()
    >>> z.log_prob.dtype, z.num_entries, z.entry_size
    (torch.float64, 4, 1)
    """

    @cached_property
    def _entries(self) -> tuple[Tensor, int]:
        """Log-densities of the entries, masked, in the program's order, and the number of their event dimensions."""
        self._check_data_plate()
        entries, count = self._scored_by(lambda value: _entry_log_probs(self.fn, value))
        return _masked(entries, self._node["mask"], count), count

    @cached_property
    def log_prob(self) -> Tensor:
        """As :attr:`Site.log_prob`, summed in float64."""
        entries, count = self._entries
        batch = entries.shape[: entries.dim() - count]
        self._check_batch_shape(batch)
        summed = [*(dim - count for dim in self._other_dims(len(batch))), *range(-count, 0)]
        return entries.sum(summed, dtype=torch.float64) if summed else entries.double()

    @property
    def entry_dtype(self) -> torch.dtype:
        """The dtype that entries are scored in."""
        return self._entries[0].dtype

    @property
    def num_entries(self) -> int:
        """Entries per particle and datum."""
        return max(1, self._entries[0].numel() // max(1, self.log_prob.numel()))

    @property
    def entry_size(self) -> int:
        """Numbers that one entry scores: 1, or more for a joint density."""
        return max(1, math.prod(self.value.shape[len(self._leading()) :]) // self.num_entries)


def exact(sites: Mapping[str, Site]) -> dict[str, ExactSite]:
    """Return the same sites as :class:`ExactSite`, for evaluation: training sums in the parameters' dtype."""
    return {name: ExactSite(site._node) for name, site in sites.items()}


def sites_of(trace: Trace) -> dict[str, Site]:
    """Return a trace's sample sites by name, in order, without those of ``pyro.deterministic``.

    Raises:
        ValueError: for a plate that subsamples, and a site that is scaled.
    """
    sites = {}
    for name, node in trace.nodes.items():
        if node["type"] != "sample" or node["infer"].get("_deterministic", False):
            continue
        if type(node["fn"]).__name__ == "_Subsample":
            if (node["fn"].subsample_size or node["fn"].size) < node["fn"].size:
                raise ValueError(
                    f"plate '{name}' subsamples: write pyro.plate('{name}', len(x)), the batch's own size; "
                    "training scales by itself, and a scale inside a pair breaks every bound with a logsumexp"
                )
            continue
        site = sites[name] = Site(node)
        if site.is_scaled:
            raise ValueError(
                f"site '{name}' is scaled inside the pair or around the call (poutine.scale): its log-density "
                "is then none; leave the weighting to training (beta) and the number of data to fit"
            )
    return sites


def scored_entries(distribution: Any, mask: Tensor | None = None) -> Tensor | None:
    """Return True at the entries of an event that a distribution's masks leave scored.

    Args:
        distribution: any distribution, with its wrappers.
        mask: one more mask of the batch.

    Returns:
        Broadcastable to (*batch, *event); None without a mask.

    >>> from pyro.distributions import Normal
    >>> scored_entries(Normal(torch.zeros(2, 3), 1.0).mask(torch.tensor([True, False, True])).to_event(1))
    tensor([[ True, False,  True],
            [ True, False,  True]])
    """
    masks = [] if mask is None else [_of_entries(mask, distribution)]
    while type(distribution) in WRAPPERS:
        if isinstance(distribution, MaskedDistribution) and distribution._mask is not True:
            masks.append(_of_entries(torch.as_tensor(distribution._mask), distribution))
        distribution = distribution.base_dist
    scored: Tensor | None = None
    for each in masks:
        scored = each if scored is None else scored & each.to(scored.device)
    return scored


def _of_entries(mask: Tensor, distribution: Any) -> Tensor:
    """Append a distribution's event dimensions to a mask of its batch."""
    return mask[(..., *(None,) * distribution.event_dim)]


def bare(distribution: Any) -> Any:
    """Return the distribution inside its wrappers: ``Independent``, expanded, masked."""
    while type(distribution) in WRAPPERS:
        distribution = distribution.base_dist
    return distribution


def is_point_mass(distribution: Any) -> bool:
    """Return whether a distribution is a ``Delta``, wrapped or not."""
    return isinstance(bare(distribution), Delta)


def _entry_log_probs(distribution: Any, value: Tensor) -> tuple[Tensor, int]:
    """Return log-densities before a wrapper sums them over the event, and how many dimensions it would sum."""
    if type(distribution) not in WRAPPERS or getattr(distribution, "_mask", None) is False:
        return distribution.log_prob(value), 0
    entries, count = _entry_log_probs(distribution.base_dist, value)
    if isinstance(distribution, torch.distributions.Independent):
        return entries, count + distribution.reinterpreted_batch_ndims
    if isinstance(distribution, MaskedDistribution):
        return _masked(entries, distribution._mask, count), count
    batch = torch.broadcast_shapes(distribution.batch_shape, value.shape[: value.dim() - distribution.event_dim])
    return entries.expand(*batch, *entries.shape[entries.dim() - count :]), count


def _masked(entries: Tensor, mask: Any, count: int) -> Tensor:
    """Mask entries with ``count`` event dimensions by a mask of the batch."""
    return scale_and_mask(entries, 1.0, mask[(..., *(None,) * count)] if isinstance(mask, Tensor) else mask)
