"""What is stored, whose it is, what is wrong with it, and that nothing in use is removed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from toy_stages import Number, logged, many_files, number, run_number_and_stay

from cpdiff_core.artifacts import seal, write_json
from tasks.inventory import experiments, faults, remove, survey
from tasks.provenance import signed
from tasks.stage import folder, is_done

PROJECT = Path(__file__).resolve().parent.parent.parent
ONE = Number(value=1)


def store(root: Path, key: str, inputs: list[str], name: str | None = None) -> Path:
    """A complete artifact, as a stage leaves it, made from the artifacts `inputs`."""
    path = root / key
    path.mkdir(parents=True)
    (path / "data.bin").write_bytes(key.encode() * 10)
    sources = [{"stage": item.split("/")[0], "fingerprint": item.split("/")[1]} for item in inputs]
    config = {} if name is None else {"config": {"name": name}}
    write_json(
        path / "config.json",
        {"stage": key.split("/")[0], "version": 1, "inputs": {**config, "nested": {"of": sources}}},
    )
    seal(path)
    write_json(path / "provenance.json", signed({"seconds": 1.0}))
    (path / "result.json").write_text("{}")
    return path


@pytest.fixture
def two_experiments(tmp_path: Path) -> Path:
    """`a` and `b` share the harvest aa1; each has a fit, scores, a choice and a report; fit cc1 has no report."""
    root = tmp_path / "root"
    store(root, "harvest/aa1", [])
    for name, digit in (("a", "1"), ("b", "2")):
        store(root, f"fit/bb{digit}", ["harvest/aa1"])
        store(root, f"score_report/dd{digit}", [f"fit/bb{digit}"])
        store(root, f"score_selection/ee{digit}", [f"fit/bb{digit}"])
        store(root, f"report/ff{digit}", [f"score_report/dd{digit}"], name)
    store(root, "fit/cc1", ["harvest/aa1"])
    return root


def test_report_leads_to_all_that_it_was_made_from_and_to_the_choice(two_experiments: Path) -> None:
    owned = experiments(survey(two_experiments))
    assert owned["a"] == {"harvest/aa1", "fit/bb1", "score_report/dd1", "score_selection/ee1", "report/ff1"}
    assert owned["b"] == {"harvest/aa1", "fit/bb2", "score_report/dd2", "score_selection/ee2", "report/ff2"}


def test_reports_of_styles_and_tables_of_several_experiments_are_kept_too(two_experiments: Path) -> None:
    store(two_experiments, "harvest_style/aa2", [])
    store(two_experiments, "score_style_selection/ee3", ["harvest_style/aa2"])
    store(two_experiments, "style_report/ff3", ["harvest_style/aa2"], "s")
    table = store(two_experiments, "table/ff4", ["report/ff1", "report/ff2"])
    write_json(table / "config.json", {"stage": "table", "version": 1, "inputs": {"name": "table9", "reports": []}})
    owned = experiments(survey(two_experiments))
    assert owned["s"] == {"harvest_style/aa2", "score_style_selection/ee3", "style_report/ff3"}
    assert owned["table9"] == {"table/ff4"}


def test_report_without_a_record_owns_nothing(two_experiments: Path) -> None:
    (two_experiments / "report/ff1/result.json").unlink()
    assert experiments(survey(two_experiments)).keys() == {"b"}


@pytest.mark.parametrize("name", ["data.bin", "config.json", "manifest.json", "provenance.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "delete"])
def test_every_damaged_file_is_named(two_experiments: Path, name: str, damage: str) -> None:
    item = survey(two_experiments)["fit/cc1"]
    assert faults(item) == []
    file = item.folder / name
    content = file.read_bytes()
    if damage == "delete":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(content[: len(content) // 2])
    else:
        place = content.index(b"1") if b"1" in content else 0
        file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    assert any(name in line for line in faults(item))


def test_file_that_is_in_no_manifest_is_named(two_experiments: Path) -> None:
    item = survey(two_experiments)["fit/cc1"]
    (item.folder / "more.bin").write_bytes(b"")
    assert [line for line in faults(item) if "more.bin" in line]


def test_what_another_process_has_asked_for_is_not_removed_before_it_ends(artifact_root: Path, start) -> None:
    many_files(1)
    process = start(run_number_and_stay, 1)
    deadline = time.monotonic() + 60
    while "stays" not in logged(artifact_root):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    stored = survey(artifact_root)
    used, free = number.artifact(ONE), many_files.artifact(1)
    assert not remove(stored[f"number/{used.fingerprint}"])
    assert is_done(used)
    assert remove(stored[f"many_files/{free.fingerprint}"])
    assert not folder(free).exists()

    process.kill()
    process.join()
    assert remove(stored[f"number/{used.fingerprint}"])
    assert not folder(used).exists()
    assert list((artifact_root / "number").iterdir()) == [], "no scratch folder stays"


def cpdiff(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "flows.cli", "cache", *arguments, "--root", str(root)],
        env=os.environ | {"PYTHONPATH": str(PROJECT)}, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip


def test_what_users_have_named_is_no_artifact_and_stays(two_experiments: Path) -> None:
    """Names of letters a to f and digits look like fingerprints; `cpdiff cache gc` removes what `survey` finds."""
    before = survey(two_experiments).keys()
    for name in ("adapters/beef", "generators/decade", "reruns/a1", "tensorboard/fade"):
        (two_experiments / name).mkdir(parents=True)
    assert survey(two_experiments).keys() == before


def test_cache_commands_as_a_user_calls_them(two_experiments: Path) -> None:
    lines = cpdiff(two_experiments, "ls").stdout.splitlines()
    assert [line.split()[:3] for line in lines[1:]] == [["a", "1", "5"], ["b", "1", "5"], ["(no", "report)", "0"]]

    (two_experiments / "fit/bb2/data.bin").write_bytes(b"")
    verified = cpdiff(two_experiments, "verify")
    assert verified.returncode == 1
    assert "fit/bb2/data.bin" in verified.stdout

    assert cpdiff(two_experiments, "rm", "a").stdout.splitlines()[-1] == "kept 1 artifacts that other experiments share"
    assert survey(two_experiments).keys() == {
        "harvest/aa1", "fit/bb2", "score_report/dd2", "score_selection/ee2", "report/ff2", "fit/cc1",
    }  # fmt: skip

    os.utime(two_experiments / "fit/cc1", (0, 0))
    assert "removed 1 artifacts" in cpdiff(two_experiments, "gc").stdout, "the others are younger than 14 days"
    assert "fit/cc1" not in survey(two_experiments)
    assert json.loads((two_experiments / "harvest/aa1/config.json").read_text())["stage"] == "harvest"
