"""The command line: what it prints, and one clear line for every fault of the user."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import typer
from cli_child import CommandLine, Outcome
from tiny import write_jsonl
from typer.testing import CliRunner

from cpdiff_core.experiments import EXPERIMENTS, ExperimentConfig
from cpdiff_core.style_experiments import STYLE_EXPERIMENTS
from flows.cli import app


def write(folder: Path, value: Any, name: str = "mine.json") -> str:
    path = folder / name
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return str(path)


def assert_fault(outcome: Outcome, *parts: str) -> None:
    assert outcome.code == 2, outcome.stderr
    assert len(outcome.errors) == 1, outcome.stderr
    assert outcome.stderr.splitlines()[-1] == outcome.errors[0], "nothing comes after it"
    assert "Traceback" not in outcome.stderr
    for part in parts:
        assert part in outcome.errors[0]


def ended(outcome: Outcome, word: str) -> list[str]:
    return [line for line in outcome.stderr.splitlines() if line.startswith(f"{word} ")]


def test_list_names_every_experiment(cli: CommandLine) -> None:
    outcome = cli.run("list", "--all")
    assert outcome.code == 0
    assert [line.split()[0] for line in outcome.stdout.splitlines()] == [*EXPERIMENTS, *STYLE_EXPERIMENTS]
    short = [line.split()[0] for line in cli.run("list").stdout.splitlines()]
    assert {"quickstart", "quickstart-style", "glue6/minilm-r1", "table3/minilm-n500"} <= set(short)
    assert not [name for name in short if "bert" in name or name.startswith("results/")]


def test_help_shows_every_word_of_every_option() -> None:
    def letters(text: str) -> str:
        return "".join(re.findall(r"[^\s│]", text))

    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        shown = letters(CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "500"}).stdout)
        for parameter in command.params:
            assert letters(getattr(parameter, "help", None) or "") in shown, (name, parameter.name)


def test_show_prints_json_that_run_accepts(cli: CommandLine, tmp_path: Path) -> None:
    outcome = cli.run("show", "quickstart")
    assert outcome.code == 0
    assert ExperimentConfig.model_validate_json(outcome.stdout) == EXPERIMENTS["quickstart"]
    (tmp_path / "copy.json").write_text(outcome.stdout)
    assert cli.run("show", "copy.json").stdout == outcome.stdout


def test_unknown_experiment_names_the_nearest(cli: CommandLine) -> None:
    assert_fault(cli.run("run", "quikstart"), "'quikstart'", "nearest: quickstart", "cpdiff list")
    assert_fault(cli.run("show", "glue6/minilm"), "glue6/minilm-r1")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ('{"name": "x",\n "tasks": [}', ("mine.json", "line 2", "is not JSON")),
        ("[1]", ("must hold one JSON object", "cpdiff show quickstart")),
        ("\x00\xff", ("mine.json", "is not JSON")),
        ('{"tasks": []}', ("tasks", "at least 1 item")),
        ('\ufeff{"tasks": []}', ("tasks", "at least 1 item")),
        ('{"tasks": [], "seed": 1, "seed": 2}', ("the field 'seed' occurs twice",)),
        ('{"taks": []}', ("taks (value []): unknown field; nearest: tasks",)),
    ],
)
def test_malformed_file_is_named_with_its_line(cli: CommandLine, tmp_path: Path, text: str, parts) -> None:
    assert_fault(cli.run("run", write(tmp_path, text)), *parts)


def test_missing_file_is_named(cli: CommandLine) -> None:
    assert_fault(cli.run("run", "nowhere.json"), "'nowhere.json'", "No such file", "check the path")


def changed(values: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy of an experiment with the field at `path` (dots between names, numbers for places) set."""
    copy = json.loads(json.dumps(values))
    at = copy
    *parents, last = (int(part) if part.isdigit() else part for part in path.split("."))
    for part in parents:
        at = at[part] if isinstance(part, int) else at.setdefault(part, {})
    at[last] = value
    return copy


