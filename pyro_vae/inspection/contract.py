"""The contract that every number about a pair relies on, checked on a few data.

A pair's log-densities belong to one datum each: they are the same for a datum alone, beside others, and under an axis
of particles. The model reads ``x`` only where it observes it. Every parameter lives in the module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Self

import pyro
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_vae.pair.agreement import AUTOMATIC, check_masks, check_measures, check_same_latents
from pyro_vae.pair.failures import COARSE, TOO_COARSE, automatic_guide
from pyro_vae.pair.pair import Pair
from pyro_vae.pair.site import Site
from pyro_vae.pair.trace import PairTrace, run_guide, run_model, site_of_x, trace_pair

__all__ = ["check_contract", "check_parameters", "couples_in_training", "probe", "trace_few", "without_gradient"]

# Particles of the reference run; another number than that of the data, which tells the two axes apart.
PARTICLES = 2
# Data that the programs are run on.
DATA = 3
# Roundings by which one log-density may differ: matmuls over another batch sum in another order.
ROUNDINGS = 1000


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
        if not _runs(pair, batch, None):
            raise
        raise ValueError(_axis_fault(_watched(pair, run), failure, (1, len(batch[0])))) from failure


def check_contract(pair: Pair, batch: tuple[Tensor, ...], trace: PairTrace) -> None:
    """Run a pair in several ways on a few data, and refuse it unless its log-densities agree.

    Args:
        pair, batch: as for :func:`trace_few`.
        trace: that function's result.

    Raises:
        ValueError: naming the site, and the module where it can be found, and the way out.
    """
    _check_sites(trace)
    check_measures(trace.guide, trace.model)
    check_masks(trace.guide, trace.model)
    with _tidy_store() as stored:
        _check_leaves(pair, batch, stored)
        reference = _Reference(pair, batch)
        reference.check_shapes()
        reference.check_masked_latents_are_not_read()
        reference.check_reads_x_only_as_obs()


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
    noise = not _scores(moved)
    values = {}
    for name, site in moved.items():
        # The first datum keeps its draw, the others get new ones.
        first = drawn[name].narrow(site.data_dim, 0, 1)
        rest = site.drawn.narrow(site.data_dim, 1, len(batch[0]) - 1)
        values[name] = torch.cat([first, rest], site.data_dim)
    rows = [_densities(pair, data, held, 1, noise)[0] for data, held in ((batch, drawn), (others, values))]
    return any(not _agree(rows[0][name][..., 0], rows[1][name][..., 0]) for name in rows[0])


def without_gradient(pair: Pair, batch: tuple[Tensor, ...]) -> list[str]:
    """Return the names of trainable parameters that a datum's log-weight does not reach."""
    reached = _leaves(pair, batch)
    return [name for name, p in pair.named_parameters() if p.requires_grad and all(p is not leaf for leaf in reached)]


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


def _axis_fault(watch: _Watch, failure: Exception, shape: tuple[int, int]) -> str:
    place = f"{watch.failed}: " if watch.failed else ""
    return (
        f"the pair runs on (B, …) but fails on (K, B, …) = ({shape[0]}, {shape[1]}, …), the shape of K draws per datum "
        f"({place}{_first_line(failure)}); index and reduce from the right (dim=-1, z[..., 0]), and give layers that "
        "take one batch dimension a flattened batch, as pv.networks.MLP does"
    )


def _first_line(failure: Exception) -> str:
    line = (str(failure).splitlines() or [""])[0]
    return f"{type(failure).__name__}: {line}"


def _runs(pair: Pair, batch: tuple[Tensor, ...], num_particles: int | None) -> bool:
    """Whether both programs run on this batch."""
    try:
        guide = run_guide(pair, *batch, num_particles=num_particles)
        values = {name: site.drawn for name, site in guide.items()}
        model = run_model(pair, *batch, num_particles=num_particles, values=values)
        check_same_latents(guide, model)
        for site in (*guide.values(), *model.values()):
            _ = site.log_prob
    except Exception:
        return False
    return True


