"""The optimiser's step from a list of gradients, without the overhead of ``Optimizer.step``.

torch gathers, groups and profiles around the kernel of fused Adam. For a small network this takes as long as the kernel
itself. For a plain fused Adam the kernel is called directly on the optimiser's state, with the same result.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import optimizer as hooks

__all__ = ["around_the_step", "update"]


def update(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor]) -> None:
    """Take the optimiser's step with these gradients and no others, and leave ``p.grad`` empty.

    Parameters and the optimiser's state are then bitwise those of ``optimizer.step()``.

    Args:
        optimizer: any torch optimiser.
        parameters: the parameters that have a gradient.
        gradients: a gradient for each of them.

    >>> weight = nn.Parameter(torch.zeros(2))
    >>> update(torch.optim.SGD([weight], lr=0.5), [weight], [torch.ones(2)])
    >>> weight.tolist(), weight.grad
    ([-0.5, -0.5], None)
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            # Other code may have left gradients.
            parameter.grad = None
    if _is_plain_fused_adam(optimizer, parameters):
        _fused_adam(optimizer, parameters, gradients)
        return
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    optimizer.step()
    for parameter in parameters:
        parameter.grad = None


def around_the_step(optimizer: torch.optim.Optimizer) -> str | None:
    """Name code of the user's that runs at the optimiser's step: hooks, or a replaced ``step``; None without any."""
    own = vars(optimizer).get("step")
    # A scheduler wraps ``step`` to count its calls; the count only serves a warning at the first one.
    if own is not None and getattr(own, "__wrapped__", None) is not type(optimizer).step:
        return "a step that was put in the place of its own"
    watched: tuple[Any, ...] = (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks)
    if any(watched) or hooks._global_optimizer_pre_hooks or hooks._global_optimizer_post_hooks:
        return "hooks around its step"
    return None


def _is_plain_fused_adam(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]) -> bool:
    """Tell whether ``optimizer.step()`` would only call the kernel once, on existing state."""
    if type(optimizer) is not torch.optim.Adam or len(optimizer.param_groups) != 1 or "grad_scale" in vars(optimizer):
        return False
    if around_the_step(optimizer) is not None:
        return False
    group = optimizer.param_groups[0]
    if not group["fused"] or any(group[flag] for flag in ("amsgrad", "decoupled_weight_decay", "differentiable")):
        return False
    if isinstance(group["lr"], Tensor) or any(isinstance(beta, Tensor) for beta in group["betas"]):
        return False
    first = parameters[0] if parameters else None
    if first is None or first.device.type != "cpu":
        return False
    # state[parameter] would add an empty entry.
    return all(p.dtype == first.dtype and p.device == first.device and optimizer.state.get(p) for p in parameters)


def _fused_adam(
    optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor]
) -> None:
    group, states = optimizer.param_groups[0], [optimizer.state[parameter] for parameter in parameters]
    steps = [state["step"] for state in states]
    beta1, beta2 = group["betas"]
    with torch.no_grad():
        # A tensor: a Python number would be converted once per parameter.
        torch._foreach_add_(steps, torch.ones((), device=steps[0].device), alpha=1.0)
        torch._fused_adam_(
            [*parameters],
            [*gradients],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            steps,
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=group["maximize"],
        )
