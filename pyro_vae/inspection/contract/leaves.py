"""Trainable tensors that a log-weight depends on, in the module or outside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from pyro_vae.pair.pair import Pair
from pyro_vae.pair.trace import trace_pair

__all__ = ["check_leaves", "without_gradient"]


def check_leaves(pair: Pair, batch: tuple[Tensor, ...], stored: set[str]) -> None:
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


def without_gradient(pair: Pair, batch: tuple[Tensor, ...]) -> list[str]:
    """Return the names of trainable parameters that a datum's log-weight does not reach."""
    reached = _leaves(pair, batch)
    return [name for name, p in pair.named_parameters() if p.requires_grad and all(p is not leaf for leaf in reached)]
