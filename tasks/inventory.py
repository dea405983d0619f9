"""What lies below the root: artifacts with their inputs and sizes, and which experiments they belong to.

An artifact's `config.json` names the artifacts that it was made from, so a report leads to everything behind it. Scores
on the selection split lead nowhere from there (what is reported must not depend on them); they belong to the
experiments that have all the vectors that they score.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpdiff_core.artifacts import MANIFEST, verify
from tasks.locks import to_remove
from tasks.provenance import is_intact
from tasks.record import RECORD
from tasks.stage import SCRATCH_PREFIX

REPORT_STAGES = frozenset({"report", "style_report"})
TABLE_STAGE = "table"
NAMED_STAGES = REPORT_STAGES | {TABLE_STAGE}
"""Whose artifacts bear the name of an experiment or table."""
SELECTION_STAGES = frozenset({"score_selection", "score_style_selection"})
TIMED = ("report.html", "facts.json")
NO_STAGES = frozenset({"adapters", "benchmarks", "generators", "reruns", "tensorboard"})
"""Folders below the root whose names and contents users choose. They hold no artifacts, so nothing here removes them."""


@dataclass(frozen=True)
class Stored:
    """One artifact's folder. `inputs`: keys `<stage>/<fingerprint>` of what it was made from. `name`: what the
    configuration in it is called, if that has a name. `written`: seconds since the epoch."""

    key: str
    folder: Path
    inputs: frozenset[str]
    name: str | None
    num_bytes: int
    written: float
    complete: bool

    @property
    def stage(self) -> str:
        return self.key.split("/")[0]


def survey(root: Path) -> dict[str, Stored]:
    """Every artifact folder below `root` by its key, complete or not."""
    found = {}
    for folder in sorted(root.glob("[a-z]*/[0-9a-f]*")):
        if folder.is_dir() and not folder.is_symlink() and folder.parent.name not in NO_STAGES:
            stored = _read(folder)
            found[stored.key] = stored
    return found


def _read(folder: Path) -> Stored:
    inputs: Any = {}
    with suppress(OSError, ValueError, KeyError, TypeError):  # an incomplete folder or a damaged one: `faults` tells
        inputs = json.loads((folder / "config.json").read_text(encoding="utf-8"))["inputs"]
    inputs = inputs if isinstance(inputs, dict) else {}
    config = inputs.get("config")
    name = config.get("name") if isinstance(config, dict) else inputs.get("name")
    return Stored(
        key=f"{folder.parent.name}/{folder.name}", folder=folder, inputs=frozenset(_named(inputs)),
        name=name if isinstance(name, str) else None, num_bytes=size_of(folder), written=folder.stat().st_mtime,
        complete=(folder / RECORD).is_file(),
    )  # fmt: skip


def _named(value: Any) -> Iterator[str]:
    """The keys of all artifacts in plain JSON data."""
    if isinstance(value, dict):
        if value.keys() == {"stage", "fingerprint"}:
            yield f"{value['stage']}/{value['fingerprint']}"
        for item in value.values():
            yield from _named(item)
    elif isinstance(value, list):
        for item in value:
            yield from _named(item)


def size_of(folder: Path) -> int:
    """Bytes of all files below `folder`; what disappears meanwhile counts as nothing."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.lstat().st_size if path.is_file() else 0
        except OSError:
            continue
    return total


def digests(item: Stored) -> dict[str, str]:
    """File -> sha256 of all files that are the same in every computation of an artifact; two files of a report are
    not, they say how long the stages took."""
    manifest = json.loads((item.folder / MANIFEST).read_text(encoding="utf-8"))
    return {name: entry["sha256"] for name, entry in manifest.items() if name not in TIMED}


def behind(stored: Mapping[str, Stored], key: str) -> set[str]:
    """The keys of an artifact and of everything that it was made from, as far as that is stored."""
    seen: set[str] = set()
    waiting = [key]
    while waiting:
        key = waiting.pop()
        if key in stored and key not in seen:
            seen.add(key)
            waiting += stored[key].inputs
    return seen


def experiments(stored: Mapping[str, Stored]) -> dict[str, set[str]]:
    """Experiment's name -> the keys of all that its reports were made from, the reports included; a table's name -> its
    own keys, for what it was made from belongs to its rows."""
    owned: dict[str, set[str]] = {}
    for key, item in stored.items():
        if item.stage in NAMED_STAGES and item.complete and item.name is not None:
            owned.setdefault(item.name, set()).update({key} if item.stage == TABLE_STAGE else behind(stored, key))
    for key, item in stored.items():
        if item.stage in SELECTION_STAGES and item.inputs:
            for keys in owned.values():
                if item.inputs <= keys:
                    keys.add(key)
    return owned


def faults(item: Stored) -> list[str]:
    """Every fault of a complete artifact, one line each."""
    found = verify(item.folder)
    known = {MANIFEST, RECORD, "provenance.json"}
    try:
        known |= json.loads((item.folder / MANIFEST).read_text(encoding="utf-8")).keys()
    except (OSError, ValueError, AttributeError):
        known |= {path.name for path in item.folder.iterdir()}  # `verify` has named the manifest
    found += [
        f"artifact file {str(path)!r}: is not in the manifest"
        for path in sorted(item.folder.rglob("*"))
        if path.is_file() and str(path.relative_to(item.folder)) not in known
    ]
    try:
        intact = is_intact(json.loads((item.folder / "provenance.json").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        intact = False
    if not intact:
        found.append(f"artifact file {str(item.folder / 'provenance.json')!r}: is damaged or missing")
    return found


def remove(item: Stored) -> bool:
    """Remove an artifact, unless another process uses or computes it; then nothing happens and False is returned."""
    with to_remove(f"{item.key}/{RECORD}") as free:
        if free and item.folder.exists():
            # Moved away whole, so that whoever dies here leaves no folder that looks complete.
            prefix = f"{SCRATCH_PREFIX}{item.folder.name}-"
            with tempfile.TemporaryDirectory(dir=item.folder.parent, prefix=prefix) as away:
                item.folder.rename(Path(away, "removed"))
    return free


def resume_states(root: Path) -> list[Path]:
    """What killed stages have left to go on from, oldest first."""
    folders = [path for path in root.glob(".resume/*/*") if path.is_dir()]
    return sorted(folders, key=lambda path: path.stat().st_mtime)


def remove_resume_state(folder: Path) -> bool:
    """Remove what a killed stage has left, unless the stage runs."""
    with to_remove(f"{folder.parent.name}/{folder.name}/{RECORD}") as free:
        if free:
            shutil.rmtree(folder, ignore_errors=True)
    return free
