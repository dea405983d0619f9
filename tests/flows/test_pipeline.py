"""The whole method through the real flow, at a size for tests: what it leaves, what it computes again, and when."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from cli_child import CommandLine
from prefect.client.orchestration import get_client
from prefect.client.schemas.sorting import FlowRunSort
from safetensors.torch import load_file
from tiny import sentences, write_jsonl

from cpdiff_core.artifacts import MANIFEST, verify
from cpdiff_core.config import RuntimeConfig
from cpdiff_core.evaluation.scores import ReportArtifact, load_report_scores, load_selection_scores
from cpdiff_core.evaluation.selection import select
from cpdiff_core.experiments import ExperimentConfig

PROJECT = Path(__file__).resolve().parents[2]


class Runner:
    """Runs experiments in this process and tells which stages were computed and which came from the cache."""

    def __init__(self, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.runtime = RuntimeConfig(device="cpu", progress=False, data_dir=str(data))
        self._capsys = capsys

    def __call__(self, values: dict[str, Any], **runtime: Any) -> tuple[Path, list[str], list[str]]:
        from flows.pipeline import run_experiment

        self._capsys.readouterr()
        config = RuntimeConfig.model_validate(self.runtime.model_dump() | runtime)
        report = Path(run_experiment(ExperimentConfig.model_validate(values), config))
        lines = [line.split(maxsplit=1) for line in self._capsys.readouterr().err.splitlines()]
        computed = [" ".join(rest[0].split()[:-2]) for word, *rest in filter(None, lines) if word == "Completed"]
        cached = [rest[0].strip() for word, *rest in filter(None, lines) if word == "Cached"]
        return report, computed, cached


@pytest.fixture
def run(artifact_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Runner:
    return Runner(tmp_path / "data", capsys)


def artifacts(root: Path) -> dict[str, Path]:
    return {str(path.parent.relative_to(root)): path.parent for path in sorted(root.glob(f"*/*/{MANIFEST}"))}


def test_whole_run_leaves_every_artifact_and_the_second_run_computes_nothing(
    run: Runner, artifact_root: Path, tiny_values: dict[str, Any]
) -> None:
    report, computed, cached = run(tiny_values)
    assert set(cached) <= set(computed), "nothing was there before"
    with get_client(sync_client=True) as client:
        (latest,) = client.read_flow_runs(sort=FlowRunSort.START_TIME_DESC, limit=1)
    assert latest.name == tiny_values["name"]
    stages = {path.split("/")[0] for path in artifacts(artifact_root)}
    assert stages >= {
        "fit_head", "harvest_checkpoints", "fit_normalization", "fit_autoencoder", "encode_conditions", "fit_diffusion",
        "generate_candidates", "score_selection", "score_report", "report",
    }  # fmt: skip
    assert [fault for path in artifacts(artifact_root).values() for fault in verify(path)] == []
    assert not list((artifact_root / ".resume").glob("*/*")), "finished stages leave no resume state"

    costs = [json.loads(path.read_text()) for path in artifact_root.glob("harvest_checkpoints/*/provenance.json")]
    assert [cost["group_runs"] for cost in costs] == [2, 2], "both tasks trained in one pass"
    assert sum(cost["seconds"] for cost in costs) == pytest.approx(costs[0]["group_seconds"], abs=0.01)
    assert costs[0]["seconds"] > 0.01, "a run's share of the pass, not the moment of its commit"

    table = pd.read_csv(report.parent / "results.csv")
    assert set(table["task"]) == {"left", "right", "average"}
    assert set(table["arm"]) >= {"no-LoRA", "original (oracle)", "original (selected)", "model soup", "generated"}
    assert (table["low"] <= table["estimate"]).all()
    assert (table["estimate"] <= table["high"]).all()
    oracle, chosen = (
        table[table["arm"] == f"original ({kind})"].set_index("task")["estimate"] for kind in ("oracle", "selected")
    )
    assert (oracle >= chosen).all(), "nobody chooses better than by looking"
    page = report.read_text(encoding="utf-8")
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page

    again, computed, cached = run(tiny_values)
    assert again == report
    assert computed == []
    assert len(cached) > 20
    _, computed, _ = run(tiny_values, adapters_per_batch=1, tokens_per_batch=64, num_threads=1)
    assert computed == [], "runtime settings are not in the key"


def test_changed_task_runs_again_with_what_depends_on_it_and_nothing_else(
    run: Runner, tmp_path: Path, tiny_values: dict[str, Any]
) -> None:
    _, before, _ = run(tiny_values)
    texts, labels = sentences(60, 77)
    rows = [{"text": text, "label": label} for text, label in zip(texts, labels, strict=True)]
    write_jsonl(tmp_path / "data" / "right-train.jsonl", rows)
    _, computed, cached = run(tiny_values)
    own_to_left = {
        "fit_head left",
        "harvest_checkpoints left run 0",
        "score_report left zeros",
        "score_report left soup",
    }
    assert own_to_left <= set(cached)
    assert not own_to_left & set(computed)
    again = {"fit_head right", "harvest_checkpoints right run 0", "fit_autoencoder conv", "fit_diffusion one_hot", "report tiny"}
    again |= {f"generate_candidates {task}" for task in ("left", "right")}
    assert again <= set(computed)
    assert set(computed) | set(cached) == set(before)

    _, computed, _ = run(tiny_values | {"sampling": {"num_inference_steps": 2, "num_candidates": 3}})
    assert not {name.split()[0] for name in computed} & {
        "fit_head", "harvest_checkpoints", "fit_normalization", "fit_autoencoder", "encode_conditions", "fit_diffusion"
    }, "another sampler asks for no training"  # fmt: skip


def test_other_words_for_a_task_make_another_generator_and_no_other_adapters(
    run: Runner, tiny_values: dict[str, Any]
) -> None:
    left, right = tiny_values["tasks"]
    told = tiny_values | {"condition": {"kind": "task_info"}}
    run(told)
    _, computed, _ = run(told | {"tasks": [left, right | {"description": "The same task in other words."}]})
    stages = {name.split()[0] for name in computed}
    assert stages >= {"encode_conditions", "fit_diffusion", "generate_candidates", "report"}
    assert not stages & {"fit_head", "harvest_checkpoints", "fit_normalization", "fit_autoencoder"}
    assert {name.split()[2] for name in computed if name.startswith("score_")} == {"candidates"}


def test_moved_data_and_model_change_nothing(run: Runner, tmp_path: Path, tiny_values: dict[str, Any]) -> None:
    run(tiny_values)
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    shutil.copytree(tiny_values["base_model"]["name"], tmp_path / "bert")
    moved = tiny_values | {"base_model": {"name": str(tmp_path / "bert")}}
    _, computed, _ = run(moved, data_dir=str(tmp_path / "elsewhere"))
    assert [name for name in computed if not name.startswith("report")] == []


def test_two_roots_hold_bit_identical_tensors_configs_and_scores(
    run: Runner, artifact_root: Path, tmp_path: Path, tiny_values: dict[str, Any]
) -> None:
    from prefect.settings import PREFECT_LOCAL_STORAGE_PATH, temporary_settings

    tiny_values["lora"] = {"lora_dropout": 0.1}
    run(tiny_values)
    second = tmp_path / "second"
    with temporary_settings({PREFECT_LOCAL_STORAGE_PATH: second}):
        run(tiny_values)
    assert artifacts(artifact_root).keys() == artifacts(second).keys()
    compared = 0
    for name, folder in artifacts(artifact_root).items():
        for file in json.loads((folder / MANIFEST).read_text()):
            if file == "facts.json":  # the report's copy of provenance: commit and cost may differ, the findings may not
                mine, theirs = (json.loads((path / file).read_text()) for path in (folder, second / name))
                assert all(values.pop(part) for values in (mine, theirs) for part in ("cost", "spending"))
                assert mine == theirs, f"{name}/{file}"
            elif file.endswith((".safetensors", ".json", ".csv")):
                assert (folder / file).read_bytes() == (second / name / file).read_bytes(), f"{name}/{file}"
                compared += 1
    assert compared > 40


def test_runs_trained_alone_agree_with_runs_trained_together(
    run: Runner, artifact_root: Path, tmp_path: Path, tiny_values: dict[str, Any]
) -> None:
    from prefect.settings import PREFECT_LOCAL_STORAGE_PATH, temporary_settings

    run(tiny_values)
    second = tmp_path / "second"
    with temporary_settings({PREFECT_LOCAL_STORAGE_PATH: second}):
        run(tiny_values, adapters_per_batch=1)
    together = {p.parent.name: load_file(p)["w_NK"] for p in artifact_root.glob("harvest_checkpoints/*/*.safetensors")}
    assert len(together) == 2
    for name, w_NK in together.items():
        alone = load_file(second / "harvest_checkpoints" / name / "checkpoints.safetensors")["w_NK"]
        torch.testing.assert_close(alone, w_NK, atol=1e-5, rtol=1e-4)


def artifacts_named_in(value: Any) -> set[str]:
    """The stages of all artifacts inside a config."""
    if isinstance(value, list):
        return set().union(*map(artifacts_named_in, value))
    if not isinstance(value, dict):
        return set()
    own = {value["stage"]} if {"stage", "fingerprint"} <= value.keys() else set()
    return own.union(*map(artifacts_named_in, value.values()))


def test_report_scores_do_not_depend_on_the_choice_and_choosing_refuses_them(
    run: Runner, artifact_root: Path, tiny_values: dict[str, Any]
) -> None:
    run(tiny_values)
    experiment = ExperimentConfig.model_validate(tiny_values)
    task = experiment.tasks[0]
    reports = list(artifact_root.glob("score_report/*/config.json"))
    assert reports
    for file in reports:
        assert "score_selection" not in artifacts_named_in(json.loads(file.read_text())), (
            "no choice is among its inputs"
        )
    left = next(f for f in reports if json.loads((f.parent / "scores.json").read_text())["task"] == "left").parent
    artifact = ReportArtifact(fingerprint=left.name)
    scores = load_report_scores(artifact, artifact_root, task)
    with pytest.raises(TypeError, match=r"select chooses by SelectionScores only and was given ReportScores"):
        select(scores)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"choosing takes scores on the selection split, not ReportArtifact"):
        load_selection_scores(artifact, artifact_root, task, experiment.splits)  # type: ignore[arg-type]


def test_several_runs_per_task_make_a_zoo(run: Runner, artifact_root: Path, tiny_values: dict[str, Any]) -> None:
    _, computed, _ = run(tiny_values | {"num_runs": 2})
    assert {name for name in computed if name.startswith("harvest")} == {
        f"harvest_checkpoints {task} run {number}" for task in ("left", "right") for number in (0, 1)
    }
    _, computed, _ = run(tiny_values | {"num_runs": 3})
    assert {name for name in computed if name.startswith("harvest")} == {
        f"harvest_checkpoints {task} run 2" for task in ("left", "right")
    }, "a zoo grows by what is missing"


def test_kill_in_the_middle_of_a_harvest_group_changes_no_bit(
    cli: CommandLine, tmp_path: Path, tiny_values: dict[str, Any]
) -> None:
    tiny_values["fine_tune"] |= {"num_steps": 200, "num_harvest": 5}
    runtime = {"data_dir": "data", "device": "cpu", "progress": False}
    root = tmp_path / "root"
    killed = cli.start_flow(tiny_values, **runtime, resume_seconds=0.1)
    deadline = time.monotonic() + 60
    while not list(root.glob(".resume/harvest_group/*/state.safetensors")):
        assert time.monotonic() < deadline
        assert killed.is_alive()
        time.sleep(0.002)
    time.sleep(0.05)
    killed.kill()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    assert not list(root.glob("harvest_checkpoints/*/result.json")), "it was killed before the end"
    for attempt in (root, tmp_path / "undisturbed"):
        cli.environment["PREFECT_LOCAL_STORAGE_PATH"] = str(attempt)
        process = cli.start_flow(tiny_values, **runtime)
        process.join(120)
        assert process.exitcode == 0
    harvests = sorted(root.glob("harvest_checkpoints/*/checkpoints.safetensors"))
    assert len(harvests) == 2
    for file in harvests:
        assert file.read_bytes() == (tmp_path / "undisturbed" / file.relative_to(root)).read_bytes()


# Runs in every Python process of the test before anything else: an outside connection is an error, and written down.
BLOCKED = """
import os, sys

