"""Sentences for errors that Pyro and torch raise while a pair's programs run."""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch
from pyro.infer.autoguide import AutoGuide
from torch import Tensor

from pyro_vae.pair.pair import Pair

__all__ = ["COARSE", "TOO_COARSE", "automatic_guide", "explained", "invalid", "name_of_condition"]

# Types too coarse for a log-density: bfloat16 has 8 bits, an error of a nat at 256.
COARSE = (torch.float16, torch.bfloat16)
TOO_COARSE = (
    "parameter '{}' is {}, too coarse for a log-density: call pair.float(), and train with "
    'fit(precision="bf16-mixed") for speed'
)
# Pyro's words where a site's batch does not fit its plates.
MISMATCH = re.compile(r"Shape mismatch inside plate\('(.+)'\) at site (\S+) dim (-?\d+), (\d+) vs (\d+)")
# torch's words where a distribution is made of parameters outside their constraint.
PARAMETER = re.compile(
    r"Expected parameter (\w+) .*? of distribution (\w+)\(.*? satisfy the constraint (.+?), but", re.S
)


def explained(pair: Pair, failure: Exception, batch: tuple[Tensor, ...]) -> ValueError | None:
    """Return the error to raise in place of one whose cause can be established, else None.

    Args:
        pair: the pair whose program failed.
        failure: the error.
        batch: the program's arguments.
    """
    if isinstance(failure, TypeError):
        return _other_arguments(pair, batch)
    if found := MISMATCH.search(str(failure)):
        plate, site, dim, size, given = found.groups()
        return ValueError(
            f"site '{site}' has {given} entries in dimension {dim} of its batch, where plate '{plate}' has {size}: a "
            "batch has the dimensions of particles and data alone; make those of one datum part of the event, e.g. "
            "dist.Normal(loc, scale).to_event(1), and leave particles and data apart"
        )
    if found := PARAMETER.search(str(failure)):
        parameter, family, constraint = found.groups()
        given = f"a {family} of the pair was given its parameter '{parameter}'"
        return ValueError(invalid(pair, given, constraint, is_nan="nan" in str(failure)))
    if names := sorted(_sampled_weights(pair)):
        return ValueError(
            f"{names} are drawn by PyroSample, a latent that all data share, and the pair fails to run with it "
            f"({type(failure).__name__}): make them nn.Parameter (a point estimate), or train by Pyro's SVI, since "
            "with shared latents log p of the data is no sum over them"
        )
    return None


def invalid(pair: Pair, given: str, constraint: object, *, is_nan: bool) -> str:
    """Return the sentence on a distribution's parameter that is NaN or breaks its constraint.

    Args:
        pair: the pair.
        given: which distribution was given which parameter.
        constraint: where the parameter must lie.
        is_nan: whether it is NaN.
    """
    if not is_nan:
        return f"{given} outside {constraint}: map the network's outputs there, e.g. by softplus for a positive number"
    broken = next((name for name, p in pair.named_parameters() if not bool(p.detach().isfinite().all())), None)
    if broken is not None:
        return (
            f"{given} as NaN, since the pair's parameter '{broken}' is not finite: load parameters from before it "
            "became so, or train anew with a smaller lr"
        )
    return (
        f"{given} as NaN, though the pair's parameters and the data are finite: look for an operation without a value, "
        "e.g. the logarithm or root of a negative number, or a division by zero"
    )


def automatic_guide(pair: Pair) -> str:
    """Return the name of the AutoGuide among a pair's modules, empty without one."""
    return next((type(module).__name__ for module in pair.modules() if isinstance(module, AutoGuide)), "")


def name_of_condition(pair: Pair, index: int) -> str:
    """Return the name that the model gives its argument ``index``, which counts from x, 0."""
    names = _names(type(pair).model)
    return names[index] if index < len(names) else f"condition {index}"


def _names(program: Any) -> list[str]:
    parameters = list(inspect.signature(program).parameters.values())[1:]
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]


def _other_arguments(pair: Pair, batch: tuple[Tensor, ...]) -> ValueError | None:
    for name in ("model", "guide"):
        program = getattr(type(pair), name)
        try:
            inspect.signature(program).bind(pair, *batch)
        except TypeError:
            return ValueError(
                f"{type(pair).__name__}.{name} takes ({', '.join(_names(program))}) and was given {len(batch)} "
                f"tensor{'s' if len(batch) > 1 else ''}: pass x with its conditions, fit(pair, (x, y)) or "
                "log_likelihood(pair, x, y), no more and no less than both programs take"
            )
    return None


def _sampled_weights(pair: Pair) -> list[str]:
    # PyroModule keeps its priors in this dictionary.
    return [
        f"{prefix}.{name}" if prefix else name
        for prefix, module in pair.named_modules()
        for name in getattr(module, "_pyro_samples", {})
    ]
