"""The one idea: a model and a guide over the same latent sites, and their log-densities per particle and datum."""

from __future__ import annotations

import abc
import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.distributions import Delta
from pyro.distributions.util import scale_and_mask
from pyro.poutine.runtime import am_i_wrapped, effectful
from pyro.poutine.trace_struct import Trace
from torch import Tensor, nn
from torch.distributions import constraints

__all__ = ["LogTerms", "Pair", "SiteTerms", "log_terms", "site_terms"]


class Pair(nn.Module, abc.ABC):
    """Hold a model p(x, z | …) and a guide q(z | x, …) over the same latent sites.

    A subclass writes two Pyro programs and keeps every parameter in the module. Both sample inside
    ``pyro.plate("data", len(x))``, the batch's own size; ``x`` enters the model only through ``obs=``, and the guide
    samples every latent site of the model and no other.

    ``max_plate_nesting`` counts the pair's own plates; particles take the next dimension to the left. ``x_shape`` is
    the shape of one datum, ``x_dtype`` its type where that is not the parameters' own (token indices, say).

    >>> import torch, pyro, pyro.distributions as dist
    >>> class Coin(Pair):
    ...     x_shape = ()
    ...     def model(self, x):
    ...         with pyro.plate("data", len(x)):
    ...             z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...             pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    ...     def guide(self, x):
    ...         with pyro.plate("data", len(x)):
    ...             pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
    >>> log_terms(Coin(), torch.zeros(3), num_particles=2).log_weights.shape
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

    # Arguments are left open so that a subclass may name its own conditions; every function passes x first.
    @abc.abstractmethod
    def model(self, *args: Any, **kwargs: Any) -> Any:
        """Sample every site of p(x, z | …), with ``obs=x`` at the observed one: ``model(self, x, *conditions)``."""

    @abc.abstractmethod
    def guide(self, *args: Any, **kwargs: Any) -> Any:
        """Sample every latent site of the model from q(z | x, …): ``guide(self, x, *conditions)``."""


class Program(nn.Module):
    """One of a pair's two Pyro programs as a module that owns the pair.

    Pyro's own tools then find the parameters: under an effect handler each is announced as a param site that the
    handler sees and Pyro's global store does not, so that two pairs of one class never share anything.

    What looks parameters up in the store cannot see them: ``JitTrace_ELBO``, ``PyroOptim.get_state``, optimiser
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


class SiteTerms(NamedTuple):
    """One site's log-densities, each ``(K, B)``, in nats; ``log_guide`` is zero at an observed site."""

    log_model: Tensor
    log_guide: Tensor


class _Sums(NamedTuple):
    log_lik: Tensor
    log_prior: Tensor
    log_guide: Tensor


class LogTerms(_Sums):
    """Log-densities per particle and datum, a tuple of three, each ``(K, B)``, in nats.

    ``log_lik`` sums the data terms: the observed sites, and the latent sites that the guide fixes to a point mass.
    ``log_prior`` sums the model's other latent sites, ``log_guide`` the guide's sites. The attribute ``latents`` has
    those other latent sites one by one, for objectives that treat them apart; it is no part of the tuple.
    """

    latents: Mapping[str, SiteTerms]

    def __new__(
        cls, log_lik: Tensor, log_prior: Tensor, log_guide: Tensor, latents: Mapping[str, SiteTerms] | None = None
    ) -> LogTerms:
        terms = super().__new__(cls, log_lik, log_prior, log_guide)
        terms.latents = {} if latents is None else latents
        return terms

    @property
    def log_weights(self) -> Tensor:
        """log p(x, z) − log q(z | x), ``(K, B)``."""
        return self.log_lik + self.log_prior - self.log_guide


def log_terms(pair: Pair, *batch: Tensor, num_particles: int = 1) -> LogTerms:
    """Run the guide and the replayed model once and sum their unscaled site log-densities.

    log w_kb = log p(x_b, z_kb) − log q(z_kb | x_b),   z_kb ~ q(z | x_b)

    Args:
        pair: any pair.
        batch: ``x`` (B, …) and the pair's conditions, each with B rows.
        num_particles: K, draws per datum.

    Returns:
        :class:`LogTerms`, each field (K, B), in nats.

    Raises:
        ValueError: for sites that model and guide do not share, sites outside the data plate, subsampling plates.
    """
    guide, model = trace_pair(pair, *batch, num_particles=num_particles)
    return sum_terms(guide, model, particle_dim(pair))