FIELDS = {
    "truth for a number": ("fine_tune.learning_rate", True, ("fine_tune: learning_rate holds true or false where a number",)),
    "truth among numbers": ("diffusion.unet.multipliers", [1, True], ("multipliers holds true or false where a number",)),
    "unknown field": ("learning_rte", 0.1, ("learning_rte", "unknown field; check its name")),
    "misspelt field": ("fine_tune.lerning_rate", 0.1, ("fine_tune.lerning_rate", "unknown field; nearest: learning_rate")),
    "misspelt field of a kind": ("autoencoder.training.stps", 1, ("autoencoder.conv.training.stps", "nearest: steps")),
    "misspelt field of a task": ("tasks.1.text_column", ["text"], ("tasks.1.text_column", "nearest: text_columns")),
    "condition of styles": ("condition", {"kind": "style_image"}, ("condition.kind 'style_image': is for styles",)),
    "rank 0": ("lora.rank", 0, ("lora.rank", "value 0", "greater than or equal to 1")),
    "rank as text": ("lora.rank", "one", ("lora.rank", "'one'", "valid integer")),
    "harvest": ("fine_tune.num_harvest", 9, ("fine_tune", "num_harvest 9", "num_steps is 8", "raise num_steps")),
    "checkpoints": ("num_checkpoints", 6, ("num_checkpoints 6", "num_harvest 5", "harvest more or use fewer")),
    "task named as the last row": ("tasks.1.name", "average", ("the name 'average' is that of the tables' last row",)),
    "task twice": ("tasks.1.name", "left", ("'left' occurs twice",)),
    "metric": ("tasks.0.metrics", ["accuracy", "bleu"], ("tasks.0.metrics.1", "'bleu'", "accuracy")),
    "kind missing": ("autoencoder", {}, ("autoencoder", 'needs "kind"')),
    "kind unknown": ("condition.kind", "psychic", ("condition", "'psychic'", "one_hot")),
}


@pytest.mark.parametrize("fault", FIELDS)
def test_wrong_field_is_named_with_its_value(cli: CommandLine, tmp_path: Path, tiny_values, fault: str) -> None:
    path, value, parts = FIELDS[fault]
    assert_fault(cli.run("run", write(tmp_path, changed(tiny_values, path, value))), "mine.json", *parts)


def test_missing_models_and_data_are_named_in_seconds(cli: CommandLine, tmp_path: Path, tiny_values) -> None:
    for name, parts in (
        ("/no/such/folder", ("base_model.name '/no/such/folder'", "no such folder")),
        ("bert-base", ("google-bert/bert-base-uncased", "HF_HUB_OFFLINE=1", "minilm-l6")),
        ("nobody/nothing", ("base_model.name 'nobody/nothing'", "give a local folder")),
    ):
        outcome = cli.run("run", write(tmp_path, changed(tiny_values, "base_model.name", name)), "--data-dir", "data")
        assert_fault(outcome, *parts)
        assert outcome.seconds < 10, "the hub is asked for 4 seconds at most; the rest is a busy machine"
    assert_fault(cli.run("run", write(tmp_path, tiny_values)), "left-train.jsonl", "does not exist", "--data-dir")
    hub = changed(tiny_values, "tasks.0.data", {"kind": "hub", "dataset": "nobody/nothing"})
    assert_fault(
        cli.run("run", write(tmp_path, hub), "--data-dir", "data"), "dataset 'nobody/nothing'", "--data-dir DIR"
    )


