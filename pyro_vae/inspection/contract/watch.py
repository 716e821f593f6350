"""The modules that run while a pair does, to name the one that fails or differs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, Self

from torch import Tensor, nn

from pyro_vae.inspection.contract.agreement import View, all_agree
from pyro_vae.pair.pair import Pair

__all__ = ["Watch", "axis_fault", "first_line", "watched"]


class Watch:
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

    def first_difference(self, other: Watch, view: View) -> str:
        """Return the first module whose inputs agree with the other run's and whose outputs do not."""
        for (module, inputs, outputs), (same, others, results) in zip(self.calls, other.calls, strict=False):
            if module is not same:
                return ""
            if all_agree(inputs, others, view) and not all_agree(outputs, results, view):
                return self._named(module)
        return ""

    def _named(self, module: nn.Module) -> str:
        return f"'{self.names[module]}' ({type(module).__name__})"

    def _enter(self, module: nn.Module, _: Any) -> None:
        self.running.append(module)

    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.running.pop()
        self.calls.append((module, _tensors(inputs), _tensors((output,))))


def watched(pair: Pair, run: Callable[[], object]) -> Watch:
    """Run again, to see where it fails or differs."""
    with Watch(pair) as watch, suppress(Exception):
        run()
    return watch


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    return [value.detach().clone() for value in values if isinstance(value, Tensor)]


def axis_fault(watch: Watch, failure: Exception, shape: tuple[int, int]) -> str:
    place = f"{watch.failed}: " if watch.failed else ""
    return (
        f"the pair runs on (B, …) but fails on (K, B, …) = ({shape[0]}, {shape[1]}, …), the shape of K draws per datum "
        f"({place}{first_line(failure)}); index and reduce from the right (dim=-1, z[..., 0]), and give layers that "
        "take one batch dimension a flattened batch, as pv.networks.MLP does"
    )


def first_line(failure: Exception) -> str:
    line = (str(failure).splitlines() or [""])[0]
    return f"{type(failure).__name__}: {line}"
