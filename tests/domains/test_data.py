"""Reading, checking and splitting examples; identity by content; every bad file is one clear line."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from tiny import save_model, write_jsonl

from cpdiff_core.config import UserError, fingerprint
from cpdiff_core.domains.base_models import BaseModelConfig, load_tokenizer, resolve_base_model
from cpdiff_core.domains.glue.data import (
    EXCERPT_FOLDER,
    SplitConfig,
    examples_of,
    read_examples,
    resolve_task,
    split_rows,
    tokenize,
)
from cpdiff_core.domains.glue.data_checks import remarks
from cpdiff_core.domains.glue.text_tasks import FileData, GlueData, HubData, TextTask, excerpt

ROWS: list[dict[str, Any]] = [{"text": f'sentence {i}, with a "quote" and a comma', "label": i % 2} for i in range(20)]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    frame = pd.DataFrame(rows)
    if path.suffix == ".csv":
        frame.to_csv(path, index=False)
    elif path.suffix == ".parquet":
        frame.to_parquet(path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def task_of(folder: Path, suffix: str = ".csv", **fields: Any) -> TextTask:
    defaults: dict[str, Any] = {
        "name": "mine", "data": FileData(train=f"train{suffix}", validation=f"validation{suffix}"),
        "text_columns": ("text",), "labels": ("no", "yes"), "metrics": ("accuracy",), "description": "My task.",
    }  # fmt: skip
    return TextTask(**(defaults | fields))


def made(folder: Path, rows: list[dict[str, Any]] = ROWS, suffix: str = ".csv", **fields: Any):
    folder.mkdir(parents=True, exist_ok=True)
    for part in ("train", "validation"):
        write(folder / f"{part}{suffix}", rows)
    return resolve_task(task_of(folder, suffix, **fields), folder)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".json", ".parquet"])
def test_every_format_gives_the_same_examples(tmp_path: Path, suffix: str) -> None:
    examples = read_examples(made(tmp_path, suffix=suffix), "train")
    assert examples.texts == tuple((row["text"],) for row in ROWS)
    assert examples.labels.tolist() == [row["label"] for row in ROWS]


def test_labels_may_be_numbers_names_or_both_and_pairs_have_two_texts(tmp_path: Path) -> None:
    rows = [{"a": "x", "b": "y", "label": label} for label in ("no", "yes", "0", "1")]
    examples = read_examples(made(tmp_path, rows, ".jsonl", text_columns=("a", "b")), "train")
    assert examples.labels.tolist() == [0, 1, 0, 1]
    assert examples.texts[0] == ("x", "y")


def test_class_names_that_look_like_numbers_count_as_names(tmp_path: Path) -> None:
    rows = [{"text": "x", "label": label} for label in (1, 2, 2)]
    examples = read_examples(made(tmp_path, rows, labels=("1", "2")), "train")
    assert examples.labels.tolist() == [0, 1, 1]


def test_regression_labels_are_numbers(tmp_path: Path) -> None:
    rows = [{"text": "x", "label": label} for label in (0.5, 3, 4.75)]
    examples = read_examples(made(tmp_path, rows, labels=None, metrics=("pearson",)), "train")
    assert examples.labels.tolist() == [0.5, 3.0, 4.75]


BAD_ROWS = {
    "label out of range": (
        [*ROWS, {"text": "x", "label": 2}], {}, r"row 20: label '?2'? is out of range; expected 0 to 1 or one of no, yes"
    ),
    "unlabelled split": ([{"text": "x", "label": -1}], {}, r"row 0: label '?-1'? is out of range.*is the split unlabelled"),
    "half a class": ([{"text": "x", "label": 0.5}], {}, r"row 0: label '?0.5'? is out of range"),
    "unknown name": ([{"text": "x", "label": "maybe"}], {}, r"row 0: label 'maybe' is out of range"),
    "missing label": ([*ROWS, {"text": "x", "label": None}], {}, r"row 20: the label is missing; mend or drop the row"),
    "no number": (
        [{"text": "x", "label": "1.5"}, {"text": "x", "label": "high"}], {"labels": None, "metrics": ("pearson",)},
        r"row 1: label 'high' is not a number; mend the row, or give labels",
    ),
    "wrong text column": (ROWS, {"text_columns": ("sentence",)}, r"has no column 'sentence'; it has text, label"),
    "wrong label column": (ROWS, {"label_column": "gold"}, r"has no column 'gold'; it has text, label"),
    "empty text": ([*ROWS, {"text": "  ", "label": 1}], {}, r"row 20: column 'text' is empty"),
    "missing text": ([*ROWS, {"text": None, "label": 1}], {}, r"row 20: column 'text' is empty"),
}  # fmt: skip


@pytest.mark.parametrize("fault", BAD_ROWS)
@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_bad_rows_and_columns_are_named(tmp_path: Path, fault: str, suffix: str) -> None:
    rows, fields, message = BAD_ROWS[fault]
    if suffix == ".parquet" and len({type(row["label"]) for row in rows} - {type(None)}) > 1:
        pytest.skip("a Parquet column has one type")
    task = made(tmp_path, rows, suffix, **fields)
    with pytest.raises(UserError, match=rf"^task 'mine': .*train\{suffix}.*{message}") as error:
        read_examples(task, "train")
    assert "\n" not in str(error.value)


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"task 'mine': data file '.*train.csv' does not exist; check the path"):
        resolve_task(task_of(tmp_path), tmp_path)
    for suffix, remedy in ((".parquet", "check the file"), (".jsonl", "save it as UTF-8"), (".csv", "save it as UTF-8")):
        task = made(tmp_path, suffix=suffix)
        (tmp_path / f"train{suffix}").write_bytes(b"\x00\x01 not a table \xff")
        task = resolve_task(task.task, tmp_path)
        with pytest.raises(UserError, match=rf"^task 'mine': '.*train\{suffix}' cannot be read \(.*\); {remedy}$"):
            read_examples(task, "train")
    with pytest.raises(UserError, match=r"task 'mine': data file '.*' is a folder, not a file; check the path"):
        resolve_task(task_of(tmp_path, data=FileData(train=".", validation=".")), tmp_path)
    with pytest.raises(UserError, match=r"task 'mine': data file '.*x' does not exist; check the path"):
        resolve_task(task_of(tmp_path, data=FileData(train="x" * 3000, validation="x")), tmp_path)
    latin = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    latin.mkdir()
    with pytest.raises(UserError, match=r"^file '.*/caf.udce9/train.csv': its path is no UTF-8 text; rename or move it$"):
        resolve_task(made(latin, suffix=".csv").task, latin)
    made(tmp_path, suffix=".csv")
    for part in ("train", "validation"):
        shutil.copy(tmp_path / f"{part}.csv", tmp_path / f"{part}.xlsx")
    with pytest.raises(UserError, match=r"train.xlsx' is not CSV \(.csv\), JSON lines \(.jsonl\) or Parquet"):
        read_examples(resolve_task(task_of(tmp_path, ".xlsx"), tmp_path), "train")


CSV_FILES: dict[str, tuple[bytes, list[str]]] = {
    "a mark of byte order": (b"\xef\xbb\xbftext,label\nx,0\ny,1\n", ["x", "y"]),
    "one between quotes": (b'\xef\xbb\xbf"text","label"\nx,0\ny,1\n', ["x", "y"]),
    "line breaks and quotes": (b'text,label\r\n"a\r\nb, ""c""",0\r\ny,1\r\n', ['a\r\nb, "c"', "y"]),
    "words for nothing": (b"text,label\nNA,0\nNone,1\nnull,0\nnan,1\n", ["NA", "None", "null", "nan"]),
    "numbers and dates": (b"text,label\n007,0\n1.50,1\n2020-01-01,0\n", ["007", "1.50", "2020-01-01"]),
    "blank lines": (b"\ntext,label\n\n x ,0\n\n", [" x "]),
}


