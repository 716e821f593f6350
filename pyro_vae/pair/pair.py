"""A model and a guide over the same latent sites: the idea that the package is built on."""

from __future__ import annotations

import abc
import inspect
import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from pyro.poutine.runtime import am_i_wrapped, effectful
from torch import nn
from torch.distributions import constraints

__all__ = ["Pair", "Program", "programs_after"]


class Pair(nn.Module, abc.ABC):
    """Hold a model p(x, z | …) and a guide q(z | x, …) over the same latent sites.

    Write two Pyro programs, and store every parameter in the module. The rules are:

    * Both programs sample inside ``pyro.plate("data", len(x))``.
    * ``x`` enters the model only through ``obs=x``.
    * The guide samples every latent site of the model and no other.

    ``max_plate_nesting`` counts the pair's plates; particles take the next dimension to the left. ``x_shape`` is the
    shape of one datum. ``x_dtype`` is its dtype if the parameters have another one, e.g. for token indices.

    >>> import torch, pyro, pyro.distributions as dist, pyro_vae as pv
    >>> class Coin(Pair):
    ...     x_shape = ()
    ...     def model(self, x):
    ...         with pyro.plate("data", len(x)):
    ...             z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...             pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    ...     def guide(self, x):
    ...         with pyro.plate("data", len(x)):
    ...             pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
    >>> pv.log_terms(Coin(), torch.zeros(3), num_particles=2).log_weights.shape
    torch.Size([2, 3])
    """

    max_plate_nesting: ClassVar[int] = 1
    x_dtype: ClassVar[torch.dtype | None] = None
    x_shape: tuple[int, ...]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in ("model", "guide"):
            # Looked up, not only defined here: a program may come from a mixin that is no pair.
            method = inspect.getattr_static(cls, name)
            if not isinstance(method, _AsProgram) and not getattr(method, "__isabstractmethod__", False):
                setattr(cls, name, _AsProgram(method))

    # Arguments are left open: a subclass names its conditions. Every function passes x first.
    @abc.abstractmethod
    def model(self, *args: Any, **kwargs: Any) -> Any:
        """Sample every site of p(x, z | …), with ``obs=x`` at the observed one: ``model(self, x, *conditions)``."""

    @abc.abstractmethod
    def guide(self, *args: Any, **kwargs: Any) -> Any:
        """Sample every latent site of the model from q(z | x, …): ``guide(self, x, *conditions)``."""


class Program(nn.Module):
    """Wrap one of a pair's two Pyro programs as a module that owns the pair.

    Under an effect handler, each parameter is announced as a param site. Pyro's tools then find it without its global
    store, and two pairs of one class share nothing.

    Tools that look parameters up in the store cannot see them: ``JitTrace_ELBO``, ``PyroOptim.get_state``, optimiser
    arguments per parameter, ``render_model(render_params=True)``.
    """

    def __init__(self, pair: Pair, method: Callable[..., Any]) -> None:
        super().__init__()
        self.pair = pair
        self.training = pair.training
        self._method = method

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if am_i_wrapped():
            # The id keeps the parameters of two pairs of one class apart inside one traced program.
            prefix = f"{type(self.pair).__name__}@{id(self.pair):x}"
            for name, parameter in self.pair.named_parameters():
                _announce(f"{prefix}.{name}", parameter)
        return self._method(self.pair, *args, **kwargs)


class _AsProgram:
    """Turn ``pair.model`` into a :class:`Program`, and leave ``Class.model`` the plain function."""

    def __init__(self, method: Callable[..., Any]) -> None:
        self.method = method
        self.__doc__ = method.__doc__

    def __get__(self, pair: Pair | None, owner: type | None = None) -> Any:
        return self.method if pair is None else Program(pair, self.method)


def _announce(name: str, parameter: nn.Parameter) -> None:
    alias = parameter.detach()
    # SVI.step asks a param site's value for the leaf it should update.
    alias.unconstrained = weakref.ref(parameter)  # type: ignore[attr-defined]
    effectful(lambda *_, **__: alias, type="param")(name, alias, constraint=constraints.real, name=name)


def programs_after(pair: Pair, method: str) -> list[str]:
    """Return the programs of a pair that are defined nearer to it than a method that knows them by heart.

    Such a method, e.g. a loss in closed form, belongs to the programs of the class that it was inherited from.
    """
    return [name for name in ("model", "guide") if _distance(pair, name) < _distance(pair, method)]


def _distance(pair: Pair, name: str) -> int:
    """Return how many classes lie between a pair and the definition of an attribute; -1 for one of its instance."""
    if name in vars(pair):
        return -1
    return next(i for i, cls in enumerate(type(pair).__mro__) if name in vars(cls))
