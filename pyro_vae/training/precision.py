"""Precision of training: of parameters, of densities, and of matmuls inside networks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, Literal, TypeAlias, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

__all__ = [
    "Precision",
    "check_precision",
    "float32_products",
    "has_bfloat16",
    "mixed",
    "share_of_bfloat16",
    "to_precision",
]

Precision: TypeAlias = Literal["float32", "float64", "bf16-mixed"]
# The dtype of parameters, densities and sums.
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bf16-mixed": torch.float32}
Thing = TypeVar("Thing", nn.Module, Tensor)
# Rows, inputs and outputs of the matmul that is timed, and how often. The least time counts: others only ever add.
TIMED, TIMINGS = (128, 784, 400), 20


def check_precision(precision: Precision | None, tf32: bool, device: torch.device, *, resume: bool = False) -> None:
    """Refuse an unknown precision, TF32 on a device or in a precision without it, and bfloat16 that can only lose.

    A run that was begun in bfloat16 elsewhere goes on, slowly.

    Raises:
        ValueError: naming the argument and its choices.
    """
    if precision is not None and precision not in DTYPES:
        raise ValueError(f"precision is {precision!r}; it must be one of {', '.join(get_args(Precision))}")
    if tf32 and device.type != "cuda":
        raise ValueError(f"tf32 is a mode of CUDA devices, and this run is on {device.type}: leave it out")
    if tf32 and precision == "float64":
        raise ValueError("tf32 rounds float32 products; it has none to round in float64: leave it out")
    if precision == "bf16-mixed" and not resume and not has_bfloat16(device):
        raise ValueError(
            f"bf16-mixed would be slower than float32 on this {device.type}, which has no instructions for bfloat16 "
            "matmuls: leave precision out"
        )


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device has instructions for matmuls in bfloat16.

    >>> has_bfloat16(torch.device("meta"))
    False
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    return bool(getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)())


def share_of_bfloat16(device: torch.device) -> float:
    """Return the time of a matmul in bfloat16 as a share of its time in float32, timed now.

    >>> share_of_bfloat16(torch.device("cpu")) > 0
    True
    """
    rows, inputs, outputs = TIMED
    least = dict.fromkeys((torch.float32, torch.bfloat16), float("inf"))
    with torch.no_grad():
        operands = {
            dtype: (
                torch.ones(rows, inputs, dtype=dtype, device=device),
                torch.ones(outputs, inputs, dtype=dtype, device=device),
            )
            for dtype in least
        }
        for _ in range(TIMINGS):
            for dtype, (left, right) in operands.items():
                start = time.perf_counter()
                # Reading a number waits for a GPU.
                float(nn.functional.linear(left, right)[0, 0])
                least[dtype] = min(least[dtype], time.perf_counter() - start)
    return least[torch.bfloat16] / least[torch.float32]


def to_precision(thing: Thing, precision: Precision | None) -> Thing:
    """Return a module, converted in place, or a tensor with its real numbers in the dtype of a precision.

    >>> to_precision(torch.zeros(2), "float64").dtype, to_precision(torch.arange(2), "float64").dtype
    (torch.float64, torch.int64)
    """
    if precision is None:
        return thing
    if isinstance(thing, Tensor) and not thing.is_floating_point():
        return thing
    return thing.to(DTYPES[precision])


@contextmanager
def mixed(modules: list[nn.Module], device: torch.device) -> Iterator[None]:
    """Run networks under torch's autocast to bfloat16, and convert their results to float32.

    Matmuls and convolutions inside a network take and return bfloat16. Parameters, gradients, tensors between networks,
    densities and sums stay in float32.

    Args:
        modules: the networks.
        device: the device that they run on.
    """
    before = [vars(module).get("forward") for module in modules]
    try:
        for module in modules:
            vars(module)["forward"] = _autocast(module.forward, device.type)
        yield
    finally:
        for module, forward in zip(modules, before, strict=True):
            del vars(module)["forward"]
            if forward is not None:
                vars(module)["forward"] = forward


def _autocast(forward: Callable[..., Any], device_type: str) -> Callable[..., Any]:
    @wraps(forward)
    def autocast(*args: Any, **kwargs: Any) -> Any:
        # No cache of rounded weights: a capture must not find weights that another run has rounded.
        with torch.autocast(device_type, torch.bfloat16, cache_enabled=False):
            output = forward(*args, **kwargs)
        return tree_map_only(Tensor, _widened, output)

    return autocast


def _widened(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor


@contextmanager
def float32_products(device: torch.device, tf32: bool) -> Iterator[None]:
    """Decide whether a GPU rounds the operands of float32 matmuls and convolutions to TF32."""
    if device.type != "cuda":
        yield
        return
    cudnn: Any = torch.backends.cudnn
    settings: list[Any] = [torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn]
    before = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = "tf32" if tf32 else "ieee"
        yield
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.fp32_precision = value