@pytest.mark.parametrize("case", CSV_FILES)
def test_texts_of_csv_are_those_of_the_file(tmp_path: Path, case: str) -> None:
    made(tmp_path)
    content, texts = CSV_FILES[case]
    (tmp_path / "train.csv").write_bytes(content)
    assert [text for (text,) in read_examples(resolve_task(task_of(tmp_path), tmp_path), "train").texts] == texts


def test_texts_of_json_are_those_of_the_file(tmp_path: Path) -> None:
    rows = [{"text": "2020-01-01T00:00:00", "label": 0}, {"text": "a\u2028b", "label": 1}, {"text": "12", "label": 1}]
    made(tmp_path, suffix=".jsonl")
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    array = "[" + ",\n".join(lines) + "]"
    for text in ("\n\n".join(lines), "\ufeff" + "\r\n".join(lines) + "\r\n", array):
        (tmp_path / "train.jsonl").write_text(text, encoding="utf-8", newline="")
        examples = read_examples(resolve_task(task_of(tmp_path, ".jsonl"), tmp_path), "train")
        assert [text for (text,) in examples.texts] == [row["text"] for row in rows]


BAD_FILES = {
    "semicolons": (".csv", "text;label\nx;0\n", r"has a single column 'text;label'; .*by commas, not by ';'"),
    "a comma in every text": (".csv", "text,label\na, b,0\nc, d,1\n", r"line 2, saw 3\); put texts with commas"),
    "open quote": (".csv", 'text,label\n"x,0\ny,1\n', r"EOF inside string .*quotes"),
    "column twice": (".csv", "text,label,text\nx,0,y\n", r"has two columns 'text'; rename one"),
    "blank before a name": (".csv", "text, label\nx,0\n", r"has no column 'label'; it has text, ' label'"),
    "short row": (".csv", "text,label\nx,0\ny\n", r"row 1: the label is missing"),
    "nothing": (".csv", "", r"has no rows"),
    "broken line": (".jsonl", '{"text":"x","label":0}\n\n{"text":"x"\n', r"line 3 is not JSON: .*an object per line"),
    "array of arrays": (".jsonl", '[["x", 0]]', r"row 0 is no object"),
    "list for a text": (".jsonl", '{"text":["x","y"],"label":0}', r"row 0: column 'text' holds \['x', 'y'\], which is no text"),
    "half a pair": (".jsonl", '{"text":"\\ud800","label":0}', r"row 0: column 'text' holds .* no UTF-8 file can hold"),
    "huge number": (".jsonl", '{"text":"x","label":' + "9" * 5000 + "}", r"cannot be read \(Exceeds the limit"),
}  # fmt: skip