def hook(event, arguments):
    if event == "socket.connect" and isinstance(arguments[1], tuple):
        host = arguments[1][0]
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        host = arguments[0]
    else:
        return
    if host not in ("127.0.0.1", "::1", "localhost", None):
        with open(os.environ["HOSTS_FILE"], "a") as file:
            file.write(f"{host}\\n")
        raise OSError(101, "the network is blocked")

sys.addaudithook(hook)
"""


def write_csv(path: Path, num: int, seed: int) -> None:
    texts, labels = sentences(num, seed)
    pd.DataFrame({"review": texts, "stars": [("bad", "good")[label] for label in labels]}).to_csv(path, index=False)


def isolated(command: list[str]) -> list[str]:
    """The command in a network of its own, with nothing but loopback, where the machine permits that."""
    wrapped = ["unshare", "-rn", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
    try:
        permitted = subprocess.run([*wrapped, "true"], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        permitted = False
    return [*wrapped, *command] if permitted else command


def readme_example() -> dict[str, Any]:
    """The task of one's own that README.md shows."""
    text = (PROJECT / "README.md").read_text(encoding="utf-8")
    value: dict[str, Any] = json.loads(text.split("```json\n")[1].split("```")[0])
    return value


def test_own_csv_task_from_a_json_file_with_the_network_blocked(tmp_path: Path) -> None:
    """README's example as a user starts it: embedded base model, a server of its own, nothing but loopback."""
    values = readme_example()
    (task,) = values["tasks"]
    assert task["data"]["kind"] == "files"
    for number, part in enumerate(("train", "validation")):
        write_csv(tmp_path / task["data"][part], 60, 11 + number)
    # Smaller, so that it takes seconds; everything else is as printed.
    values["fine_tune"] = values.get("fine_tune", {}) | {"num_steps": 4, "batch_size": 2, "num_harvest": 3}
    values |= {
        "num_checkpoints": 3, "splits": {"max_selection": 4, "max_report": 8}, "head": {"max_examples": 16},
        "autoencoder": {"kind": "conv", "channels": 8, "length": 16, "training": {"steps": 2}},
        "diffusion": {"kind": "diffusion", "unet": {"width": 16, "multipliers": [1, 2]}, "training": {"steps": 2}},
        "sampling": {"num_inference_steps": 2, "num_candidates": 2},
    }  # fmt: skip
    (tmp_path / "my.json").write_text(json.dumps(values))
    (tmp_path / "sitecustomize.py").write_text(BLOCKED)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT", "HF_", "DO_NOT"))}
    environment = kept | {
        "HOME": str(tmp_path), "PYTHONPATH": f"{tmp_path}:{PROJECT}", "HOSTS_FILE": str(tmp_path / "hosts"),
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [sys.executable, "-m", "flows.cli", "run", "my.json", "--root", "here", "--device", "cpu"]
    control = [sys.executable, "-c", "import socket; socket.create_connection(('203.0.113.1', 9), 1)"]
    done = subprocess.run(control, cwd=tmp_path, env=environment, capture_output=True, check=False)
    assert done.returncode == 1
    assert (tmp_path / "hosts").read_text() == "203.0.113.1\n", "an outside connection would be noticed"
    (tmp_path / "hosts").unlink()

    done = subprocess.run(
        isolated(command), cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "hosts").exists(), "nobody outside was spoken to"
    report = Path(done.stdout.splitlines()[-1].removeprefix("report: "))
    assert report.is_relative_to(tmp_path / "here")
    assert report.is_file()
    assert task["name"] in done.stdout
    assert "accuracy" in done.stdout
