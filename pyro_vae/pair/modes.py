"""Run a pair in a mode, on a device, from a seed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pyro
import torch
from torch import Tensor, nn

from pyro_vae.pair.pair import Pair
from pyro_vae.runtime.random_state import own_random_state

__all__ = [
    "chunks",
    "device_of",
    "drawing",
    "evaluation",
    "in_mode",
    "kept_in_evaluation",
    "normalises",
    "rehearsal",
    "remember_kept",
    "to_pair",
    "to_training",
]

# The attribute of a pair that names modules which stay in evaluation mode.
KEPT = "_kept_in_evaluation"


def device_of(pair: Pair) -> torch.device:
    """Return the device of the pair's parameters or buffers, the CPU if it has none."""
    return next((t.device for t in (*pair.parameters(), *pair.buffers())), torch.device("cpu"))


def to_pair(pair: Pair, batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return a batch on the pair's device."""
    device = device_of(pair)
    return tuple(tensor.to(device) for tensor in batch)


def chunks(batch: tuple[Tensor, ...], size: int) -> Iterator[tuple[Tensor, ...]]:
    """Yield data and conditions in chunks of at most ``size`` rows.

    >>> [len(x) for x, _ in chunks((torch.zeros(5, 2), torch.zeros(5)), 2)]
    [2, 2, 1]
    """
    for rows in torch.arange(len(batch[0]), device=batch[0].device).split(size):
        yield tuple(tensor[rows] for tensor in batch)


def kept_in_evaluation(pair: Pair) -> list[nn.Module]:
    """Return the modules that stay in evaluation mode while a pair trains: those that its user put there.

    In a pair in training mode they are in evaluation mode. After a run the whole pair is: then they are those of that
    run, and modules whose parameters are all frozen.
    """
    modules = dict(pair.named_modules())
    if pair.training:
        return [module for module in modules.values() if not module.training]
    kept = [modules[name] for name in vars(pair).get(KEPT, ()) if name in modules]
    frozen = (module for module in modules.values() if module is not pair and _is_frozen(module))
    inside = {id(part): part for module in frozen for part in module.modules() if not part.training}
    return list({id(module): module for module in (*kept, *inside.values())}.values())


def normalises(pair: Pair, kept: list[nn.Module]) -> bool:
    """Return whether a pair normalises by batches while it trains with these modules in evaluation mode."""
    held = {id(module) for module in kept}
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) and id(m) not in held for m in pair.modules())


def remember_kept(pair: Pair, kept: list[nn.Module]) -> None:
    """Store in a pair which of its modules a run left in evaluation mode; a copy of the pair has them too."""
    vars(pair)[KEPT] = tuple(name for name, module in pair.named_modules() if any(module is each for each in kept))


def to_training(pair: Pair, kept: list[nn.Module]) -> None:
    """Put a pair in training mode, but for some modules."""
    pair.train()
    for module in kept:
        module.training = False


def _is_frozen(module: nn.Module) -> bool:
    parameters = list(module.parameters())
    return bool(parameters) and not any(parameter.requires_grad for parameter in parameters)


@contextmanager
def in_mode(pair: Pair, *, training: bool) -> Iterator[None]:
    """Put a pair in training mode, as ``fit`` does, or in evaluation mode; flags are restored afterwards."""
    flags = {module: module.training for module in pair.modules()}
    if training:
        to_training(pair, kept_in_evaluation(pair))
    else:
        pair.eval()
    try:
        yield
    finally:
        for module, flag in flags.items():
            module.training = flag


@contextmanager
def evaluation(pair: Pair) -> Iterator[None]:
    """Run a pair in evaluation mode, without gradients or validation."""
    with in_mode(pair, training=False), torch.inference_mode(), pyro.validation_enabled(False):
        yield


@contextmanager
def drawing(pair: Pair, seed: int | None) -> Iterator[None]:
    """Run a pair in evaluation mode from a seed, without gradients or validation.

    The tensors that come out are ordinary ones, not inference tensors. The caller's random state is restored.

    Args:
        pair: any pair.
        seed: of the draws; fresh entropy for None.
    """
    with evaluation(pair), torch.inference_mode(False), torch.no_grad(), own_random_state(seed, device_of(pair)):
        yield


@contextmanager
def rehearsal(pair: Pair, seed: int) -> Iterator[None]:
    """Run a pair in training mode from a seed, without gradients or validation.

    A pair may differ between the two modes, e.g. relax its discrete draws while training. Buffers and the caller's
    random state are restored.

    Args:
        pair: any pair.
        seed: of the draws.
    """
    places = [module._buffers for module in pair.modules()]
    # Copies, since a layer may change a buffer in place, and the tensors themselves, since it may assign another.
    saved = [[(name, b, b.clone()) for name, b in place.items() if b is not None] for place in places]
    try:
        with (
            in_mode(pair, training=True),
            torch.inference_mode(False),
            torch.no_grad(),
            pyro.validation_enabled(False),
            own_random_state(seed, device_of(pair)),
        ):
            yield
    finally:
        for place, buffers in zip(places, saved, strict=True):
            place.update({name: buffer.copy_(copy) for name, buffer, copy in buffers})
