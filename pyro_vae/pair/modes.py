"""How a pair is run: where, in which mode, with which random state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pyro
import torch
from torch import Tensor

from pyro_vae.pair.pair import Pair
from pyro_vae.runtime.random_state import own_random_state

__all__ = ["device_of", "drawing", "evaluation", "rehearsal", "to_pair"]


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


@contextmanager
def drawing(pair: Pair, seed: int | None) -> Iterator[None]:
    """Evaluate the pair with draws from a seed of their own; ordinary tensors come out."""
    with evaluation(pair), torch.inference_mode(False), torch.no_grad(), own_random_state(seed, device_of(pair)):
        yield