def _check_sites(trace: PairTrace) -> None:
    for program, sites in (("guide", trace.guide), ("model", trace.model)):
        for site in sites.values():
            # Raises for a site outside the data plate.
            log_prob = site.log_prob
            parts = (part for part in vars(site.bare).values() if isinstance(part, Tensor))
            if any(part.dtype in COARSE for part in (log_prob, *parts)):
                raise ValueError(
                    f"the {program}'s site '{site.name}' has parameters in half precision, too coarse for a "
                    "log-density: convert them, e.g. loc.float(), and leave autocast"
                )


def _check_leaves(pair: Pair, batch: tuple[Tensor, ...], stored: set[str]) -> None:
    """Refuse trainable tensors outside the module: no optimiser of the package finds them."""
    owned = {id(parameter) for parameter in pair.parameters()}
    foreign = [leaf for leaf in _leaves(pair, batch) if id(leaf) not in owned]
    store = {id(tensor): name for name, tensor in pyro.get_param_store().named_parameters()}
    new = {name for name in set(pyro.get_param_store()) - stored if id(_unconstrained(name)) not in owned}
    if named := sorted(new | {store[id(leaf)] for leaf in foreign if id(leaf) in store}):
        raise ValueError(
            f"{named} live in Pyro's global store: fit would not train them, nor a run folder keep them; store "
            "parameters in the module, as nn.Parameter"
        )
    if foreign:
        places = dict(_hidden(pair))
        names = sorted(places.get(id(leaf), f"a tensor of shape {tuple(leaf.shape)}") for leaf in foreign)
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        raise ValueError(
            f"the log-density depends on trainable tensors that are no parameters of the pair ({shown}): fit would not "
            "train them; make tensors nn.Parameter attributes, lists of networks nn.ModuleList, dictionaries "
            "nn.ModuleDict"
        )


def _unconstrained(name: str) -> Tensor | None:
    return dict(pyro.get_param_store().named_parameters()).get(name)


def _hidden(pair: Pair) -> Iterator[tuple[int, str]]:
    """Yield trainable tensors in plain attributes and containers of the pair's modules, with their paths."""
    for prefix, module in pair.named_modules():
        for attribute, value in vars(module).items():
            if attribute not in ("_parameters", "_buffers", "_modules"):
                yield from _inside(value, f"{prefix}.{attribute}" if prefix else attribute, 3)


def _inside(value: Any, path: str, depth: int) -> Iterator[tuple[int, str]]:
    if isinstance(value, Tensor):
        yield id(value), path
    elif isinstance(value, nn.Module):
        for name, parameter in value.named_parameters():
            yield id(parameter), f"{path}.{name}"
    elif depth and isinstance(value, Mapping):
        for key, item in value.items():
            yield from _inside(item, f"{path}[{key!r}]", depth - 1)
    elif depth and isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from _inside(item, f"{path}[{i}]", depth - 1)


def _leaves(pair: Pair, batch: tuple[Tensor, ...]) -> list[Tensor]:
    """Return the leaves that a log-weight's gradient would reach, by a walk of the graph."""
    torch.manual_seed(0)
    with torch.enable_grad():
        log_weights = trace_pair(pair, *batch).terms.log_weights
    nodes, seen, leaves = [log_weights.grad_fn], set(), []
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        nodes.extend(inner for inner, _ in node.next_functions)
    return leaves


@dataclass(frozen=True)
class _View:
    """A part of the reference run that is run again: some of its data, with or without the axis of particles."""

    rows: tuple[int, ...]
    particles: bool

    def of_value(self, site: Site, value: Tensor) -> Tensor:
        """Return the part of a value in the program's order, whose first dimension is that of the particles."""
        part = value.index_select(site.data_dim, torch.tensor(self.rows, device=value.device))
        return part if self.particles else part[0]

    def of_terms(self, term: Tensor) -> Tensor:
        """Return the part of log-densities (K, B)."""
        part = term[..., list(self.rows)]
        return part if self.particles else part[0]