@pytest.mark.parametrize("fault", BAD_FILES)
def test_malformed_files_are_one_line_with_the_place(tmp_path: Path, fault: str) -> None:
    suffix, text, message = BAD_FILES[fault]
    made(tmp_path, suffix=suffix)
    (tmp_path / f"train{suffix}").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=rf"^task 'mine': .*train\{suffix}.*{message}") as error:
        read_examples(resolve_task(task_of(tmp_path, suffix), tmp_path), "train")
    assert len(str(error.value).splitlines()) == 1


def test_faults_of_a_parquet_file_are_told_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    task = made(tmp_path, suffix=".parquet").task
    (tmp_path / "train.parquet").write_bytes(b"text,label")
    with pytest.raises(UserError, match="Parquet magic bytes not found"):
        read_examples(resolve_task(task, tmp_path), "train")
    pd.DataFrame({"text": pd.Series([], dtype=str), "label": pd.Series([], dtype=int)}).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(UserError, match="has no rows"):
        read_examples(resolve_task(task, tmp_path), "train")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("names", "values", "numbers"),
    [
        (("1", "2", "3"), [1.0, 2.0, 3.0], [0, 1, 2]),
        (("1", "2", "3"), ["1.0", " 2", "3"], [0, 1, 2]),
        (("true", "false"), [True, False], [0, 1]),
        (("False", "True"), ["TRUE", "false"], [1, 0]),
        (("no", "yes"), [True, False], [1, 0]),
        (("no", "yes"), [" yes", "no "], [1, 0]),
        (("null", "nan"), ["null", "nan"], [0, 1]),
    ],
)
def test_a_label_is_the_class_that_it_names(tmp_path: Path, names, values, numbers) -> None:
    rows = [{"text": "x", "label": value} for value in values]
    for suffix in (".jsonl", ".parquet"):
        examples = read_examples(made(tmp_path, rows, suffix, labels=names), "train")
        assert examples.labels.tolist() == numbers, suffix


def test_a_number_is_no_place_where_classes_are_named_by_numbers(tmp_path: Path) -> None:
    task = made(tmp_path, [{"text": "x", "label": 2}, {"text": "x", "label": 0}], labels=("1", "2"))
    with pytest.raises(UserError, match=r"row 1: label '0' is out of range; expected one of 1, 2"):
        read_examples(task, "train")


def test_target_too_large_for_a_float32_is_named(tmp_path: Path) -> None:
    task = made(tmp_path, [{"text": "x", "label": 1e300}], labels=None, metrics=("pearson",))
    with pytest.raises(UserError, match=r"row 0: label '1e\+?300' is too large to be learned; give targets below 1e\+09"):
        read_examples(task, "train")


