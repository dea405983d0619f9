"""The code behind a stage: its body and all that this reaches, by name, in `cpdiff_core` and in the stages' own modules.

A cache key holds no code (see `tasks/versions.py`), so a hit may have been made by other code than the present one. The
digest of a stage's code is written into its provenance.json and compared at each hit. Comments, docstrings, descriptions
of fields and layout do not change it, nor does what only stores, names or shows values. It is found in the source files
alone: nothing is imported for it.
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PACKAGES = ("cpdiff_core", "tasks")
NOT_COUNTED = frozenset(f"cpdiff_core.{name}" for name in ("config", "artifacts", "progress", "energy"))

Symbol = tuple[str, str]
"""A module and a name in it."""


class Sources:
    """The source files of the packages that count, which lie in `top`, as they are now."""

    def __init__(self, top: Path) -> None:
        self._top = top
        self._modules: dict[str, _Module] = {}
        self._symbols: dict[Symbol, tuple[str, tuple[Symbol, ...]]] = {}
        self._codes: dict[Symbol, str] = {}
        self.digest = self._digest()

    def code_of(self, module: str, name: str) -> str | None:
        """The digest of what the stage's body `name` of `module` is and does; None if a file has been changed since this
        object was made, for then nobody knows which version has been imported."""
        if (module, name) not in self._codes:
            found: dict[Symbol, str] = {}
            waiting = [(module, name)]
            while waiting:
                symbol = waiting.pop()
                if symbol not in found and (symbol[0] == module or _counts(symbol[0])):
                    found[symbol], reached = self._symbol(symbol)
                    waiting += reached
            if self._digest() != self.digest:
                return None
            self._codes[module, name] = hashlib.sha256(json.dumps(sorted(found.items())).encode()).hexdigest()
        return self._codes[module, name]

    def _digest(self) -> str:
        digest = hashlib.sha256()
        for path in sorted(path for package in PACKAGES for path in (self._top / package).rglob("*.py")):
            digest.update(path.relative_to(self._top).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
        return digest.hexdigest()

    def _symbol(self, symbol: Symbol) -> tuple[str, tuple[Symbol, ...]]:
        """A digest of the statements that make a name, none if it is of no file of ours, and what they mention."""
        if symbol not in self._symbols:
            module = self._module(symbol[0])
            statements = module.defined.get(symbol[1], [])
            text = json.dumps([skeleton(statement) for statement in statements], sort_keys=True)
            reached = {other for statement in statements for other in _mentioned(symbol[0], module, statement)}
            self._symbols[symbol] = hashlib.sha256(text.encode()).hexdigest(), tuple(sorted(reached))
        return self._symbols[symbol]

    def _module(self, name: str) -> _Module:
        if name not in self._modules:
            path = self._top.joinpath(*name.split("."))
            file = next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)
            self._modules[name] = _Module.of(ast.parse(file.read_bytes()).body if file is not None else [])
        return self._modules[name]


@dataclass
class _Module:
    """A source file. defined: its top-level names and the statements that make them; imported: what stands for names of
    other modules."""

    defined: dict[str, list[ast.stmt]] = field(default_factory=dict)
    imported: dict[str, Symbol] = field(default_factory=dict)

    @classmethod
    def of(cls, statements: list[ast.stmt]) -> _Module:
        made = cls()
        for statement in statements:
            made.imported |= _imports(statement)
            for name in _names(statement):
                made.defined.setdefault(name, []).append(statement)
        return made


def _counts(module: str) -> bool:
    return module.endswith("stages") or (module.startswith("cpdiff_core") and module not in NOT_COUNTED)


def _mentioned(name: str, module: _Module, statement: ast.stmt) -> Iterator[Symbol]:
    nodes = list(ast.walk(statement))
    imported = dict(module.imported)
    for node in nodes:
        imported |= _imports(node)
    for node in nodes:
        if isinstance(node, ast.Name) and node.id in module.defined:
            yield name, node.id
        elif isinstance(node, ast.Name) and node.id in imported:
            yield imported[node.id]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in imported:
            yield ".".join(imported[node.value.id]), node.attr  # of a module that was imported by its name


def _imports(node: ast.AST) -> dict[str, Symbol]:
    """Of `from a import b as c`: {c: (a, b)}."""
    if isinstance(node, ast.ImportFrom) and node.module:
        return {alias.asname or alias.name: (node.module, alias.name) for alias in node.names}
    return {}


def _names(statement: ast.stmt) -> set[str]:
    """The names that a top-level statement makes or changes."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {statement.name}
    if isinstance(statement, ast.Import | ast.ImportFrom):
        return set()
    made = {node.id for node in ast.walk(statement) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    parts = [node.value for node in ast.walk(statement) if isinstance(node, ast.Subscript | ast.Attribute)
             and isinstance(node.ctx, ast.Store)]  # fmt: skip
    return made | {part.id for part in parts if isinstance(part, ast.Name)}


def skeleton(node: Any) -> Any:
    """A piece of source as plain data, the same on every version of Python."""
    if isinstance(node, list):
        return [skeleton(item) for item in node]
    if not isinstance(node, ast.AST):
        return node if isinstance(node, str | int | float) else repr(node)
    fields = {name: value for name, value in ast.iter_fields(node) if value is not None and value != []}
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        fields["body"] = node.body if ast.get_docstring(node, clean=False) is None else node.body[1:]
        # A stage's own decorator holds its version and its label.
        fields["decorator_list"] = [each for each in node.decorator_list if not _is_stage(each)]
    if isinstance(node, ast.Call):
        fields["keywords"] = [keyword for keyword in node.keywords if keyword.arg != "description"]
    return {type(node).__name__: {name: skeleton(value) for name, value in fields.items()}}


def _is_stage(decorator: ast.expr) -> bool:
    return isinstance(decorator, ast.Call) and isinstance(decorator.func, ast.Name) and decorator.func.id == "stage"


SOURCES = Sources(Path(__file__).resolve().parent.parent)


def code_behind(body: Callable[..., None]) -> dict[str, str | None]:
    """What provenance.json says of a stage's code: that of the stage, and all source files, which are compared first."""
    return {"code": SOURCES.code_of(body.__module__, body.__qualname__), "sources": SOURCES.digest}


def made_by_other_code(provenance: Mapping[str, Any], body: Callable[..., None]) -> bool:
    """Whether `provenance` tells of another code than that of `body`. What tells of none counts as the same."""
    if provenance.get("code") is None or provenance.get("sources") == SOURCES.digest:
        return False
    return SOURCES.code_of(body.__module__, body.__qualname__) not in (None, provenance["code"])