class _Reference:
    """One run with several particles and data, which runs of other shapes must agree with.

    Args:
        pair: the pair.
        batch: a few data and their conditions.

    Raises:
        ValueError: for a pair that runs with one particle only.
    """

    def __init__(self, pair: Pair, batch: tuple[Tensor, ...]) -> None:
        self.pair, self.batch = pair, batch
        try:
            self._run()
        except Exception as failure:
            if not _runs(pair, batch, 1):
                raise
            raise ValueError(_axis_fault(_watched(pair, self._run), failure, (PARTICLES, len(batch[0])))) from failure

    def _run(self) -> None:
        torch.manual_seed(0)
        guide = run_guide(self.pair, *self.batch, num_particles=PARTICLES)
        self.guide, self.noise = guide, not _scores(guide)
        self.terms, self.model, self.values = self._scored_again(seed=0)

    def _scored_again(self, seed: int) -> tuple[dict[str, Tensor], dict[str, Site], dict[str, Tensor]]:
        drawn = {name: site.drawn for name, site in self.guide.items()}
        return _densities(self.pair, self.batch, drawn, PARTICLES, self.noise, seed)

    def check_shapes(self) -> None:
        """Compare the reference with a run without particles, and with each datum alone."""
        everything = tuple(range(len(self.batch[0])))
        self._compare(_View(everything, particles=False))
        if len(everything) > 1:
            for row in everything:
                self._compare(_View((row,), particles=True))

    def check_masked_latents_are_not_read(self) -> None:
        """Move latents where masks leave them out; what the model scores must stay."""
        masked = {name: site.scored for name, site in self.guide.items() if not site.is_point_mass}
        moved = dict(self.values)
        for name, scored in masked.items():
            if scored is not None:
                # Another particle's draw: a value that the site can take, for any support.
                value, dim = self.values[name], self.guide[name].particle_dim
                moved[name] = torch.where(scored, value, value.roll(1, value.dim() + dim))
        if all(scored is None for scored in masked.values()):
            return
        torch.manual_seed(0)
        sites = run_model(self.pair, *self.batch, num_particles=PARTICLES, values=moved)
        for name, site in self.model.items():
            if not _agree(site.log_prob, sites[name].log_prob):
                raise ValueError(
                    f"site '{name}' reads latents that a mask leaves out: they have no prior there, and log p(x) means "
                    "nothing; mask what reads them too, or read zeros in their place"
                )

    def check_reads_x_only_as_obs(self) -> None:
        """Run the model on other data with the same latents; no distribution may change."""
        # The value of x's site is the same: a site may depend on it, e.g. a label on its image.
        x = site_of_x(self.model, self.batch[0])
        held = {**self.values, x.name: x.drawn}
        for other in _other_data(self.batch[0]):
            try:
                torch.manual_seed(0)
                sites = run_model(
                    self.pair, other, *self.batch[1:], num_particles=PARTICLES, values=held, draw=(x.name,)
                )
                changed = next(
                    (
                        name
                        for name, site in self.model.items()
                        # A factor is a term, not a distribution: there x enters as it does at obs=.
                        if not site.is_factor
                        # A value that is held does not gain the axis of particles.
                        and not _agree(
                            *torch.broadcast_tensors(site.log_prob, sites[name].replace(drawn=_scored(site)).log_prob)
                        )
                    ),
                    None,
                )
            except Exception:
                # The run says nothing about x: the other data are no data, e.g. outside a layer's range.
                continue
            if changed is not None:
                raise ValueError(
                    f"the model reads x outside obs=: the distribution at site '{changed}' changes with it, and log "
                    "p(x) means nothing; pass the part that it needs as a condition"
                )

    def _compare(self, view: _View) -> None:
        batch = tuple(tensor[list(view.rows)] for tensor in self.batch)
        values = {name: view.of_value(site, site.drawn) for name, site in self.guide.items()}
        count = PARTICLES if view.particles else None

        def run() -> dict[str, Tensor]:
            return _densities(self.pair, batch, values, count, self.noise)[0]

        try:
            terms = run()
        except Exception as failure:
            if not _runs(self.pair, self.batch, PARTICLES):
                raise
            raise ValueError(self._fails(view, _watched(self.pair, run), failure)) from failure
        wrong = [name for name, term in terms.items() if not _agree(view.of_terms(self.terms[name]), term)]
        if not wrong:
            return
        random = self._random()
        if any(name.startswith("model") for name in random):
            raise ValueError(
                "the model draws random numbers outside pyro.sample in evaluation mode: its log-densities at given "
                "latents change from run to run; make them a site, or draw them only while self.training"
            )
        # A guide may draw more than its latents: its weights still average to p(x).
        if wrong := [name for name in wrong if name not in random]:
            reference = _watched(self.pair, lambda: self._scored_again(seed=0))
            raise ValueError(self._differs(view, wrong[0], reference.first_difference(_watched(self.pair, run), view)))

    def _fails(self, view: _View, watch: _Watch, failure: Exception) -> str:
        place = f"{watch.failed}: " if watch.failed else ""
        if not view.particles:
            return (
                f"the pair runs with K draws per datum, (K, B, …), but fails without that axis, on (B, …), the shape "
                f"of training ({place}{_first_line(failure)}); count dimensions from the right"
            )
        return (
            f"the pair fails on a single datum ({place}{_first_line(failure)}), the batch that log_likelihood runs; "
            "keep the batch dimension at size one, e.g. squeeze(-1) in place of squeeze()"
        )

    def _differs(self, view: _View, name: str, module: str) -> str:
        place = f", first in module {module}" if module else ""
        if view.particles:
            return (
                f"data are coupled: the log-density of the {name} for one datum changes with the others of its batch, "
                f"or with its row{place}; use LayerNorm or GroupNorm for BatchNorm, reduce from the right (dim=-1), "
                "and use no statistics over the batch"
            )
        return (
            f"the pair means another thing on (B, …), as in training, than on (K, B, …), as in evaluation: at the same "
            f"latents the log-density of the {name} differs{place}; index and reduce from the right (dim=-1, z[..., 0])"
        )

    def _random(self) -> list[str]:
        """Return the sites that score the same latents otherwise from another seed."""
        again, *_ = self._scored_again(seed=1)
        return [name for name, term in again.items() if not _agree(self.terms[name], term)]


