"""Reruns on a fresh root, and what is said of them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
from prefect.settings import PREFECT_LOCAL_STORAGE_PATH, temporary_settings

from cpdiff_core.artifacts import Artifact, seal, write_json
from deployments.rerun import FIRST, Verdict, benchmark_verdict, compare, ended, fresh_roots, on_root, previous_root
from tasks.stage import folder, is_done, root, stage


@stage("rerun_toy")
def toy(out: Path, value: int) -> None:
    (out / "value.txt").write_text(str(value))


@flow(persist_result=False)
def toy_flow(value: int) -> Artifact:
    return toy(value)


@pytest.mark.parametrize("called", [toy_flow, toy_flow.fn], ids=["a run of its own", "a part of the run"])
def test_rerun_computes_again_and_puts_files_and_record_below_its_own_root(artifact_root: Path, called: Any) -> None:
    first = toy_flow(1)
    fresh = fresh_roots(root(), "some/name").new()

    @flow(persist_result=False)
    def outer() -> None:
        on_root(fresh, called, 1)

    before = folder(first).stat().st_mtime_ns
    outer()
    assert folder(first).stat().st_mtime_ns == before
    with temporary_settings({PREFECT_LOCAL_STORAGE_PATH: fresh}):
        assert is_done(first)
    assert fresh.is_relative_to(artifact_root / "reruns" / "some-name")


def report(
    root: Path, key: str = "report/ff1", estimate: float = 50.0, weights: str = "same", torch: str = "2.14.1"
) -> None:
    """A root with a report of experiment `a` on one fit, in the columns of its kind of report."""
    kind = {"style": "sketch", "std": 5.0} if key.startswith("style") else {"task": "sst2", "low": 40.0, "high": 60.0}
    for name, config in (("fit/bb1", {}), (key, {"config": {"name": "a"}})):
        path = root / name
        path.mkdir(parents=True)
        (path / "data.txt").write_text(weights if name.startswith("fit") else "report")
        row = {**kind, "arm": "generated", "metric": "accuracy", "estimate": estimate}
        pd.DataFrame([row]).to_csv(path / "results.csv", index=False)
        write_json(path / "config.json", {"inputs": config})
        seal(path)
        made = {"commit": None, "device": "a processor", "torch_threads": 2, "versions": {"torch": torch}}
        write_json(path / "provenance.json", made)
        (path / "result.json").write_text("{}")


def test_equal_roots_give_no_warning(tmp_path: Path) -> None:
    report(tmp_path / "old")
    report(tmp_path / "new")
    assert compare("a", tmp_path / "old", tmp_path / "new") == Verdict(
        (), "2 of 2 artifacts are bit-identical to those in old, 1 of 1 scores are within their earlier intervals"
    )
    assert compare("a", None, tmp_path / "new") == FIRST


def test_other_bytes_a_moved_score_and_another_configuration_are_each_named(tmp_path: Path) -> None:
    report(tmp_path / "old")
    report(tmp_path / "bytes", weights="other")
    report(tmp_path / "score", estimate=61.0)
    report(tmp_path / "config", key="report/ff2")
    other = compare("a", tmp_path / "old", tmp_path / "bytes")
    assert other.warnings == ("fit/bb1 has other bytes than before: data.txt",)
    assert other.same.startswith("1 of 2 artifacts are bit-identical")
    moved = compare("a", tmp_path / "old", tmp_path / "score")
    assert moved.warnings[-1] == "sst2, generated: 61.0 is outside 40.0 to 60.0"
    assert moved.same.endswith("0 of 1 scores are within their earlier intervals")
    assert compare("a", tmp_path / "old", tmp_path / "config").warnings == (
        "the experiment itself has changed: its configuration, its data or a stage's version; stages with other inputs: report",
    )


def test_style_experiments_are_compared_and_kept_as_others(tmp_path: Path) -> None:
    runs = fresh_roots(tmp_path, "a")
    report(runs.folder / "20260101T000000", "style_report/ff1")
    report(runs.folder / "20260102T000000", "style_report/ff1", estimate=60.0)
    assert previous_root(tmp_path, "a") == runs.folder / "20260102T000000"
    old, new = runs.finished("a")
    assert compare("a", old, new).warnings[-1] == "sketch, generated: 60.0 is outside 40.2 to 59.8"
    runs.prune("a", 1)
    assert runs.kept() == [new]


def test_what_has_changed_around_two_reruns_is_said_and_nothing_else(tmp_path: Path) -> None:
    report(tmp_path / "old")
    report(tmp_path / "new", torch="2.15.0")
    found = compare("a", tmp_path / "old", tmp_path / "new")
    assert found.same.endswith(" intervals; what has changed around them: torch 2.14.1 -> 2.15.0")


def test_reruns_that_start_in_the_same_second_have_roots_of_their_own(tmp_path: Path) -> None:
    runs = fresh_roots(tmp_path, "a")
    assert sorted({runs.new() for _ in range(3)}) == runs.kept()
    assert len(runs.kept()) == 3


def test_previous_is_the_newest_rerun_with_a_report_and_old_ones_go(tmp_path: Path) -> None:
    assert previous_root(tmp_path, "a") is None
    report(tmp_path)
    assert previous_root(tmp_path, "a") == tmp_path
    runs = fresh_roots(tmp_path, "a")
    report(runs.folder / "20260101T000000")
    report(runs.folder / "20260102T000000")
    (runs.folder / "20260103T000000").mkdir()
    assert previous_root(tmp_path, "a") == runs.folder / "20260102T000000"
    runs.prune("a", 1)
    assert [path.name for path in runs.kept()] == ["20260102T000000", "20260103T000000"], "it may still run"
    os.utime(runs.folder / "20260103T000000", (0, 0))
    runs.prune("a", 1)
    assert [path.name for path in runs.kept()] == ["20260102T000000"], "what has failed is no result"


@pytest.mark.parametrize(("ratio", "device", "count"), [(9.5, "x", 0), (8.5, "x", 1), (8.5, "y", 0)])
def test_ratio_that_fell_by_more_than_a_tenth_on_the_same_device_is_a_warning(
    tmp_path: Path, ratio: float, device: str, count: int
) -> None:
    for name, value, where in (("1.csv", 10.0, "x"), ("2.csv", ratio, device)):
        row = {"device": where, "work": "harvest", "ours": 1.0, "reference_name": "plain loop", "ratio": value}
        pd.DataFrame([row]).to_csv(tmp_path / name, index=False)
    verdict = benchmark_verdict(tmp_path)
    assert len(verdict.warnings) == count
    assert ("nothing to compare" in verdict.same) == (device == "y")
    if count:
        assert verdict.warnings == ("harvest: 8.50 x plain loop, 10.00 x in 1.csv",)


def test_warning_is_the_state_of_the_run(artifact_root: Path) -> None:
    @flow(persist_result=False)
    def ends_with(warnings: list[str]) -> object:
        return ended("a", Verdict(tuple(warnings), "2 of 3 scores are as before"), "somewhere")

    warned = ends_with(["it moved"], return_state=True)
    assert (warned.name, warned.message) == ("Warning", "1 warning; first: it moved")
    assert ends_with([], return_state=True).name == "Completed"
    with get_client(sync_client=True) as client:
        found = client.read_artifacts(artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=["a-comparison"])))
    assert {"- it moved" in str(item.data) for item in found} == {True, False}
    assert all("2 of 3 scores are as before." in str(item.data) for item in found)
