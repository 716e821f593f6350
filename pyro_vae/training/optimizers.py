"""Optimiser, scheduler and loss as a user gives them: made, checked, and described for a resumed run."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pyro
import torch
from torch import nn

from pyro_vae.pair.pair import Pair

__all__ = [
    "MakeOptimizer",
    "MakeScheduler",
    "check_moves_all",
    "described",
    "described_schedule",
    "make_optimizer",
    "make_schedule",
    "rate_of",
]

MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
MakeScheduler = Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]
# Learning rate of the default optimiser.
RATE = 1e-3
# Attributes of an ELBO that decide which loss it is.
NUMBERS_OF_A_LOSS = ("alpha", "beta", "gamma", "data_size", "num_particles", "self_links")


def make_optimizer(
    make: MakeOptimizer | None, parameters: list[nn.Parameter], lr: float | None
) -> torch.optim.Optimizer:
    """Return an optimiser of all parameters: fused Adam, or the one that ``make`` makes.

    Raises:
        ValueError: for anything that makes no torch optimiser, and an ``lr`` that would not be used.
    """
    if make is None:
        # Fused: one pass over parameters and moments instead of a dozen.
        return torch.optim.Adam(parameters, lr=RATE if lr is None else lr, fused=True)
    if isinstance(make, pyro.optim.PyroOptim) or not callable(make):
        is_pyros = isinstance(make, pyro.optim.PyroOptim)
        name = f"Pyro's {make.pt_optim_constructor.__name__}" if is_pyros else type(make).__name__
        raise ValueError(
            f"optimizer is {name}; it must be a function that makes one from the pair's "
            "parameters: lambda parameters: torch.optim.Adam(parameters, lr=1e-3)"
        )
    if lr is None:
        update = make(parameters)
    elif isinstance(make, type) and issubclass(make, torch.optim.Optimizer):
        update = make(parameters, lr=lr)  # type: ignore[call-arg]
    else:
        raise ValueError(
            f"lr is {lr}, and optimizer is a function, which sets the learning rate itself: leave lr out, and set it "
            f"there: lambda parameters: torch.optim.Adam(parameters, lr={lr})"
        )
    if not isinstance(update, torch.optim.Optimizer):
        raise ValueError(
            f"optimizer gives {type(update).__name__}; it must make a torch optimiser from the pair's parameters: "
            "lambda parameters: torch.optim.Adam(parameters, lr=1e-3)"
        )
    if isinstance(update, torch.optim.LBFGS):
        raise ValueError("LBFGS evaluates its loss several times a step, on new draws each time: use another optimiser")
    return update


def check_moves_all(pair: Pair, update: torch.optim.Optimizer) -> None:
    """Refuse an optimiser that leaves out a trainable parameter, or moves one that no run folder would keep."""
    moved = {id(parameter) for group in update.param_groups for parameter in group["params"]}
    if missing := [name for name, p in pair.named_parameters() if p.requires_grad and id(p) not in moved]:
        raise ValueError(
            f"the optimiser leaves out {len(missing)} trainable parameters, the first '{missing[0]}': give it all of "
            "them, or call requires_grad_(False) on those that are to stay as they are"
        )
    if moved - {id(parameter) for parameter in pair.parameters()}:
        raise ValueError(
            "the optimiser moves tensors that are no parameters of the pair: store them in the pair, as nn.Parameter"
        )


def rate_of(update: torch.optim.Optimizer) -> float | None:
    """Return the learning rate of an optimiser's first group."""
    rate = update.param_groups[0].get("lr")
    return None if rate is None else float(rate)


def make_schedule(
    make: MakeScheduler, update: torch.optim.Optimizer, validates: bool
) -> torch.optim.lr_scheduler.LRScheduler:
    """Return the scheduler that ``make`` makes from the optimiser.

    Raises:
        ValueError: for anything that makes no scheduler, and ``ReduceLROnPlateau`` without validation data.
    """
    try:
        is_a_maker = callable(make) and not isinstance(make, pyro.optim.PyroOptim)
        schedule = make(update) if is_a_maker else None
    except TypeError as error:
        if not isinstance(make, type):
            raise
        raise ValueError(
            f"scheduler is the class {make.__name__}, which asks for more than the optimiser ({error}): give a "
            "function, as in lambda optimizer: CosineAnnealingLR(optimizer, 20)"
        ) from error
    if not isinstance(schedule, torch.optim.lr_scheduler.LRScheduler):
        given = make if schedule is None else schedule
        raise ValueError(
            f"scheduler gives {type(given).__name__}; it must make a scheduler of torch.optim.lr_scheduler from the "
            "optimiser: lambda optimizer: CosineAnnealingLR(optimizer, 20)"
        )
    if isinstance(schedule, torch.optim.lr_scheduler.ReduceLROnPlateau) and not validates:
        raise ValueError("ReduceLROnPlateau follows the validation loss: pass validation data")
    return schedule


def described_schedule(schedule: torch.optim.lr_scheduler.LRScheduler | None) -> str | None:
    """Return a scheduler's name with its first numbers, and those of its parts; functions have none."""
    if schedule is None:
        return None
    state = schedule.state_dict()
    kept = sorted(name for name in state if not name.startswith("_") or name == "_milestones")
    parts = [described_schedule(part) or "" for part in getattr(schedule, "_schedulers", [])]
    return f"{type(schedule).__name__}({', '.join([*(f'{name}={state[name]}' for name in kept), *parts])})"


def described(thing: object) -> str:
    """Return the name of a loss or an optimiser with the numbers that a resumed run must share."""
    if isinstance(thing, torch.optim.Optimizer):
        numbers = {name: value for name, value in thing.defaults.items() if isinstance(value, (int, float, tuple))}
    elif isinstance(thing, pyro.infer.ELBO):
        # Other attributes say how the value is computed, and some change during training.
        numbers = {name: value for name, value in vars(thing).items() if name in NUMBERS_OF_A_LOSS}
    else:
        return getattr(thing, "__name__", type(thing).__name__)
    return f"{type(thing).__name__}({', '.join(f'{name}={value}' for name, value in sorted(numbers.items()))})"