def site_terms(pair: Pair, *batch: Tensor, num_particles: int = 1) -> dict[str, SiteTerms]:
    """Run the guide and the replayed model once and return each site's log-densities by name.

    Args:
        pair: any pair.
        batch: ``x`` (B, …) and the pair's conditions.
        num_particles: K, draws per datum.

    Returns:
        For each site of the model, in its order, :class:`SiteTerms` of shape (K, B), in nats.

    Raises:
        ValueError: as :func:`log_terms`.
    """
    guide, model = trace_pair(pair, *batch, num_particles=num_particles)
    dim = particle_dim(pair)
    terms = {}
    for name, site in sample_sites(model).items():
        log_model = site_log_prob(site, dim)
        log_guide = torch.zeros_like(log_model) if site["is_observed"] else site_log_prob(guide.nodes[name], dim)
        terms[name] = SiteTerms(log_model, log_guide)
    return terms


def trace_pair(pair: Pair, *batch: Tensor, num_particles: int = 1) -> tuple[Trace, Trace]:
    """Return the guide's trace and the model's, replayed against it, both under a plate of K particles."""
    if num_particles < 1:
        raise ValueError(f"num_particles is {num_particles}; it counts draws per datum and must be at least 1")
    with particle_plate(pair, num_particles):
        guide = poutine.trace(type(pair).guide).get_trace(pair, *batch)
        model = poutine.trace(poutine.replay(type(pair).model, trace=guide)).get_trace(pair, *batch)
    check_same_latents(guide, model)
    return guide, model


def particle_plate(pair: Pair, num_particles: int) -> pyro.plate:
    """Return the plate of particles, to the left of the pair's own plates."""
    return pyro.plate("particles", num_particles, dim=particle_dim(pair))


def particle_dim(pair: Pair) -> int:
    """Return the batch dimension of the particles, to the left of the pair's own plates."""
    return -1 - pair.max_plate_nesting


def device_of(pair: Pair) -> torch.device:
    """Return the device of the pair's parameters or buffers, the CPU where there are none."""
    return next((t.device for t in (*pair.parameters(), *pair.buffers())), torch.device("cpu"))


