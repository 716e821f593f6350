"""One sample site of a program: its distribution, its value and its log-density, laid out by particle and datum.

Nothing outside this package reads one of Pyro's site dictionaries; it asks a :class:`Site`.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

from pyro.distributions import Delta
from pyro.distributions.util import scale_and_mask
from pyro.poutine.trace_struct import Trace
from torch import Tensor

__all__ = ["DATA", "PARTICLES", "Site", "bare", "is_point_mass", "sites_of"]

PARTICLES, DATA = "particles", "data"


class Site:
    """One sample site of a program that was run.

    Pyro puts batch dimensions to the left of events, in the order of the plates' ``dim``. A site lays its value and its
    log-density out as (K, B, …) instead. K is absent where the program ran without a plate of particles.

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
        self._plates = [frame for frame in node["cond_indep_stack"] if frame.dim is not None]

    @property
    def is_observed(self) -> bool:
        """Whether the program observed the site in this run."""
        return bool(self._node["is_observed"])

    @property
    def observation(self) -> Tensor | None:
        """The tensor given as ``obs=``, also in a run that drew the site anew; None for a latent site."""
        if self.is_observed:
            return self.drawn
        infer = self._node["infer"]
        return infer.get("obs") if infer.get("was_observed", False) else None

    @property
    def bare(self) -> Any:
        """The distribution inside ``Independent``, expanded and masked wrappers."""
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
    def is_reparameterised(self) -> bool:
        """Whether draws carry a gradient (``has_rsample``)."""
        return bool(self.fn.has_rsample)

    @property
    def is_scaled(self) -> bool:
        """Whether a handler inside the program multiplies the log-density (``poutine.scale``)."""
        scale = self._node["scale"]
        return not isinstance(scale, (int, float)) or scale != 1

    @property
    def entry_support(self) -> Any:
        """The support of one entry of the value, without ``independent`` wrappers."""
        support = self.fn.support
        while hasattr(support, "base_constraint"):
            support = support.base_constraint
        return support

    @property
    def plates(self) -> tuple[str, ...]:
        """Names of the plates along the value's leading axes, in the order of :attr:`value`."""
        own = [frame.name for frame in sorted(self._plates, key=lambda frame: frame.dim) if frame.name not in _LEADING]
        return (*self._leading(), *own)

    @cached_property
    def log_prob(self) -> Tensor:
        """Unscaled log-density (K, B), in nats, masks applied; plates other than particles and data are summed.

        Raises:
            ValueError: for a site outside the data plate, and for batch dimensions that belong to no plate.
        """
        dims = {frame.name: frame.dim for frame in self._plates}
        if DATA not in dims:
            raise ValueError(
                f"site '{self.name}' lies outside the data plate: sample it inside pyro.plate('data', len(x)), so that "
                "its log-density belongs to one datum"
            )
        kept = {dims[name] for name in self._leading()}
        log_prob = scale_and_mask(self.fn.log_prob(self.drawn), 1.0, self._node["mask"])
        others = [dim for dim in range(-log_prob.dim(), 0) if dim not in kept]
        named = set(dims.values())
        if stray := [dim for dim in others if log_prob.shape[dim] != 1 and dim not in named]:
            raise ValueError(
                f"site '{self.name}' has {log_prob.shape[stray[0]]} entries in dimension {stray[0]} of its batch, "
                "which belongs to no plate: particles and data come left of and in the pair's plates; make that "
                "dimension part of the event (.to_event), or give it a plate"
            )
        return log_prob.sum(others) if others else log_prob

    @property
    def value(self) -> Tensor:
        """The value (K, B, plates of the pair's own, *event), expanded where the program's tensor lacks an axis."""
        return self.lay_out(self.drawn)

    @property
    def data_dim(self) -> int:
        """Dimension of the data in the program's order, negative."""
        return next(frame.dim for frame in self._plates if frame.name == DATA) - int(self.fn.event_dim)

    def lay_out(self, tensor: Tensor, event_dim: int | None = None) -> Tensor:
        """Lay a tensor in the program's order, such as the distribution's mean, out as :attr:`value` is.

        Args:
            tensor: (*batch, *event), broadcastable against the site's plates.
            event_dim: how many trailing dimensions are event; those of the distribution without it.

        Returns:
            (K, B, plates of the pair's own, *event).
        """
        count = self.fn.event_dim if event_dim is None else event_dim
        event = tensor.shape[tensor.dim() - count :]
        whole = tensor.expand(*self._batch_shape(), *event).squeeze(self._idle_dims(count))
        leading = self._leading_dims(count)
        return whole.movedim(leading, tuple(range(len(leading))))

    def as_drawn(self, value: Tensor, event_dim: int | None = None) -> Tensor:
        """Put a tensor laid out as :attr:`value` back into the program's order: the inverse of :meth:`lay_out`."""
        count = self.fn.event_dim if event_dim is None else event_dim
        leading = self._leading_dims(count)
        drawn = value.movedim(tuple(range(len(leading))), leading)
        for dim in sorted(self._idle_dims(count), reverse=True):
            drawn = drawn.unsqueeze(dim)
        return drawn

    def broadcast(self, weights: Tensor) -> Tensor:
        """Shape weights (K, B) so that they multiply the program's value."""
        rest = self.value.dim() - weights.dim()
        return self.as_drawn(weights[(..., *(None,) * rest)])

    def replace(self, *, fn: Any = None, drawn: Tensor | None = None) -> Site:
        """Return the same site with another distribution or another value, in the program's order."""
        changed = {"fn": self.fn if fn is None else fn, "value": self.drawn if drawn is None else drawn}
        return Site({**self._node, **changed})

    def _leading(self) -> list[str]:
        found = {frame.name for frame in self._plates}
        return [name for name in _LEADING if name in found]

    def _leading_dims(self, event_dim: int) -> tuple[int, ...]:
        """Return the dimensions of particles and data once those without a plate are squeezed out."""
        order = sorted(frame.dim for frame in self._plates)
        dims = {frame.name: order.index(frame.dim) - len(order) - event_dim for frame in self._plates}
        return tuple(dims[name] for name in self._leading())

    def _idle_dims(self, event_dim: int) -> tuple[int, ...]:
        """Return the batch dimensions, of size one, that no plate of this site takes."""
        taken = {frame.dim for frame in self._plates}
        return tuple(dim - event_dim for dim in range(min(taken, default=0), 0) if dim not in taken)

    def _batch_shape(self) -> list[int]:
        shape = [1] * max((-frame.dim for frame in self._plates), default=0)
        for frame in self._plates:
            shape[frame.dim] = frame.size
        return shape


_LEADING = (PARTICLES, DATA)


def sites_of(trace: Trace) -> dict[str, Site]:
    """Return a trace's sample sites by name, in order, without ``pyro.deterministic`` ones.

    Raises:
        ValueError: for a plate that subsamples.
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
        sites[name] = Site(node)
    return sites


def bare(distribution: Any) -> Any:
    """Return the distribution inside ``Independent``, expanded and masked wrappers."""
    while hasattr(distribution, "base_dist") and type(distribution).__name__ in (
        "Independent",
        "MaskedDistribution",
        "ExpandedDistribution",
    ):
        distribution = distribution.base_dist
    return distribution


def is_point_mass(distribution: Any) -> bool:
    """Tell whether a distribution is a ``Delta``, wrapped or not."""
    return isinstance(bare(distribution), Delta)