def _scored(site: Site) -> Tensor:
    return site.drawn if site.observation is None else site.observation


def _other_data(x: Tensor) -> list[Tensor]:
    """Return data that differ from ``x`` in every entry, as far as its type allows."""
    # NaN spreads from whatever reads it by arithmetic, not through comparisons; moved entries do the reverse.
    moved = x.roll(1, 0)
    moved = moved.reshape(len(x), -1).roll(1, -1).reshape(x.shape)
    return [moved, torch.full_like(x, torch.nan)] if x.is_floating_point() else [moved]


def _agree(a: Tensor, b: Tensor) -> bool:
    """Whether two log-densities agree up to rounding."""
    if a.shape != b.shape:
        return False
    eps = ROUNDINGS * torch.finfo(a.dtype).eps
    return torch.allclose(a, b.to(a.dtype), rtol=eps, atol=eps, equal_nan=True)


def _scores(guide: Mapping[str, Site]) -> bool:
    """Whether the guide's distributions score values that are not their latest draws; a one-way flow does not."""
    try:
        for site in guide.values():
            site.fn.log_prob(site.drawn.clone())
    except (KeyError, NotImplementedError):
        return False
    return True


def _densities(
    pair: Pair,
    batch: tuple[Tensor, ...],
    values: Mapping[str, Tensor],
    num_particles: int | None,
    noise: bool = False,
    seed: int = 0,
) -> tuple[dict[str, Tensor], dict[str, Site], dict[str, Tensor]]:
    """Return both programs' log-densities by name, at given latents, the model's sites, and the latents' values.

    With ``noise``, the guide draws its latents again. All that it draws here comes from noise that is the same for
    every datum and particle.
    """
    torch.manual_seed(seed)
    with _EqualNoise():
        # A guide may draw more than its latents, e.g. corruptions of x: its weights average to p(x) all the same.
        held = None if noise else values
        guide = run_guide(pair, *batch, num_particles=num_particles, values=held)
        terms = {f"guide's site '{name}'": site.log_prob for name, site in guide.items()}
    values = {name: site.drawn for name, site in guide.items()}
    model = run_model(pair, *batch, num_particles=num_particles, values=values)
    terms |= {f"model's site '{name}'": site.log_prob for name, site in model.items()}
    return terms, model, values


