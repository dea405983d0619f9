"""The cache rule in one process: what is a hit, what is a miss, and what a failure leaves."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from prefect import flow
from prefect.settings import PREFECT_LOCAL_STORAGE_PATH, PREFECT_TASKS_REFRESH_CACHE, temporary_settings
from toy_stages import (
    Number,
    Sum,
    add,
    diamond,
    double,
    fills_disk,
    flaky,
    load,
    log,
    logged,
    number,
    slow,
    total,
    walk,
)

from cpdiff_core.artifacts import Artifact, verify
from cpdiff_core.config import RuntimeConfig, UserError
from tasks.locks import hold
from tasks.provenance import signed
from tasks.report import tally
from tasks.stage import cache_key, clean, folder, is_done, resume_state, stage

ONE = Number(value=1)


def test_second_call_is_a_hit_and_returns_the_same_artifact(artifact_root: Path) -> None:
    first, second = number(ONE), number(ONE)
    assert first == second == number.artifact(ONE)
    assert logged(artifact_root) == ["number 1"]
    assert load(second) == 1.0
    assert is_done(first)
    assert verify(folder(first)) == []


def test_runtime_is_not_in_the_key_and_defaults_are(artifact_root: Path) -> None:
    number(ONE, runtime=RuntimeConfig(device="cpu", num_threads=1))
    number(number=Number(value=1, scale=1.0), runtime=RuntimeConfig(resume_seconds=3))
    assert logged(artifact_root) == ["number 1"]
    number(Number(value=1, scale=2.0))
    assert logged(artifact_root) == ["number 1", "number 1"]


def test_changing_one_of_two_upstreams_reruns_it_and_what_depends_on_it_only(artifact_root: Path) -> None:
    assert load(diamond(1, 2)) == 8.0  # 2 (2 x 1 + 2)
    assert logged(artifact_root) == ["number 1", "number 2", "double", "add", "double"]
    assert load(diamond(1, 3)) == 10.0
    assert logged(artifact_root)[5:] == ["number 3", "add", "double"]


def test_submitted_stages_run_once_per_key(artifact_root: Path) -> None:
    @flow(persist_result=False)
    def fan_out() -> list[Artifact]:
        numbers = [number.submit(Number(value=value)) for value in (1, 2, 1)]
        return [double.submit(item) for item in numbers]  # futures are inputs too

    results = [future.result() for future in fan_out()]
    assert results == [double.artifact(number.artifact(Number(value=value))) for value in (1, 2, 1)]
    assert sorted(logged(artifact_root)) == ["double", "double", "number 1", "number 2"]


def test_two_roots_in_one_process_share_nothing(artifact_root: Path, tmp_path: Path) -> None:
    number(ONE)
    with temporary_settings({PREFECT_LOCAL_STORAGE_PATH: tmp_path / "other"}):
        assert not is_done(number.artifact(ONE))
        assert folder(number(ONE)).is_relative_to(tmp_path / "other")
        assert list((tmp_path / "other" / ".locks").glob("number.*"))
    assert logged(artifact_root) == logged(tmp_path / "other") == ["number 1"]


def test_moved_root_still_hits(artifact_root: Path, tmp_path: Path) -> None:
    number(ONE)
    os.rename(artifact_root, tmp_path / "moved")
    with temporary_settings({PREFECT_LOCAL_STORAGE_PATH: tmp_path / "moved"}):
        assert load(number(ONE)) == 1.0
    assert logged(tmp_path / "moved") == ["number 1"]


@pytest.mark.parametrize("length", [0, 1, 50, -1])
def test_truncated_record_is_a_miss(artifact_root: Path, length: int) -> None:
    record = folder(number(ONE)) / "result.json"
    record.write_bytes(record.read_bytes()[:length])
    assert not is_done(number.artifact(ONE))
    assert load(number(ONE)) == 1.0
    assert logged(artifact_root) == ["number 1", "number 1"]
    assert is_done(number.artifact(ONE))


@pytest.mark.parametrize("harm", ["truncate", "flip"])
def test_harmed_tensor_is_named_with_the_stage_to_run_again(artifact_root: Path, harm: str) -> None:
    file = folder(number(ONE)) / "value.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content[:-1] if harm == "truncate" else content)
    with pytest.raises(UserError, match=r"value\.safetensors.*stage 'number' will be recomputed"):
        double(number(ONE))
    assert not is_done(double.artifact(number.artifact(ONE)))


def test_refresh_setting_recomputes_and_replaces_the_folder(artifact_root: Path) -> None:
    (folder(number(ONE)) / "left-over.txt").write_text("from before")
    with temporary_settings({PREFECT_TASKS_REFRESH_CACHE: True}):
        number(ONE)
    assert logged(artifact_root) == ["number 1", "number 1"]
    assert is_done(number.artifact(ONE))
    assert not (folder(number.artifact(ONE)) / "left-over.txt").exists()


def test_two_computations_differ_in_provenance_and_record_only(artifact_root: Path, tmp_path: Path) -> None:
    first = folder(number(ONE))
    with temporary_settings({PREFECT_LOCAL_STORAGE_PATH: tmp_path / "other"}):
        second = folder(number(ONE))
    names = {path.name for path in first.iterdir()}
    assert names == {"value.safetensors", "config.json", "manifest.json", "provenance.json", "result.json"}
    for name in names - {"provenance.json", "result.json"}:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_folder_says_what_it_was_made_from(artifact_root: Path) -> None:
    made = folder(number(ONE, runtime=RuntimeConfig(device="cpu")))
    assert json.loads((made / "config.json").read_text()) == {
        "stage": "number",
        "version": 1,
        "inputs": {"number": {"value": 1, "scale": 1.0}},
    }
    provenance = json.loads((made / "provenance.json").read_text())
    assert provenance["seconds"] >= 0
    assert provenance["peak_process_bytes"] > 1e7
    assert provenance["device"]
    assert {"torch", "transformers", "peft", "diffusers", "prefect", "python"} <= provenance["versions"].keys()


def test_hit_that_other_code_has_made_is_a_hit_and_says_so(
    artifact_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = folder(number(ONE)) / "provenance.json"
    made = json.loads(record.read_text())
    number(ONE)
    assert "other code" not in capsys.readouterr().err
    for changed, said in (({"sources": "0"}, False), ({"sources": "0", "code": "0"}, True), ({"code": None}, False)):
        record.write_text(json.dumps(signed(made | changed)))
        number(ONE)
        assert ("made by other code" in capsys.readouterr().err) == said, changed
    record.unlink()
    number(ONE)
    assert logged(artifact_root) == ["number 1"]


def test_artifact_of_another_type_is_refused(artifact_root: Path) -> None:
    plain = double(number(ONE))
    summed = add(plain, plain)
    assert type(summed) is Sum
    assert type(add(plain, plain)) is Sum, "also from the cache"
    total((summed,))
    with pytest.raises(TypeError, match=r"argument 'sums'.*instance of Sum"):
        total((plain,))
    with pytest.raises(TypeError, match="argument 'number'"):
        number(1)
    assert logged(artifact_root).count("total") == 1


def test_failing_body_leaves_no_hit_and_no_scratch(artifact_root: Path) -> None:
    with pytest.raises(ConnectionError):
        flaky(3, "network")
    assert logged(artifact_root) == ["flaky"] * 3, "retries=2"
    assert not is_done(flaky.artifact(3, "network"))
    assert [path for path in (artifact_root / "flaky").iterdir()] == []
    flaky(3, "network")
    assert is_done(flaky.artifact(3, "network"))


def test_retries_go_on_to_success(artifact_root: Path) -> None:
    flaky(2, "network")
    assert logged(artifact_root) == ["flaky"] * 3
    assert is_done(flaky.artifact(2, "network"))


@pytest.mark.parametrize("how", ["direct", "submit", "in a flow"])
def test_users_fault_travels_unchanged_and_is_not_retried(artifact_root: Path, how: str) -> None:
    @flow(persist_result=False)
    def called() -> None:
        if how == "submit":
            flaky.submit(1, "user").result()
        else:
            flaky(1, "user")

    with pytest.raises(UserError, match=r"^rank=0: must be at least 1; choose another$"):
        flaky(1, "user") if how == "direct" else called()
    assert logged(artifact_root) == ["flaky"]


def test_resume_state_survives_a_failure_and_goes_with_the_commit(artifact_root: Path) -> None:
    runtime = RuntimeConfig(resume_seconds=7)
    state = resume_state(walk.artifact(2, runtime=runtime), runtime)
    assert state.folder.is_relative_to(artifact_root / ".resume" / "walk")
    assert state.every_seconds == 7
    state.folder.mkdir(parents=True)
    (state.folder / "state.safetensors").write_bytes(b"damaged")
    walk(2, runtime=runtime)
    assert logged(artifact_root) == ["walk from 0"]
    assert not state.folder.exists()


def test_every_end_of_a_stage_is_one_line_and_counted(artifact_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    @flow(persist_result=False)
    def submitted() -> None:
        number.submit(ONE).result()

    before = tally()
    slow(0.3)
    number(ONE)
    number(ONE)
    submitted()
    with pytest.raises(UserError):
        flaky(1, "user")
    lines = [" ".join(line.split()) for line in capsys.readouterr().err.splitlines()]
    assert lines == [
        "Completed slow 0.3 s",
        "Completed number value 1 0.0 s",
        "Cached number value 1",
        "Cached number value 1",
        "Failed flaky",
    ]
    assert {name: count - before[name] for name, count in tally().items()} == {"computed": 2, "cached": 2, "failed": 1}


def test_clean_removes_old_scratch_and_no_running_stage(artifact_root: Path) -> None:
    number(ONE)
    names = [".building-aaaa-x", ".building-bbbb-y", ".building-cccc-z"]
    for name in names:
        (artifact_root / "number" / name / "out").mkdir(parents=True)
    for name in names[:2]:
        os.utime(artifact_root / "number" / name, (0, 0))
    with hold([cache_key(Artifact(stage="number", fingerprint="bbbb"))]):  # it runs for more than a day
        removed = clean(artifact_root)
    assert [path.name for path in removed] == names[:1]
    assert {path.name for path in (artifact_root / "number").glob(".building-*")} == set(names[1:])
    assert is_done(number.artifact(ONE))


def test_clean_removes_the_records_prefect_keeps_of_exceptions(artifact_root: Path) -> None:
    with pytest.raises(UserError):
        flaky(1, "user")
    records = [path for path in artifact_root.iterdir() if path.is_file() and path.name != "log.txt"]
    assert len(records) == 1
    assert json.loads(records[0].read_text())["metadata"]["serializer"]["type"] == "json"
    assert clean(artifact_root, older_than_seconds=-1) == records
    assert not records[0].exists()


def test_names_and_labels_that_cannot_work_are_refused() -> None:
    def body(out: Path, count: int) -> None: ...

    with pytest.raises(ValueError, match="lower-case"):
        stage("Bad name")
    with pytest.raises(TypeError, match=r"asks for \['other'\]"):
        stage("fresh", label=lambda other: other)(body)
    with pytest.raises(ValueError, match=r"is taken by toy_stages\.number"):
        stage("number")(body)


@pytest.fixture
def small_disk(tmp_path: Path):
    """A file system of one megabyte."""
    mount = tmp_path / "disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount)]
    made = subprocess.run(command, check=False, capture_output=True, text=True)
    if made.returncode != 0:
        pytest.skip(f"a small file system cannot be mounted: {made.stderr.strip()}")
    yield mount
    subprocess.run(["umount", "--lazy", str(mount)], check=True)  # our file of locks in use stays open


@pytest.mark.parametrize("writer", ["safetensors", "python"])
def test_full_disk_is_one_line_that_names_the_root_and_leaves_no_hit(artifact_root: Path, small_disk: Path, writer: str) -> None:
    with temporary_settings({PREFECT_LOCAL_STORAGE_PATH: small_disk / "root"}):
        with pytest.raises(UserError, match=r"disk/root': the disk is full; .*--root") as caught:
            fills_disk(4, writer)
        assert "\n" not in str(caught.value)
        assert not is_done(fills_disk.artifact(4, writer))
        assert list((small_disk / "root" / "fills_disk").iterdir()) == [], "the space is free again"
        number(ONE)
        assert is_done(number.artifact(ONE))


def test_disk_too_full_for_the_record_is_reported_and_no_hit(
    artifact_root: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with temporary_settings({PREFECT_LOCAL_STORAGE_PATH: small_disk / "root"}):
        log("the root exists")
        (small_disk / "root" / "fill-before-record").touch()
        number(ONE)
        assert "Not saved  number value 1" in capsys.readouterr().err
        assert not is_done(number.artifact(ONE))


@pytest.mark.parametrize("name", ["number", ".locks"])
def test_file_where_a_folder_is_needed_is_one_line_that_names_it(artifact_root: Path, name: str) -> None:
    artifact_root.mkdir(exist_ok=True)
    (artifact_root / name).write_text("a file of the user's")
    with pytest.raises(UserError, match=rf"{name}' is a file where a folder is needed; move it away.*--root"):
        number(ONE)
    assert (artifact_root / name).read_text() == "a file of the user's"
