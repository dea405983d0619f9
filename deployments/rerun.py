"""Computing again on a fresh root, and saying what has changed.

A cache whose keys are contents answers a scheduled rerun with "Cached". So a rerun has a root of its own below
`<root>/reruns/<experiment>/`, and afterwards every artifact is compared with the previous one of the same key, every
score with the previous interval, and every benchmark ratio with the last.
"""

from __future__ import annotations

import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from prefect import Flow
from prefect.artifacts import create_markdown_artifact
from prefect.settings import PREFECT_LOCAL_STORAGE_PATH, temporary_settings
from prefect.states import Completed

from tasks.inventory import REPORT_STAGE, Stored, digests, survey

REGRESSION = 0.9
"""A ratio below this share of the last one is a regression; timings on a quiet machine repeat within a few per cent."""


@dataclass(frozen=True)
class FreshRoots:
    """The roots of one experiment's reruns, by the time of their start."""

    folder: Path

    def new(self) -> Path:
        path = self.folder / time.strftime("%Y%m%dT%H%M%S")
        path.mkdir(parents=True)
        return path

    def kept(self) -> list[Path]:
        """Oldest first."""
        return sorted(path for path in self.folder.glob("2*T*") if path.is_dir())

    def newest(self) -> Path:
        return self.kept()[-1]

    def prune(self, keep: int) -> None:
        for path in self.kept()[:-keep]:
            shutil.rmtree(path)


def fresh_roots(root: Path, name: str) -> FreshRoots:
    return FreshRoots(root / "reruns" / re.sub(r"[^A-Za-z0-9_.-]+", "-", name))


def previous_root(root: Path, name: str) -> Path | None:
    """Where the experiment was last computed: its newest rerun with a report, else the root itself."""
    for path in [*reversed(fresh_roots(root, name).kept()), root]:
        if _report(survey(path), name) is not None:
            return path
    return None


def on_root(path: Path, flow: Flow[..., Any], *arguments: Any) -> Any:
    """Run `flow` with another root. Prefect's records must go there too, and it asks the flow for that."""
    with temporary_settings({PREFECT_LOCAL_STORAGE_PATH: path}):
        return flow.with_options(result_storage=path)(*arguments)


def compare(name: str, previous: Path | None, fresh: Path) -> list[str]:
    """What differs between two roots, one line each; empty if nothing does or there is nothing to compare with."""
    if previous is None:
        return []
    old, new = survey(previous), survey(fresh)
    shared = [key for key in new if key in old and old[key].complete and new[key].complete]
    warnings = [f"{key} has other bytes than before: {files}" for key in shared if (files := _differing(old[key], new[key]))]
    before, after = _report(old, name), _report(new, name)
    if before is None or after is None:
        return [*warnings, "one of the two has no report"]
    if before.key != after.key:
        warnings.append("the experiment itself has changed: its configuration, its data or a stage's version")
    return warnings + _moved_scores(before.folder, after.folder)


def _report(stored: dict[str, Stored], name: str) -> Stored | None:
    reports = [item for item in stored.values() if item.stage == REPORT_STAGE and item.complete and item.name == name]
    return max(reports, key=lambda item: item.written, default=None)


def _differing(old: Stored, new: Stored) -> str:
    """The names of the files that differ and must not."""
    before, after = digests(old), digests(new)
    return ", ".join(sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name)))


def _moved_scores(old: Path, new: Path) -> list[str]:
    """Scores of one report that lie outside the interval of the other."""
    keys = ["task", "arm", "metric"]
    both = pd.read_csv(old / "results.csv").merge(pd.read_csv(new / "results.csv"), on=keys, suffixes=("_old", "_new"))
    outside = both[(both.estimate_new < both.low_old) | (both.estimate_new > both.high_old)]
    return [
        f"{row.task}, {row.arm}: {row.estimate_new:.1f} is outside {row.low_old:.1f} to {row.high_old:.1f}"
        for row in outside.itertuples()
    ]


def benchmark_warnings(folder: Path) -> list[str]:
    """Ratios in the newest CSV file of `folder` that have regressed against the newest earlier one of the device."""
    files = sorted(folder.glob("*.csv"))
    if not files:
        return []
    new = pd.read_csv(files[-1])
    for file in reversed(files[:-1]):
        old = pd.read_csv(file)
        if old.device.iloc[0] == new.device.iloc[0]:
            both = old.merge(new, on=["work", "reference_name"], suffixes=("_old", "_new"))
            return [
                f"{row.work}: {row.ratio_new:.2f} x {row.reference_name}, {row.ratio_old:.2f} x in {file.name}"
                for row in both[both.ratio_new < REGRESSION * both.ratio_old].itertuples()
            ]
    return []


def warn(name: str, warnings: list[str], result: str) -> Any:
    """The state a rerun ends with, and an artifact that says why."""
    head = f"**{len(warnings)} warnings**" if warnings else "Nothing has changed, or there was nothing to compare with."
    lines = [
        f"# {name}: compared with the last time",
        "",
        head,
        "",
        *(f"- {line}" for line in warnings),
        "",
        f"`{result}`",
    ]
    key = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    create_markdown_artifact(key=f"{key}-comparison", markdown="\n".join(lines))
    if warnings:
        return Completed(name="Warning", message=f"{len(warnings)} warnings; first: {warnings[0]}")
    return Completed(message=f"as before; {result}")