def to_pair(pair: Pair, batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return a batch on the pair's device."""
    device = device_of(pair)
    return tuple(tensor.to(device) for tensor in batch)


@contextmanager
def evaluation(pair: Pair) -> Iterator[None]:
    """Run a pair in evaluation mode, without gradients or validation; its training flags come back afterwards."""
    flags = {module: module.training for module in pair.modules()}
    pair.eval()
    try:
        with torch.inference_mode(), pyro.validation_enabled(False):
            yield
    finally:
        for module, flag in flags.items():
            module.training = flag


@contextmanager
def rehearsal(pair: Pair) -> Iterator[None]:
    """Run a pair in training mode, without gradients or validation; its flags and buffers come back afterwards.

    What a pair does while training may differ from what is evaluated: a relaxation of discrete draws, say.
    """
    flags = {module: module.training for module in pair.modules()}
    places = [module._buffers for module in pair.modules()]
    # Copies, since a layer may change a buffer in place, and the tensors themselves, since it may assign another.
    kept = [[(name, b, b.clone()) for name, b in held.items() if b is not None] for held in places]
    pair.train()
    try:
        with torch.inference_mode(False), torch.no_grad(), pyro.validation_enabled(False):
            yield
    finally:
        for module, flag in flags.items():
            module.training = flag
        for held, buffers in zip(places, kept, strict=True):
            held.update({name: buffer.copy_(copy) for name, buffer, copy in buffers})


def sum_terms(guide: Trace, model: Trace, particle_dim: int) -> LogTerms:
    """Sum two traces' site log-densities into :class:`LogTerms`, each (K, B)."""
    fixed = point_masses(guide)
    log_lik: Any = 0.0
    log_prior: Any = 0.0
    log_guide: Any = 0.0
    guided = {name: site_log_prob(site, particle_dim) for name, site in sample_sites(guide).items()}
    latents = {}
    for name, site in sample_sites(model).items():
        term = site_log_prob(site, particle_dim)
        if site["is_observed"] or name in fixed:
            log_lik = log_lik + term
        else:
            log_prior = log_prior + term
            latents[name] = SiteTerms(term, guided[name])
    for term in guided.values():
        log_guide = log_guide + term
    zero = torch.zeros_like(log_lik + log_prior)
    return LogTerms(zero + log_lik, zero + log_prior, zero + log_guide, latents)


def sample_sites(trace: Trace) -> dict[str, Any]:
    """Return a trace's sample sites by name, in order, without ``pyro.deterministic`` ones."""
    sites = {}
    for name, site in trace.nodes.items():
        if site["type"] != "sample" or site["infer"].get("_deterministic", False):
            continue
        if type(site["fn"]).__name__ == "_Subsample":
            if (site["fn"].subsample_size or site["fn"].size) < site["fn"].size:
                raise ValueError(
                    f"plate '{name}' subsamples: write pyro.plate('{name}', len(x)), the batch's own size; "
                    "training scales by itself, and a scale inside a pair breaks every bound with a logsumexp"
                )
            continue
        sites[name] = site
    return sites


def site_log_prob(site: Any, particle_dim: int) -> Tensor:
    """Return a site's unscaled log-density summed to (K, B): plates other than particles and data are summed."""
    plates = {frame.name: frame for frame in site["cond_indep_stack"]}
    if "data" not in plates:
        raise ValueError(
            f"site '{site['name']}' lies outside the data plate: sample it inside pyro.plate('data', len(x)), so that "
            "its log-density belongs to one datum"
        )
    data_dim = plates["data"].dim
    log_prob = scale_and_mask(site["fn"].log_prob(site["value"]), 1.0, site["mask"])
    others = [dim for dim in range(-log_prob.dim(), 0) if dim not in (data_dim, particle_dim)]
    named = {frame.dim for frame in plates.values()}
    if stray := [dim for dim in others if log_prob.shape[dim] != 1 and dim not in named]:
        raise ValueError(
            f"site '{site['name']}' has {log_prob.shape[stray[0]]} entries in dimension {stray[0]} of its batch, which "
            "belongs to no plate: particles and data come left of and in the pair's plates; make that dimension part "
            "of the event (.to_event), or give it a plate"
        )
    return log_prob.sum(others) if others else log_prob


def point_masses(guide: Trace) -> set[str]:
    """Return the names of the sites that a guide's trace fixes to a point mass."""
    return {name for name, site in sample_sites(guide).items() if isinstance(bare(site["fn"]), Delta)}


def x_site(sites: dict[str, Any], x: Tensor) -> Any:
    """Return the site that observes x, also where ``uncondition`` has freed it.

    Raises:
        ValueError: when several sites observe something and none of them x itself.
    """
    observed = [site for site in sites.values() if site["is_observed"] or site["infer"].get("was_observed", False)]
    exact = [site for site in observed if site["value"] is x or site["infer"].get("obs") is x]
    if len(exact or observed) != 1:
        names = [site["name"] for site in observed]
        raise ValueError(f"the model observes {names}: exactly one site must observe x itself, as obs=x")
    return (exact or observed)[0]


def check_measures(guide: Trace, model: Trace) -> None:
    """Refuse a guide whose density at a site is of another kind than the model's: their ratio would mean nothing.

    Raises:
        ValueError: for a continuous guide at a discrete site and the reverse, and for a point mass outside the
            support of the model's site.
    """
    for name, site in sample_sites(guide).items():
        other = sample_sites(model)[name]["fn"]
        if isinstance(bare(site["fn"]), Delta):
            if not bool(other.support.check(site["value"]).all()):
                raise ValueError(
                    f"the guide's point mass at '{name}' lies outside the model's support, {other.support}"
                )
        elif site["fn"].support.is_discrete != other.support.is_discrete:
            raise ValueError(
                f"site '{name}' is {'discrete' if other.support.is_discrete else 'continuous'} in the model but not in "
                "the guide: a mass over a density is no weight; give both the same kind of distribution"
            )


def bare(distribution: Any) -> Any:
    """Return the distribution inside ``Independent``, expanded and masked wrappers."""
    while hasattr(distribution, "base_dist") and type(distribution).__name__ in (
        "Independent",
        "MaskedDistribution",
        "ExpandedDistribution",
    ):
        distribution = distribution.base_dist
    return distribution


def check_same_latents(guide: Trace, model: Trace) -> None:
    """Refuse a guide that samples other sites than the model's latent ones.

    Raises:
        ValueError: naming the sites that one of them lacks.
    """
    latents = {name for name, site in sample_sites(model).items() if not site["is_observed"]}
    guided = set(sample_sites(guide))
    if missing := sorted(latents - guided):
        raise ValueError(
            f"the model samples {missing}, the guide does not: it would be drawn from the prior and never paid for; "
            "sample it in the guide too"
        )
    if extra := sorted(guided - latents):
        raise ValueError(f"the guide samples {extra}, which is no latent site of the model; rename or remove it")
