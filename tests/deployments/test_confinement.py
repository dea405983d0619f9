"""Names and paths from a form stay below the root and the data folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from prefect.settings import PREFECT_LOCAL_STORAGE_PATH, temporary_settings

from cpdiff_core.config import UserError
from cpdiff_core.experiments import QUICKSTART
from deployments.confinement import (
    check_experiment,
    check_model,
    data_dir,
    data_file,
    generator,
    named_folder,
    runtime,
    worker_root,
)
from tasks.environment import ROOT_VARIABLE


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "/etc", "a/b", "a\\b", "~", ".hidden", "a\0b", "a\n", "link"])
def test_names_that_lead_out_are_refused(tmp_path: Path, name: str) -> None:
    parent = tmp_path / "root"
    parent.mkdir()
    (parent / "link").symlink_to("/etc")
    with pytest.raises(UserError, match=r"^name .*must be a plain name"):
        named_folder(parent, "name", name)


@given(st.text(max_size=20))
def test_no_text_leads_out(name: str) -> None:
    parent = Path("/nowhere/root")
    try:
        folder = named_folder(parent, "name", name)
    except UserError:
        return
    assert folder.parent == parent
    assert folder.resolve().parent == parent


@pytest.mark.parametrize("name", ["../secret.csv", "/etc/passwd", "sub/../../secret.csv", "link.csv"])
def test_files_outside_the_data_folder_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "link.csv").symlink_to(tmp_path / "secret.csv")
    monkeypatch.setenv("CPDIFF_DATA_DIR", str(data))
    with pytest.raises(UserError, match="must lie below CPDIFF_DATA_DIR"):
        data_file("request.select", name)
    (data / "sub").mkdir()
    (data / "sub/mine.csv").touch()
    assert data_file("request.select", "sub/mine.csv") == data / "sub/mine.csv"
    monkeypatch.delenv("CPDIFF_DATA_DIR")
    with pytest.raises(UserError, match="offers no files"):
        data_file("request.select", "mine.csv")


@pytest.mark.parametrize("name", ["mine.csv", "", ".", "ü/ü", "a\0b", "a" * 5000])
def test_files_that_are_not_there_are_told_with_their_field(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("CPDIFF_DATA_DIR", str(tmp_path))
    with pytest.raises(UserError, match=r"^request\.few .*is no file below CPDIFF_DATA_DIR of the worker, '/.*'$"):
        data_file("request.few", name)


def test_a_device_that_is_not_there_is_told_before_anything_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv(ROOT_VARIABLE, str(tmp_path))
    with temporary_settings({PREFECT_LOCAL_STORAGE_PATH: tmp_path}):
        assert runtime("cpu", 2).device == "cpu"
        with pytest.raises(UserError, match=r"--device 'cuda': torch sees no CUDA device here; use cpu"):
            runtime("cuda", None)


@pytest.mark.parametrize("name", ["/models/mine", "../mine", "a/b/c", "~/mine", ".", "tests"])
def test_local_models_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    (tmp_path / "tests").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="a known name or a hub id"):
        check_model("base_model.name", name)


def test_generator_is_an_experiment_a_builtin_or_a_folder_below_generators(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    assert generator(tmp_path, "glue6/minilm-r1", ["glue6/minilm-r1"]) == "glue6/minilm-r1"
    assert generator(tmp_path, "builtin/x", []) == "builtin/x"
    assert generator(tmp_path, "mine", []) == str(tmp_path / "mine")
    for name, message in (("other", "is no experiment"), ("../mine", "plain name"), ("builtin/../x", "plain name")):
        with pytest.raises(UserError, match=message):
            generator(tmp_path, name, ["quickstart"])


def test_whole_configurations_are_checked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CPDIFF_DATA_DIR", str(tmp_path))
    check_experiment(QUICKSTART)
    values: dict[str, Any] = QUICKSTART.model_dump(mode="json")
    (tmp_path / "a.csv").touch()
    values["tasks"][0]["data"] = {"kind": "files", "train": "a.csv", "validation": "../b.csv"}
    with pytest.raises(UserError, match=r"tasks\.sst2\.data\.validation"):
        check_experiment(type(QUICKSTART).model_validate(values))


@pytest.mark.parametrize(("value", "fault"), [(None, "is not set where"), ("here", "is relative"), ("", "is not set")])
def test_a_root_that_would_not_outlive_the_run_is_refused(monkeypatch: pytest.MonkeyPatch, value: str | None, fault: str) -> None:
    monkeypatch.delenv(ROOT_VARIABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(ROOT_VARIABLE, value)
    with pytest.raises(UserError, match=rf"^{ROOT_VARIABLE}.*{fault}.*start the worker with"):
        worker_root()


def test_a_root_that_cannot_be_written_is_told_before_anything_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv(ROOT_VARIABLE, str(file / "root"))
    with (
        temporary_settings({PREFECT_LOCAL_STORAGE_PATH: file / "root"}),
        pytest.raises(UserError, match=r"root .*cannot be used"),
    ):
        worker_root()


def test_data_folder_is_absolute_or_below_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("CPDIFF_DATA_DIR", "~/data")
    assert data_dir() == Path("/home/somebody/data")
    monkeypatch.setenv("CPDIFF_DATA_DIR", "data")
    with pytest.raises(UserError, match=r"^CPDIFF_DATA_DIR 'data': is relative"):
        data_dir()
