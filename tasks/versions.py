"""Did the code behind a stage change without a new version?

A cached artifact is found by its stage's name, version and inputs; the code that made it is not in the key, so that
a refactoring keeps the cache. The price is that a change of meaning must raise the stage's `version`. The digests of
the code behind all stages (`tasks/code.py`) are recorded in `tests/tasks/stage_sources.json`, a test compares them, and

    python -m tasks.versions --acknowledge

records the present ones, after the version has been raised or because the results stay as they were.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cpdiff_core.artifacts import write_json
from tasks.code import code_behind
from tasks.stage import STAGES, Stage

RECORDED = Path(__file__).resolve().parent.parent / "tests" / "tasks" / "stage_sources.json"
COMMAND = "python -m tasks.versions --acknowledge"

Entry = Mapping[str, Any]  # {"version": int, "sha256": str}


def current(stages: Mapping[str, Stage[..., Any]]) -> dict[str, Entry]:
    return {
        name: {"version": stage.stage_version, "sha256": code_behind(stage.body)["code"]} for name, stage in stages.items()
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
                f"stage {name!r}: its code changed and its version is still {new['version']}. If the same inputs may "
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
