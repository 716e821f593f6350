"""Parse the package's modules and resolve the imports between them."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["PACKAGE", "Import", "Module", "beyond_all", "files_per_folder", "imported_by", "imports", "modules"]

PACKAGE = "pyro_vae"


@dataclass(frozen=True)
class Module:
    """One source file.

    Attributes:
        name: dotted, e.g. ``pyro_vae.pair.terms``.
        path: relative to the checkout.
        text: the source.
        tree: the source, parsed.
    """

    name: str
    path: Path
    text: str
    tree: ast.Module

    @property
    def exported(self) -> set[str]:
        """The names in ``__all__``; empty without one."""
        for node in self.tree.body:
            if isinstance(node, ast.Assign) and any(ast.unparse(target) == "__all__" for target in node.targets):
                return {name.value for name in ast.walk(node.value) if isinstance(name, ast.Constant)}
        return set()


@dataclass(frozen=True)
class Import:
    """Module ``importer`` imports ``name`` from module ``imported``, or the whole module if ``name`` is None."""

    importer: str
    imported: str
    name: str | None

    def __str__(self) -> str:
        return f"{self.importer} imports {self.name} from {self.imported}"


def modules(root: Path) -> dict[str, Module]:
    """Return the package's modules by dotted name, for the checkout ``root``.

    Raises:
        ValueError: if the folder holds no package.
    """
    found = {}
    for path in sorted((root / PACKAGE).rglob("*.py")):
        relative = path.relative_to(root)
        parts = relative.with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        text = path.read_text(encoding="utf-8")
        found[name] = Module(name, relative, text, ast.parse(text))
    if not found:
        raise ValueError(f"{root} has no folder {PACKAGE}/ with Python files; give the root of a checkout")
    return found


def files_per_folder(found: dict[str, Module]) -> dict[str, int]:
    """Return the number of Python files in each folder, ``__init__.py`` included."""
    return dict(Counter(module.path.parent.as_posix() for module in found.values()))


def imports(found: dict[str, Module]) -> set[Import]:
    """Return every import of one module of the package by another, without repetitions."""
    return {line for module in found.values() for line in _of(module, found) if line.imported != module.name}


def _of(module: Module, found: dict[str, Module]) -> Iterator[Import]:
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            yield from (Import(module.name, alias.name, None) for alias in node.names if alias.name in found)
        elif isinstance(node, ast.ImportFrom):
            source = _source(module, node)
            for alias in node.names:
                if f"{source}.{alias.name}" in found:
                    yield Import(module.name, f"{source}.{alias.name}", None)
                elif source in found:
                    yield Import(module.name, source, alias.name)


def _source(module: Module, node: ast.ImportFrom) -> str:
    """Return the absolute name of the module that a ``from`` statement names."""
    if not node.level:
        return node.module or ""
    package = module.name if module.path.name == "__init__.py" else module.name.rpartition(".")[0]
    parts = package.split(".")
    return ".".join([*parts[: len(parts) - node.level + 1], *([node.module] if node.module else [])])


def imported_by(found: dict[str, Module]) -> dict[str, int]:
    """Return how many modules import each module, most first."""
    pairs = {(line.importer, line.imported) for line in imports(found)}
    counts = Counter(dict.fromkeys(found, 0)) + Counter(imported for _, imported in pairs)
    return {name: counts[name] for name in sorted(found, key=lambda name: (-counts[name], name))}


def beyond_all(found: dict[str, Module]) -> list[Import]:
    """Return the imports of a name that its module's ``__all__`` does not list."""
    beyond = {line for line in imports(found) if line.name and line.name not in found[line.imported].exported}
    return sorted(beyond, key=str)
