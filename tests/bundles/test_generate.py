"""`cpdiff generate`: known tasks, tasks never seen, refusals, and the command line itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from peft import PeftModel
from prefect.settings import PREFECT_LOCAL_STORAGE_PATH, temporary_settings
from sklearn.linear_model import LogisticRegression
from tiny import sentences, write_jsonl
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from cpdiff_core.bundle import Generator, task_meant
from cpdiff_core.config import UserError
from cpdiff_core.delivery import AdapterRequest, deliver
from cpdiff_core.generator.conditions import OneHotCondition
from cpdiff_core.generators import copy_generator
from flows.generate import generate_adapters, generator_folder
from tasks.report import tally

EXAMPLES = ("w1 fine -> yes", "w2 cold -> no")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    texts, labels = sentences(24, seed=77)
    rows = [{"text": text, "label": label} for text, label in zip(texts, labels, strict=True)]
    return write_jsonl(tmp_path_factory.mktemp("users") / "mine.jsonl", rows)


class TaskWords(NamedTuple):
    name: str
    description: str


def request(bundled, **values) -> AdapterRequest:
    return AdapterRequest(**{"num": 4, "base": str(bundled.base.folder)} | values)


def run(bundled, out: Path, **values) -> tuple[list[str], dict]:
    lines = deliver(Generator.load(bundled.folder), request(bundled, **values), out, bundled.runtime)
    return lines, json.loads((out / "generation.json").read_text())


def accuracy(bundled, adapter: Path, data: Path) -> float:
    """By PEFT and transformers alone, in points."""
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    model = AutoModelForSequenceClassification.from_pretrained(bundled.base.folder, num_labels=2)
    model = PeftModel.from_pretrained(model, str(adapter)).eval()
    batch = AutoTokenizer.from_pretrained(bundled.base.folder)(
        [row["text"] for row in rows], padding=True, truncation=True, max_length=16, return_tensors="pt"
    )
    with torch.no_grad():
        predicted = model(**batch).logits.argmax(1).tolist()
    return 100 * float(np.mean([p == row["label"] for p, row in zip(predicted, rows, strict=True)]))


def test_known_task_chooses_the_best_candidate_on_the_users_data(bundled, data, tmp_path) -> None:
    _, summary = run(bundled, tmp_path / "out", task="left", examples=EXAMPLES, seed=5, select=str(data))
    folders = sorted((tmp_path / "out").glob("candidate-*"))
    assert len(folders) == 4
    scores = [accuracy(bundled, folder, data) for folder in folders]
    assert [item["scores"][0]["estimate"] for item in summary["candidates"]] == pytest.approx(scores)
    assert summary["chosen"] == folders[int(np.argmax(scores))].name
    assert not summary["unseen_condition"]
    assert summary["statistics"] == "left"
    assert "optimistic" in (tmp_path / "out" / summary["chosen"] / "README.md").read_text()


def test_unseen_task_gets_a_probe_and_is_compared_on_examples_that_its_heads_have_not_seen(
    bundled, data, tmp_path
) -> None:
    lines, summary = run(
        bundled, tmp_path / "out", task_info="Find the mood.", examples=EXAMPLES, few=str(data), labels=("bad", "good")
    )
    assert lines[0].startswith("UNSEEN CONDITION")
    assert summary["unseen_condition"]
    arms = {arm["arm"].split(",")[0].split(" on ")[0]: arm["estimate"] for arm in summary["arms"]}
    assert set(arms) == {"generated", "shuffled condition", "no-LoRA"} | {a for a in arms if a.startswith("adapter of")}
    card = (tmp_path / "out" / "candidate-0" / "README.md").read_text()
    assert "**Unseen condition.**" in card
    assert "bad, good" in card
    # The no-LoRA arm is a cross-validated linear probe; scikit-learn's on the same features comes close to it.
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    model = AutoModelForSequenceClassification.from_pretrained(bundled.base.folder, num_labels=2).bert.eval()
    batch = AutoTokenizer.from_pretrained(bundled.base.folder)(
        [row["text"] for row in rows], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        features = model(**batch).pooler_output.numpy()
    labels = np.array([row["label"] for row in rows])
    order = np.random.default_rng([42, 24]).permutation(24)
    right = 0
    for fold in np.array_split(order, 5):
        rest = np.setdiff1d(order, fold)
        probe = LogisticRegression(C=1 / (2 * 1e-3 * len(rest)), max_iter=1000).fit(features[rest], labels[rest])
        right += int((probe.predict(features[fold]) == labels[fold]).sum())
    assert arms["no-LoRA"] == pytest.approx(100 * right / 24, abs=100 / 24)


def test_unseen_regression_is_scored_by_rank_correlation(bundled, tmp_path) -> None:
    texts, labels = sentences(12, seed=5)
    rows = [{"text": text, "label": label + i / 10} for i, (text, label) in enumerate(zip(texts, labels, strict=True))]
    few = write_jsonl(tmp_path / "few.jsonl", rows)
    _, summary = run(
        bundled, tmp_path / "out", task_info="Rate the mood.", examples=EXAMPLES, few=str(few), regression=True, num=2
    )
    assert {arm["metric"] for arm in summary["arms"]} == {"spearmanr"}
    model = AutoModelForSequenceClassification.from_pretrained(bundled.base.folder, num_labels=1)
    loaded = PeftModel.from_pretrained(model, str(tmp_path / "out" / "candidate-1"))
    assert loaded.base_model.model.classifier.weight.shape == (1, 32)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"task_info": "Find the mood.", "examples": EXAMPLES}, r"never seen.*--few DATA with --labels.*--task "),
        ({"task_info": "Find it.", "examples": EXAMPLES, "few": "x.csv"}, r"--few DATA with --labels"),
        ({"task_info": "Find it.", "examples": EXAMPLES, "few": "nowhere.csv", "labels": ("a", "b")}, "does not exist"),
        ({"task_info": "Find it.", "examples": EXAMPLES, "few": "DATA", "labels": ("a",)}, "two names"),
        ({"task_info": "Say.", "examples": EXAMPLES, "few": "DATA", "labels": ("a", "b"), "regression": 1}, "one of"),
        ({"task": "left", "few": "DATA", "labels": ("a", "b")}, "--select"),
        ({"task_info": "Say.", "examples": EXAMPLES, "few": "DATA", "labels": ("no", "yes", "c")}, "no example of the class 'c'"),
        ({"task_info": "Say.", "examples": EXAMPLES, "few": "SAME", "regression": 1}, "--few: every target is 2"),
        ({"task": "left", "merge": True, "num": 1, "base": "~no-such-user/x"}, "base_model.name '~no-such-user/x': no such"),
        ({"task": "left", "merge": True}, "--merge"),
        ({"task": "left", "select": "DATA", "text_columns": ("words",)}, "has no column 'words'"),
        ({"task": "left", "select": "DATA", "text_columns": ("a", "b", "c")}, "--text-columns.*text_columns: .*at most 2"),
        ({"task": "left", "select": "DATA", "label_column": "text"}, "--label-column: .*'text' is among text_columns"),
        ({"task_info": "Say.", "examples": EXAMPLES, "few": "DATA", "labels": ("a", "")}, "--labels.*a blank name"),
    ],
)
def test_what_cannot_be_done_is_refused_with_the_reason(bundled, data, tmp_path, values, message) -> None:
    same = write_jsonl(tmp_path / "same.jsonl", [{"text": f"w{number}", "label": 2} for number in range(8)])
    files = {"DATA": str(data), "SAME": str(same)}
    values = {key: files.get(value, value) if isinstance(value, str) else value for key, value in values.items()}
    with pytest.raises(UserError, match=message):
        run(bundled, tmp_path / "out", **values)
    assert not (tmp_path / "out").exists()


def test_place_that_cannot_take_the_adapters_is_named(bundled, tmp_path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    for out, message in [
        (tmp_path / "full", "full': is not empty"),
        (tmp_path / "full" / "file", "file' is a file, not a folder"),
        (tmp_path / "full" / "file" / "below", "file' is a file, not a folder"),
        (Path("/proc/nowhere"), "--out '/proc/nowhere': cannot be written"),
        (tmp_path / ("x" * 300), "cannot be written \\(File name too long\\)"),
    ]:
        with pytest.raises(UserError, match=message):
            run(bundled, out, task="left")


def test_flow_and_command_line_write_the_same_adapters(bundled, data, tmp_path, artifact_root) -> None:
    generate_adapters(
        str(bundled.folder), request(bundled, task="right", num=2), str(tmp_path / "flow"), bundled.runtime
    )
    copy_generator(bundled.folder, tmp_path / "moved")
    command = [
        sys.executable, "-m", "flows.cli", "generate", str(tmp_path / "moved"), "--task-info", "The task right.",
        "--num", "2", "--out", str(tmp_path / "cli"), "--device", "cpu", "--base", str(bundled.base.folder),
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert "2 PEFT folders" in done.stdout
    for name in ("candidate-0", "candidate-1"):
        weights = [(tmp_path / kind / name / "adapter_model.safetensors").read_bytes() for kind in ("flow", "cli")]
        assert weights[0] == weights[1]
    with pytest.raises(UserError, match=r"--out .*not empty"):
        run(bundled, tmp_path / "cli", task="right")


def test_generator_of_an_experiment_comes_from_the_cache(bundled, tmp_path: Path) -> None:
    config = tmp_path / "tiny.json"
    config.write_text(bundled.experiment.model_dump_json())
    before, runtime = tally(), bundled.runtime.model_copy(update={"data_dir": str(bundled.data)})
    with temporary_settings({PREFECT_LOCAL_STORAGE_PATH: bundled.root}):
        assert Path(generator_folder(str(config), runtime)) == bundled.folder
    assert tally()["computed"] == before["computed"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"task": "sst2"}, "task 'sst2': is not among this generator's tasks: left, right"),
        ({}, "nothing says what the adapters are for; give --task with one of left, right"),
        ({"task_info": "Find the mood."}, "give --example 2 times"),
        ({"task_info": "Find it.", "examples": EXAMPLES}, r"--few DATA with --labels.*the known tasks are left, right"),
        ({"task": "left", "labels": ("a", "b")}, "use --select to choose"),
    ],
)
def test_a_request_that_an_experiment_cannot_serve_is_refused_before_anything_is_computed(
    bundled, tmp_path, artifact_root, values, message
) -> None:
    (tmp_path / "new.json").write_text(bundled.experiment.model_dump_json())
    before, runtime = tally(), bundled.runtime.model_copy(update={"data_dir": str(bundled.data)})
    with pytest.raises(UserError, match=message):
        generator_folder(str(tmp_path / "new.json"), runtime, request(bundled, **values))
    assert tally() == before


def test_a_condition_that_knows_no_texts_takes_no_other_words_for_a_task() -> None:
    tasks = [TaskWords("left", "The left."), TaskWords("right", "The right.")]
    assert task_meant("g", OneHotCondition(), tasks, "the  LEFT.", (), "left") == (tasks[0], True)
    with pytest.raises(UserError, match="knows no texts; leave --task-info out"):
        task_meant("g", OneHotCondition(), tasks, "Something else.", (), "left")
