"""Computing again on a fresh root, and saying what has changed.

A cache whose keys are contents answers a scheduled rerun with "Cached". So a rerun has a root of its own below
`<root>/reruns/<experiment>/`, and afterwards every artifact is compared with the previous one of the same key, every
score with the previous interval, and every benchmark ratio with the last.
"""

from __future__ import annotations

import itertools
import json
import re
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from prefect import Flow, get_run_logger
from prefect.artifacts import create_markdown_artifact
from prefect.context import FlowRunContext
from prefect.results import ResultStore
from prefect.settings import PREFECT_LOCAL_STORAGE_PATH, temporary_settings
from prefect.states import Completed

from cpdiff_core.artifacts import read_table
from tasks.inventory import REPORT_STAGES, Stored, digests, survey
from tasks.prefect_artifacts import artifact_key, place

REGRESSION = 0.9
"""A ratio below this share of the last one is a regression; timings on a quiet machine repeat within a few per cent."""


@dataclass(frozen=True)
class FreshRoots:
    """The roots of one experiment's reruns, by the time of their start."""

    folder: Path

    def new(self) -> Path:
        """A root of its own for each of several that start in the same second."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for second in itertools.count(int(time.time())):
            path = self.folder / time.strftime("%Y%m%dT%H%M%S", time.localtime(second))
            with suppress(FileExistsError):
                path.mkdir()
                return path
        raise AssertionError

    def kept(self) -> list[Path]:
        """Oldest first."""
        return sorted(path for path in self.folder.glob("2*T*") if path.is_dir())

    def finished(self, name: str) -> list[Path]:
        """Those with a report of the experiment `name`. Oldest first."""
        return [path for path in self.kept() if _report(survey(path), name) is not None]

    def prune(self, name: str, keep: int) -> None:
        """Remove all but the newest `keep` finished ones, and those that have not finished within a day."""
        finished, yesterday = self.finished(name), time.time() - 86400.0
        unfinished = [path for path in self.kept() if path not in finished and path.stat().st_mtime < yesterday]
        for path in [*finished[:-keep], *unfinished]:
            shutil.rmtree(path)


def fresh_roots(root: Path, name: str) -> FreshRoots:
    return FreshRoots(root / "reruns" / re.sub(r"[^A-Za-z0-9_.-]+", "-", name))


def previous_root(root: Path, name: str) -> Path | None:
    """Where the experiment was last computed: its newest rerun with a report, else the root itself."""
    finished = fresh_roots(root, name).finished(name)
    if finished:
        return finished[-1]
    return root if _report(survey(root), name) is not None else None


def on_root(path: Path, flow: Callable[..., Any], *arguments: Any) -> Any:
    """Call a flow or its body with another root, inside a flow. Prefect's records must go there too, and it asks the flow
    around for that."""
    around = FlowRunContext.get()
    assert around is not None
    if isinstance(flow, Flow):
        flow = flow.with_options(result_storage=path)
    with temporary_settings({PREFECT_LOCAL_STORAGE_PATH: path}), around.model_copy(update={"result_store": ResultStore()}):
        return flow(*arguments)


@dataclass(frozen=True)
class Verdict:
    """What a comparison has found. warnings: one line each. same: what has not changed, in words."""

    warnings: tuple[str, ...]
    same: str


FIRST = Verdict((), "the first time: there is nothing to compare with")


def compare(name: str, previous: Path | None, fresh: Path) -> Verdict:
    """What differs between two roots, and what does not."""
    if previous is None:
        return FIRST
    old, new = survey(previous), survey(fresh)
    shared = [key for key in new if key in old and old[key].complete and new[key].complete]
    differing = {key: files for key in shared if (files := _differing(old[key], new[key]))}
    warnings = [f"{key} has other bytes than before: {files}" for key, files in differing.items()]
    same = f"{len(shared) - len(differing)} of {len(shared)} artifacts are bit-identical to those in {previous.name}"
    before, after = _report(old, name), _report(new, name)
    if before is None or after is None:
        return Verdict((*warnings, "one of the two has no report"), same)
    if before.key != after.key:
        changed = sorted({item.stage for key, item in new.items() if key not in shared and item.complete})
        warnings.append(
            "the experiment itself has changed: its configuration, its data or a stage's version; stages with other "
            f"inputs: {', '.join(changed)}"
        )
    moved, num_scores = _moved_scores(before.folder, after.folder)
    same += f", {num_scores - len(moved)} of {num_scores} scores are within their earlier intervals"
    if other := _made_otherwise(before.folder, after.folder):
        same += f"; what has changed around them: {', '.join(other)}"
    return Verdict((*warnings, *moved), same)


def _report(stored: dict[str, Stored], name: str) -> Stored | None:
    reports = [item for item in stored.values() if item.stage in REPORT_STAGES and item.complete and item.name == name]
    return max(reports, key=lambda item: item.written, default=None)


def _differing(old: Stored, new: Stored) -> str:
    """The names of the files that differ and must not."""
    before, after = digests(old), digests(new)
    return ", ".join(sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name)))


def _moved_scores(old: Path, new: Path) -> tuple[list[str], int]:
    """Scores of one report that lie outside the interval of the other, and how many both have."""
    both = _scores(old).merge(_scores(new), on=["of", "arm", "metric"], suffixes=("_old", "_new"))
    outside = both[(both.estimate_new < both.low_old) | (both.estimate_new > both.high_old)]
    lines = [
        f"{row.of}, {row.arm}: {row.estimate_new:.1f} is outside {row.low_old:.1f} to {row.high_old:.1f}"
        for row in outside.itertuples()
    ]
    return lines, len(both)


def _scores(report: Path) -> pd.DataFrame:
    """of (task or style), arm, metric, estimate, low, high. A style's distance has a spread over resampled images in place of
    an interval: 1.96 of it on either side."""
    frame = read_table(report, "results.csv").rename(columns={"task": "of", "style": "of"})
    if "low" not in frame:
        frame = frame.assign(low=frame.estimate - 1.96 * frame["std"], high=frame.estimate + 1.96 * frame["std"])
    return frame[["of", "arm", "metric", "estimate", "low", "high"]]


def _made_otherwise(old: Path, new: Path) -> list[str]:
    """`what before -> now` for what may change bytes of the same inputs: code, packages, hardware, threads."""
    before, after = (_circumstances(folder) for folder in (old, new))
    return [f"{what} {before[what]} -> {after[what]}" for what in after if before.get(what, after[what]) != after[what]]


def _circumstances(report: Path) -> dict[str, Any]:
    made = json.loads((report / "provenance.json").read_text(encoding="utf-8"))
    commit = re.sub(r"(?<=^.{7})[0-9a-f]+", "", made["commit"] or "unknown")
    around = {"commit": commit, "device": made["device"], "threads": made["torch_threads"]}
    return around | made["versions"]


def benchmark_verdict(folder: Path) -> Verdict:
    """Ratios in the newest CSV file of `folder` that have regressed against the newest earlier one of the device."""
    files = sorted(folder.glob("*.csv"))
    if not files:
        return FIRST
    new = pd.read_csv(files[-1])
    for file in reversed(files[:-1]):
        old = pd.read_csv(file)
        if old.device.iloc[0] == new.device.iloc[0]:
            both = old.merge(new, on=["work", "reference_name"], suffixes=("_old", "_new")).dropna(
                subset=["ratio_old", "ratio_new"]
            )
            fallen = both[both.ratio_new < REGRESSION * both.ratio_old]
            lines = tuple(
                f"{row.work}: {row.ratio_new:.2f} x {row.reference_name}, {row.ratio_old:.2f} x in {file.name}"
                for row in fallen.itertuples()
            )
            held = f"{len(both) - len(lines)} of {len(both)} ratios are at least {REGRESSION} of those in {file.name}"
            return Verdict(lines, held)
    return Verdict((), f"the first time on {new.device.iloc[0]}: there is nothing to compare with")


def ended(name: str, verdict: Verdict, result: str) -> Any:
    """The state a rerun ends with, and an artifact that says why. For use inside a flow."""
    number = f"{len(verdict.warnings)} warning{'s' if len(verdict.warnings) > 1 else ''}"
    lines = [
        f"# {name}: compared with the last time",
        "",
        f"**{number}**" if verdict.warnings else "No warning.",
        "",
        *(f"- {line}" for line in verdict.warnings),
        "",
        f"{verdict.same[0].upper()}{verdict.same[1:]}.",
        "",
        place(Path(result)),
    ]
    create_markdown_artifact(
        key=artifact_key(name, "comparison"), markdown="\n".join(lines), description=f"What has changed in {name}"
    )
    for line in verdict.warnings:  # the pages show any completed state in green, a warning in the log in yellow
        get_run_logger().warning(line)
    if verdict.warnings:
        return Completed(name="Warning", message=f"{number}; first: {verdict.warnings[0]}")
    return Completed(message=f"{verdict.same}; {result}")