def test_hub_that_cannot_be_reached_is_said_within_seconds(cli: CommandLine, tmp_path: Path, tiny_values) -> None:
    """Online as far as the settings go, with a hub address where nobody listens."""
    hub = write(tmp_path, changed(tiny_values, "base_model.name", "nobody/nothing"))
    data = write(tmp_path, changed(tiny_values, "tasks.0.data", {"kind": "hub", "dataset": "nobody/nothing"}), "data.json")
    outcome = cli.run("run", data, "--data-dir", "data", HF_HUB_OFFLINE="0", HF_ENDPOINT="http://127.0.0.1:9")
    assert_fault(outcome, "dataset 'nobody/nothing'", "--data-dir DIR")
    outcome = cli.run("run", hub, HF_HUB_OFFLINE="0", HF_ENDPOINT="http://127.0.0.1:9")
    assert_fault(outcome, "base_model.name 'nobody/nothing'", "minilm-l6")
    assert outcome.seconds < 10, "the hub is asked for 4 seconds at most; the rest is a busy machine"


def test_unusable_root_and_device_are_named(cli: CommandLine, tmp_path: Path, tiny_values) -> None:
    file = write(tmp_path, tiny_values)
    assert_fault(cli.run("run", file, "--root", "/proc/nowhere"), "root '/proc/nowhere'", "--root")
    assert_fault(cli.run("run", file, "--device", "abacus"), "--device 'abacus'", "use auto, cpu, cuda")
    assert_fault(cli.run("run", file, "--device", "cuda:99"), "--device 'cuda:99'")


def test_root_below_a_home_that_is_not_there_is_named(cli: CommandLine, tmp_path: Path, tiny_values) -> None:
    file = write(tmp_path, tiny_values)
    assert_fault(cli.run("run", file, "--root", "~no-such-user/x"), "root '~no-such-user/x'", "no such home folder", "--root")


def test_bad_label_found_in_the_flow_is_one_line(cli: CommandLine, tmp_path: Path, tiny_values) -> None:
    write_jsonl(tmp_path / "data" / "right-train.jsonl", [{"text": "w1", "label": 7}] * 30)
    outcome = cli.run("run", write(tmp_path, tiny_values), "--data-dir", "data", "--device", "cpu")
    assert_fault(
        outcome, "task 'right'", "right-train.jsonl row 0", "label 7 is out of range", "0 to 1 or one of no, yes"
    )


def test_fault_of_validation_data_is_told_before_anything_is_computed(cli: CommandLine, tmp_path: Path, tiny_values) -> None:
    write_jsonl(tmp_path / "data" / "right-validation.jsonl", [{"text": "w1", "gold": 0}] * 30)
    outcome = cli.run("run", write(tmp_path, tiny_values), "--data-dir", "data", "--device", "cpu")
    assert_fault(outcome, "task 'right'", "right-validation.jsonl has no column 'label'; it has text, gold")
    assert ended(outcome, "Completed") == []


def test_odd_data_is_told_at_once_and_under_the_table(cli: CommandLine, tmp_path: Path, tiny_values) -> None:
    one = [{"text": f"w{number % 40}", "label": "yes"} for number in range(30)]
    for part in ("train", "validation"):
        write_jsonl(tmp_path / "data" / f"right-{part}.jsonl", one)
    tiny_values["tasks"][0]["labels"] = ["no", "yes", "perhaps"]
    outcome = cli.run("run", write(tmp_path, tiny_values), "--data-dir", "data", "--device", "cpu")
    assert outcome.code == 0, outcome.stderr
    for line in (
        "WARNING: task 'left': no training example is 'perhaps'; that is never learned",
        "WARNING: task 'right': all 27 training labels are 'yes'; there is nothing to learn",
        "WARNING: task 'right': 30 of 30 validation examples stand in the training data too",
    ):
        assert line in outcome.stderr
        assert line in outcome.stdout
    assert outcome.stderr.index("WARNING") < outcome.stderr.index("Completed")


def test_loss_that_is_not_finite_is_one_line(cli: CommandLine, tmp_path: Path, tiny_values) -> None:
    wild = changed(tiny_values, "fine_tune", tiny_values["fine_tune"] | {"learning_rate": 1e9, "max_grad_norm": 1e9})
    wild = changed(wild, "fine_tune.num_steps", 40)
    outcome = cli.run("run", write(tmp_path, wild), "--data-dir", "data", "--device", "cpu")
    assert_fault(outcome, "is not finite at step", "lower fine_tune.learning_rate (now 1e+09)")


