"""Find where the package reads Pyro's site dictionaries outside ``pair/``."""

from __future__ import annotations

import ast

from benchmarks.house.modules import Module

__all__ = ["site_reads"]

KEYS = {"fn", "value", "is_observed", "cond_indep_stack", "mask", "infer", "scale", "log_prob", "unscaled_log_prob"}
# Whose ``nodes`` belong to no trace: a distribution over graphs (self), and torch.fx's graphs.
OTHER_OWNERS = {"self", "graph", "nodes"}
ROOM = "pyro_vae.pair"


def site_reads(found: dict[str, Module]) -> list[str]:
    """Return the place of each read, as ``path:line expression``.

    A read is a subscript or ``get`` with one of Pyro's keys, e.g. ``site["fn"]``, or a trace's ``.nodes``.
    """
    reads = []
    for module in found.values():
        if f"{module.name}.".startswith(f"{ROOM}."):
            continue
        for node in ast.walk(module.tree):
            if _is_read(node):
                reads.append(f"{module.path.as_posix()}:{node.lineno} {ast.unparse(node)}")
    return reads


def _is_read(node: ast.AST) -> bool:
    if isinstance(node, ast.Subscript):
        return isinstance(node.slice, ast.Constant) and node.slice.value in KEYS
    if isinstance(node, ast.Call):
        gets = isinstance(node.func, ast.Attribute) and node.func.attr == "get" and bool(node.args)
        return gets and isinstance(node.args[0], ast.Constant) and node.args[0].value in KEYS
    if not isinstance(node, ast.Attribute) or node.attr != "nodes" or isinstance(node.value, ast.Subscript):
        return False
    owner = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "")
    return owner not in OTHER_OWNERS