def test_file_without_rows_is_named(tmp_path: Path) -> None:
    for part in ("train", "validation"):
        (tmp_path / f"{part}.csv").write_text("text,label\n")
    with pytest.raises(UserError, match=r"train\.csv.*(has no rows|no data)"):
        read_examples(resolve_task(task_of(tmp_path), tmp_path), "train")


def test_file_that_changes_during_a_run_is_noticed(tmp_path: Path) -> None:
    task = made(tmp_path)
    write(tmp_path / "train.csv", ROWS[:-1])
    with pytest.raises(UserError, match=r"changed while the run was under way; start it again"):
        read_examples(task, "train")


def test_identity_is_content_not_place(tmp_path: Path) -> None:
    def key(folder: Path, **fields: Any) -> str:
        return fingerprint("toy", 1, {"task": resolve_task(task_of(folder, **fields), folder)})

    made(tmp_path / "here")
    before = key(tmp_path / "here")
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    shutil.rmtree(tmp_path / "here")
    assert key(tmp_path / "there") == before, "a moved folder changes nothing"
    assert key(tmp_path / "there", description="Other words.") == before, "words are for the generator alone"
    assert key(tmp_path / "there", metrics=("matthews_correlation",)) != before
    file = tmp_path / "there" / "validation.csv"
    file.write_bytes(file.read_bytes().replace(b"sentence 7", b"sentence 8", 1))
    assert key(tmp_path / "there") != before, "a changed byte does"


def test_base_model_identity_is_content_not_place(tmp_path: Path, bert) -> None:
    copied = tmp_path / "copied"
    shutil.copytree(bert.folder, copied)
    moved = resolve_base_model(BaseModelConfig(name=str(copied)))
    assert fingerprint("toy", 1, {"base": moved}) == fingerprint("toy", 1, {"base": bert})
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"layer_norm_eps": 1e-7}))
    changed = resolve_base_model(BaseModelConfig(name=str(copied)))
    assert fingerprint("toy", 1, {"base": changed}) != fingerprint("toy", 1, {"base": bert})


def test_selection_examples_are_never_trained_on(tmp_path: Path) -> None:
    task = made(tmp_path, [{"text": f"{i}", "label": i % 2} for i in range(200)])
    splits = SplitConfig()
    train, selection = (set(split_rows(task, splits, split)) for split in ("train", "selection"))
    assert (len(train), len(selection)) == (180, 20)
    assert train | selection == set(range(200))
    small = SplitConfig(max_selection=5, max_report=7)
    assert set(split_rows(task, small, "selection")) < selection
    assert set(split_rows(task, small, "train")) == train, "scoring fewer examples changes no training"
    assert len(split_rows(task, small, "report")) == 7
    assert set(split_rows(task, splits, "report")) == set(range(200))
    assert set(split_rows(task, SplitConfig(seed=1), "selection")) != selection
    paper = SplitConfig(selection_split="train")
    assert set(split_rows(task, paper, "train")) == set(split_rows(task, paper, "selection")) == set(range(200))


def test_split_of_one_example_leaves_nothing_to_train_on(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"task 'mine': no training example is left after holding 1 out; give more data"
    ):
        split_rows(made(tmp_path, ROWS[:1]), SplitConfig(), "train")


def test_tokens_are_the_tokenizers_own_cut_to_the_length(tmp_path: Path, bert) -> None:
    rows = [{"a": "fine w1 w2 w3 w4 w5", "b": "cold w7 w8", "label": 1}, {"a": "dull", "b": "w9", "label": 0}]
    task = made(tmp_path, rows * 10, ".jsonl", text_columns=("a", "b"))
    texts, labels = tokenize(task, SplitConfig(), "report", bert, 8)
    tokenizer = load_tokenizer(bert)
    assert labels.tolist() == [1, 0] * 10
    for i, row in enumerate(rows):
        expected = tokenizer(row["a"], row["b"], truncation=True, max_length=8, return_token_type_ids=True)
        part = slice(int(texts.starts[i]), int(texts.starts[i + 1]))
        assert texts.ids[part].tolist() == expected["input_ids"]
        assert texts.types[part].tolist() == expected["token_type_ids"]