class _EqualNoise(TorchDispatchMode):
    """Give draws of normal, uniform and Bernoulli noise the same values for every datum and particle."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.__name__.split(".")[0]
        if name in ("normal", "normal_", "randn", "randn_like"):
            mean, deviation = args[:2] if name == "normal" else (0.0, 1.0)
            return out.copy_(mean + deviation * _pattern(out, -1.0, 1.2))
        if name in ("rand", "rand_like", "uniform_"):
            return out.copy_(_pattern(out, 0.1, 0.9))
        if name == "bernoulli":
            return out.copy_(args[0] > 0.5)
        return out


def _pattern(tensor: Tensor, low: float, high: float) -> Tensor:
    """Return numbers that change along the last dimension only."""
    size = tensor.shape[-1] if tensor.dim() else 1
    return torch.linspace(low, high, size, dtype=tensor.dtype, device=tensor.device)


class _Watch:
    """Record by hooks which modules run, with their inputs and outputs, while a pair runs."""

    def __init__(self, pair: Pair) -> None:
        self.names = {module: name for name, module in pair.named_modules() if module is not pair}
        self.calls: list[tuple[nn.Module, list[Tensor], list[Tensor]]] = []
        self.running: list[nn.Module] = []
        self.handles: list[Any] = []

    def __enter__(self) -> Self:
        for module in self.names:
            self.handles += [
                module.register_forward_pre_hook(self._enter),
                module.register_forward_hook(self._leave),
            ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    @property
    def failed(self) -> str:
        """Name of the innermost module that began and did not end."""
        return self._named(self.running[-1]) if self.running else ""

    def first_difference(self, other: _Watch, view: _View) -> str:
        """Return the first module whose inputs agree with the other run's and whose outputs do not."""
        for (module, inputs, outputs), (same, others, results) in zip(self.calls, other.calls, strict=False):
            if module is not same:
                return ""
            if _all_agree(inputs, others, view) and not _all_agree(outputs, results, view):
                return self._named(module)
        return ""

    def _named(self, module: nn.Module) -> str:
        return f"'{self.names[module]}' ({type(module).__name__})"

    def _enter(self, module: nn.Module, _: Any) -> None:
        self.running.append(module)

    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.running.pop()
        self.calls.append((module, _tensors(inputs), _tensors((output,))))


def _watched(pair: Pair, run: Callable[[], object]) -> _Watch:
    """Run again, to see where it fails or differs."""
    with _Watch(pair) as watch, suppress(Exception):
        run()
    return watch


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    return [value.detach().clone() for value in values if isinstance(value, Tensor)]


def _all_agree(ours: list[Tensor], theirs: list[Tensor], view: _View) -> bool:
    return all(_part_agrees(a, b, view) for a, b in zip(ours, theirs, strict=False))


def _part_agrees(whole: Tensor, part: Tensor, view: _View) -> bool:
    """Whether a module's tensor in a view is the corresponding part of the reference's."""
    rows = list(view.rows)
    if whole.shape == part.shape and whole.dim() and torch.equal(whole, part):
        return True
    # The encoder sees (B, …), the decoder (K, B, …); a layer that flattens its batch is not followed.
    dims = {part.dim(): whole[rows] if whole.dim() and len(whole) > max(rows) else None}
    if whole.dim() >= 2 and len(whole) == PARTICLES and whole.shape[1] > max(rows):
        inner = whole[:, rows]
        dims[inner.dim()] = inner
        if not view.particles:
            dims[inner.dim() - 1] = inner[0]
    expected = dims.get(part.dim())
    return expected is None or (expected.shape == part.shape and _close(expected, part))


def _close(a: Tensor, b: Tensor) -> bool:
    if not a.is_floating_point():
        return torch.equal(a, b)
    return _agree(a, b)
