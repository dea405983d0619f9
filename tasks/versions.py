"""Did a stage's source change without a new version?

A cached artifact is found by its stage's name, version and inputs; the code that made it is not in the key, so that
a refactoring keeps the cache. The price is that a change of meaning must raise the stage's `version`. The digests of
all stages' sources are recorded in `tests/tasks/stage_sources.json`, a test compares them, and

    python -m tasks.versions --acknowledge

records the present ones, after the version has been raised or because the results stay as they were.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import json
import pkgutil
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cpdiff_core.artifacts import write_json
from tasks.stage import STAGES, Stage

RECORDED = Path(__file__).resolve().parent.parent / "tests" / "tasks" / "stage_sources.json"
COMMAND = "python -m tasks.versions --acknowledge"

Entry = Mapping[str, Any]  # {"version": int, "sha256": str}


def digest(*sources: Any) -> str:
    """A digest of functions, classes or modules that comments, docstrings, decorators and layout do not change, and
    that is the same on every version of Python."""
    skeletons = [_skeleton(ast.parse(textwrap.dedent(inspect.getsource(source)))) for source in sources]
    return hashlib.sha256(json.dumps(skeletons, sort_keys=True).encode()).hexdigest()


def _skeleton(node: Any) -> Any:
    if isinstance(node, list):
        return [_skeleton(item) for item in node]
    if not isinstance(node, ast.AST):
        return node if isinstance(node, str | int | float) else repr(node)
    fields = {name: value for name, value in ast.iter_fields(node) if value is not None and value != []}
    fields.pop("decorator_list", None)  # a stage's own decorator holds its version and its label
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module):
        docstring = ast.get_docstring(node, clean=False)
        fields["body"] = node.body if docstring is None else node.body[1:]
    return {type(node).__name__: {name: _skeleton(value) for name, value in fields.items()}}


def current(stages: Mapping[str, Stage[..., Any]]) -> dict[str, Entry]:
    return {
        name: {"version": stage.stage_version, "sha256": digest(stage.body, *stage.sources)}
        for name, stage in stages.items()
    }


def complaints(recorded: Mapping[str, Entry], present: Mapping[str, Entry]) -> list[str]:
    """One line for every stage that differs from its record, with what to do about it."""
    lines = []
    for name in sorted(recorded.keys() | present.keys()):
        old, new = recorded.get(name), present.get(name)
        if new is None:
            lines.append(f"stage {name!r}: is recorded but gone; run `{COMMAND}`")
        elif old is None:
            lines.append(f"stage {name!r}: is new; run `{COMMAND}`")
        elif new["version"] < old["version"]:
            lines.append(f"stage {name!r}: version went back from {old['version']} to {new['version']}; raise it again")
        elif new["version"] > old["version"]:
            lines.append(f"stage {name!r}: version is now {new['version']}; run `{COMMAND}`")
        elif new["sha256"] != old["sha256"]:
            lines.append(
                f"stage {name!r}: its source changed and its version is still {new['version']}. If the same inputs may "
                f"now give another result, raise the version in its decorator. Then run `{COMMAND}`"
            )
    return lines


def registered() -> dict[str, Stage[..., Any]]:
    """The product's stages."""
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if module.name.endswith("stages"):
            importlib.import_module(f"tasks.{module.name}")
    return {name: stage for name, stage in STAGES.items() if stage.body.__module__.split(".")[0] == "tasks"}


def main(arguments: list[str]) -> int:
    present = current(registered())
    if arguments == ["--acknowledge"]:
        write_json(RECORDED, present)
        return 0
    lines = complaints(json.loads(RECORDED.read_text(encoding="utf-8")), present)
    print("\n".join(lines) or "every stage is as it is recorded")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