@pytest.mark.parametrize(
    ("name", "label_zero_share"), [("sst2", 29_780 / 67_349), ("cola", 2_528 / 8_551), ("stsb", None)]
)
def test_excerpt_is_complete_and_balanced_as_its_source(name, label_zero_share) -> None:
    task = resolve_task(excerpt(name), None)
    train, validation = read_examples(task, "train"), read_examples(task, "validation")
    assert (len(train), len(validation)) == (3200, 400)
    if label_zero_share is None:
        assert (train.labels.min(), train.labels.max()) == (0.0, 5.0)
        assert train.labels.mean() == pytest.approx(2.701, abs=0.08)
    else:
        assert np.mean(train.labels == 0) == pytest.approx(label_zero_share, abs=0.03)
    assert len(set(train.texts) & set(validation.texts)) < 0.02 * len(validation)
    size = sum(path.stat().st_size for path in EXCERPT_FOLDER.iterdir())
    assert size < 2_000_000


def test_glue_paths_start_at_the_data_folder_and_without_one_the_hub_is_asked(tmp_path: Path) -> None:
    task = task_of(tmp_path, data=GlueData(task="sst2"))
    with pytest.raises(UserError, match=r"data file '.*/glue/sst2/train.parquet' does not exist; .*give --data-dir"):
        resolve_task(task, tmp_path)
    with pytest.raises(UserError, match=r"dataset 'nyu-mll/glue' cannot be had from the hub .*--data-dir DIR"):
        resolve_task(task, None)  # the tests run with HF_HUB_OFFLINE=1
    with pytest.raises(UserError, match=r"dataset 'no one/has this' cannot be had from the hub"):
        resolve_task(task_of(tmp_path, data=HubData(dataset="no one/has this")), None)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"labels": ("one",)}, "labels needs at least two names"),
        ({"labels": ("a", "a")}, "labels has a name twice"),
        ({"labels": None}, "metric 'accuracy' does not fit regression"),
        ({"metrics": ("pearson",)}, "metric 'pearson' does not fit classification"),
        ({"labels": ("a", "b", "c"), "metrics": ("f1",)}, "metric 'f1' is for two classes"),
        ({"table_metric": "f1"}, "table_metric 'f1' is not among metrics"),
        ({"text_columns": ("text", "text")}, "text_columns has 'text' twice"),
        ({"label_column": "text"}, "label_column 'text' is among text_columns"),
    ],
)
def test_inconsistent_task_is_refused(tmp_path: Path, fields, message) -> None:
    with pytest.raises(ValueError, match=message):
        task_of(tmp_path, **fields)


def test_examples_of_each_split_carry_their_own_labels(tmp_path: Path) -> None:
    task = made(tmp_path)
    for split, source in (("train", "train"), ("selection", "train"), ("report", "validation")):
        rows = split_rows(task, SplitConfig(), split)
        examples = examples_of(task, SplitConfig(), split)
        assert examples.texts == tuple(read_examples(task, source).texts[row] for row in rows)
        assert examples.labels.tolist() == [ROWS[row]["label"] for row in rows]


@pytest.mark.parametrize(
    ("labels", "metrics", "label", "told"),
    [
        (("no", "yes"), ("accuracy", "matthews_correlation", "f1"), "yes", "matthews_correlation is 0"),
        (("no", "yes"), ("accuracy", "f1"), "no", "f1 is 0"),
        (("no", "yes"), ("accuracy",), "no", None),
        (None, ("pearson", "spearmanr"), 2.5, "pearson and spearmanr are 0"),
    ],
)
def test_metric_that_is_the_same_whatever_is_predicted_is_told(tmp_path: Path, labels, metrics, label, told) -> None:
    other = {"no": "yes", "yes": "no"}.get(label, 1.0)
    for part, found in (("train", [label, other] * 10), ("validation", [label] * 4)):
        write_jsonl(tmp_path / f"{part}.jsonl", [{"text": f"{part} {i}", "label": one} for i, one in enumerate(found)])
    data = FileData(train="train.jsonl", validation="validation.jsonl")
    task = TextTask(name="t", data=data, text_columns=("text",), labels=labels, metrics=metrics, description="A task.")
    lines = remarks(resolve_task(task, tmp_path), SplitConfig(held_out_fraction=0.5))
    assert lines == [f"task 't': all 4 validation labels are the same; {told} there whatever is predicted"] * (told is not None)


def test_token_that_the_base_has_no_embedding_of_is_refused(tmp_path: Path, make_task) -> None:
    folder = save_model(tmp_path / "model")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["fine"] = 99
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    base = resolve_base_model(BaseModelConfig(name=str(folder)))
    with pytest.raises(UserError, match=r"gives token id 99, and the model has embeddings of 52 tokens; save both"):
        tokenize(make_task("fine"), SplitConfig(), "train", base, 32)