def test_altered_and_truncated_artifacts_name_the_stage(cli: CommandLine, tmp_path: Path, tiny_values) -> None:
    command = ("run", write(tmp_path, tiny_values), "--data-dir", "data", "--device", "cpu")
    first = cli.run(*command)
    assert first.code == 0
    shutil.rmtree(tmp_path / "root" / "report")
    file = next((tmp_path / "root" / "score_report").glob("*/outputs.safetensors"))
    whole = file.read_bytes()
    file.write_bytes(whole[:-4] + b"\x00\x00\x80\x3f")
    assert_fault(
        cli.run(*command), "outputs.safetensors", "truncated or altered", "stage 'score_report' will be recomputed"
    )
    file.write_bytes(whole[:100])
    assert_fault(cli.run(*command), "truncated or altered", str(file.parent))
    shutil.rmtree(file.parent)
    outcome = cli.run(*command)
    assert outcome.code == 0, "the remedy helps"
    computed = [line.split()[1] for line in ended(outcome, "Completed")]
    assert sorted(computed) == ["report", "score_report"], "the damaged one and the report"
    assert len(ended(outcome, "Cached")) >= len(ended(first, "Completed")) - 2
    for name in ("summary.txt", "results.csv"):  # what is shown of a report that is Cached
        file = next((tmp_path / "root" / "report").glob(f"*/{name}"))
        whole = file.read_bytes()
        file.write_bytes(whole[:-2] + b"9\n")
        assert_fault(cli.run(*command), name, "truncated or altered", "stage 'report' will be recomputed")
        file.write_bytes(whole)
    assert cli.run(*command).code == 0


def test_server_that_does_not_answer_is_one_line(cli: CommandLine, tmp_path: Path, tiny_values) -> None:
    file = write(tmp_path, tiny_values)
    outcome = cli.run("run", file, "--data-dir", "data", PREFECT_API_URL="http://127.0.0.1:9/api")
    assert_fault(outcome, "PREFECT_API_URL 'http://127.0.0.1:9/api/'", "(", "); start the server", "or unset it")


def test_interrupt_before_the_first_stage_says_how_to_go_on(cli: CommandLine, tmp_path: Path) -> None:
    process = cli.start("table", "table3", "--excerpt")
    deadline = time.monotonic() + 60
    while not (tmp_path / "stderr").is_file() or "root " not in (tmp_path / "stderr").read_text(encoding="utf-8"):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    outcome = cli.outcome(process)
    assert outcome.code == 130, outcome.stderr
    assert outcome.stderr.splitlines()[-1] == "interrupted; run the same command again to go on"
    assert "Traceback" not in outcome.stderr


def test_printing_into_a_full_disk_is_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "flows.cli", "show", "quickstart"]
    with open("/dev/full", "w", encoding="utf-8") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False, timeout=100)
    assert done.returncode != 0
    assert "error: what is printed: cannot be written (No space left on device)" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_run_says_how_to_go_on(cli: CommandLine, tmp_path: Path, tiny_values, sent: signal.Signals) -> None:
    long = changed(tiny_values, "fine_tune.num_steps", 100_000)
    process = cli.start("run", write(tmp_path, long), "--data-dir", "data", "--device", "cpu")
    deadline = time.monotonic() + 60
    while not any((tmp_path / "root").glob(".locks/harvest_checkpoints*")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.5)
    assert process.pid is not None
    os.kill(process.pid, sent)
    process.join(60)
    outcome = cli.outcome(process)
    assert outcome.code == 128 + sent, outcome.stderr
    assert outcome.stderr.splitlines()[-1] == "interrupted; run the same command again to go on"
    assert "Traceback" not in outcome.stderr
