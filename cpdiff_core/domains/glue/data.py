"""Examples of a text task: find the data, read it, check it, split it, tokenise it.

Three splits: `train` is fine-tuned on; `selection` chooses among checkpoints and candidates; `report` is the
validation data, seen by reporting alone. Local files enter a task's identity by content, hub ones by commit.
"""

from __future__ import annotations

import os
import re
import zlib
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from pydantic import Field

from cpdiff_core.config import Config, LocalFile, UserError, first_line
from cpdiff_core.domains.base_models import BaseModel, load_tokenizer
from cpdiff_core.domains.glue.table_files import PARQUET, TEXT_READING, UnreadableTable, read_table
from cpdiff_core.domains.glue.text_tasks import ExcerptData, FileData, GlueData, HubData, TextTask
from cpdiff_core.lora.packing import TokenizedTexts

SplitName = Literal["train", "selection", "report"]
EXCERPT_FOLDER = Path(__file__).parent / "excerpt"


class SplitConfig(Config):
    """How the examples are divided between training, choosing and reporting."""

    selection_split: Literal["held_out", "train"] = Field(
        "held_out", description="held_out: a tenth of train that is never trained on. train: the paper's choice (Sec. 4.1)."
    )
    held_out_fraction: float = Field(0.1, gt=0, lt=1, description="Share of train kept for selection (ours).")
    max_held_out: int = Field(1000, ge=1, description="Most examples held out of train (ours).")
    max_selection: int | None = Field(None, ge=1, description="Most examples scored for selection; all if None.")
    max_report: int | None = Field(None, ge=1, description="Most validation examples scored; all if None.")
    seed: int = Field(0, ge=0, description="Of the draw of these subsets.")


class ResolvedFiles(Config):
    train: LocalFile
    validation: LocalFile

    def identity(self) -> Any:
        text = any(Path(file.path).suffix.lower() != PARQUET for file in (self.train, self.validation))
        return super().identity() | ({"reading": TEXT_READING} if text else {})


class ResolvedHub(Config):
    dataset: str
    subset: str | None
    commit: str
    train_split: str
    validation_split: str


class ResolvedTask(Config):
    """A task whose data has been found. `task.data` does not count: its content does. Nor do the task's words: they are for
    the generator alone, and what reads them takes them beside the task (`descriptions_of` in prompts.py)."""

    task: TextTask
    source: ResolvedFiles | ResolvedHub

    @property
    def name(self) -> str:
        return self.task.name

    def identity(self) -> Any:
        fields = {name: getattr(self.task, name) for name in TextTask.model_fields if name not in ("data", "description")}
        return {"task": fields, "source": self.source}


@dataclass(frozen=True)
class Examples:
    """Checked examples: texts as one or two strings each, labels as class numbers or regression targets."""

    texts: tuple[tuple[str, ...], ...]
    labels: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.texts)

    def rows(self, index: NDArray[np.int64]) -> Examples:
        return Examples(tuple(self.texts[i] for i in index), self.labels[index])


def resolve_task(task: TextTask, data_dir: Path | None) -> ResolvedTask:
    """Find and digest the data of a task. Raises UserError that says what was looked for and where."""
    data = task.data
    if isinstance(data, ExcerptData):
        paths = [EXCERPT_FOLDER / f"{data.task}_{split}.parquet" for split in ("train", "validation")]
    elif isinstance(data, FileData):
        base = data_dir or Path()
        paths = [base / os.path.expanduser(name) for name in (data.train, data.validation)]
    elif isinstance(data, GlueData) and data_dir is not None:
        paths = [data_dir / "glue" / data.task / f"{split}.parquet" for split in ("train", "validation")]
    else:
        hub = HubData(dataset="nyu-mll/glue", subset=data.task) if isinstance(data, GlueData) else data
        assert isinstance(hub, HubData)
        return ResolvedTask(task=task, source=_resolve_hub(task.name, hub))
    for path in paths:
        if not os.path.isfile(path):  # unlike Path's, it takes a name that is too long for one that is not there
            reason = "is a folder, not a file" if os.path.isdir(path) else "does not exist"
            raise UserError(
                f"task {task.name!r}: data file {str(path)!r} {reason}; check the path, give --data-dir, "
                "or run the quickstart, whose data is inside the package"
            )
    train, validation = (LocalFile.of(path) for path in paths)
    return ResolvedTask(task=task, source=ResolvedFiles(train=train, validation=validation))


def _resolve_hub(name: str, hub: HubData) -> ResolvedHub:
    from huggingface_hub import HfApi

    try:
        info = HfApi().dataset_info(hub.dataset, revision=hub.revision, timeout=4)
        assert info.sha is not None
        return ResolvedHub(
            dataset=hub.dataset, subset=hub.subset, commit=info.sha, train_split=hub.train_split,
            validation_split=hub.validation_split,
        )  # fmt: skip
    except Exception as error:  # the hub's client and whichever HTTP library it has raise their own
        raise UserError(
            f"task {name!r}: dataset {hub.dataset!r} cannot be had from the hub ({first_line(error)}); give local files with "
            "--data-dir DIR (DIR/glue/<task>/train.parquet and validation.parquet), or run quickstart on the excerpt"
        ) from error


def _read_frame(task: ResolvedTask, which: Literal["train", "validation"]) -> tuple[pd.DataFrame, str]:
    """The raw table of one split, and what to call it in an error."""
    source = task.source
    if isinstance(source, ResolvedFiles):
        path = Path(getattr(source, which).path)
        try:
            return read_table(path), str(path)
        except UnreadableTable as error:
            raise UserError(f"task {task.name!r}: {str(path)!r} {error}") from error
    import datasets

    datasets.disable_progress_bars()
    split = source.train_split if which == "train" else source.validation_split
    try:
        table = datasets.load_dataset(source.dataset, source.subset, split=split, revision=source.commit)
    except Exception as error:  # the library raises many types; each means that this split cannot be had
        raise UserError(
            f"task {task.name!r}: dataset {source.dataset!r} cannot be read ({first_line(error.__cause__ or error)}); "
            "check subset and splits"
        ) from error
    return table.to_pandas(), f"{source.dataset} {split}"


def _texts(task: str, column: pd.Series[Any], where: str) -> list[str]:
    """A text column: strings, or numbers as they print. Raises UserError for an empty cell and for what is no text."""
    texts = ["" if none else str(value) for value, none in zip(column, column.isna(), strict=True)]
    for row, (value, text) in enumerate(zip(column, texts, strict=True)):
        fault = None
        if isinstance(value, list | dict | np.ndarray):
            fault = f"holds {_shown(column, row)[:60]}, which is no text; name a column of texts in text_columns"
        elif not text.strip():
            fault = "is empty"
        elif not text.isascii() and text.encode(errors="replace") != text.encode(errors="surrogatepass"):
            fault = f"holds {text[:40]!r}, which no UTF-8 file can hold (half of a surrogate pair); mend the row"
        if fault is not None:
            raise UserError(f"task {task!r}: {where} row {row}: column {column.name!r} {fault}")
    return texts


def _labels(task: TextTask, column: pd.Series[Any], where: str) -> NDArray[np.float64]:
    """Class numbers, or regression targets. Raises UserError for the first row that has none."""
    if task.labels is None:
        values = pd.to_numeric(column, errors="coerce").to_numpy(np.float64)
        wrong, expected = ~(np.abs(values) <= _LARGEST_TARGET), "is not a number; mend the row, or give labels for classification"
        if (large := np.isfinite(values) & wrong).any() and np.argmax(large) == np.argmax(wrong):
            expected = f"is too large to be learned; give targets below {_LARGEST_TARGET:g}"
    else:
        values = np.array([_class_number(value, task.labels) for value in column], np.float64)
        wrong, numbers = np.isnan(values), "" if _numeric(task.labels) else f"0 to {len(task.labels) - 1} or "
        expected = f"is out of range; expected {numbers}one of {', '.join(task.labels)} (is the split unlabelled?)"
    if (bad := np.flatnonzero(wrong)).size:
        value = column.iloc[bad[0]]
        missing = value is None or value == "" or value is pd.NA or (isinstance(value, float) and np.isnan(value))
        shown = "the label is missing" if missing else f"label {_shown(column, bad[0])}"
        expected = "; mend or drop the row (is the split unlabelled?)" if missing else f" {expected}"
        raise UserError(f"task {task.name!r}: {where} row {bad[0]}: {shown}{expected}")
    return values


_LARGEST_TARGET = 1e9
"""Of a regression. Its square must leave a float32 room for a sum."""


@lru_cache(maxsize=64)
def _numeric(names: tuple[str, ...]) -> bool:
    """Whether one of the class names is a number, so that a number in the data is a name and no place in the list."""
    return any(re.fullmatch(r"\s*[+-]?\d+([.]\d*)?\s*", name) for name in names)


def _class_number(value: Any, names: tuple[str, ...]) -> float:
    """The number of the class that a label names, by its name or, where names are no numbers, by its place; else NaN.

    1, 1.0 and "1" are the same label, and so are True and "true"; without names for them True is 1 and False is 0.
    """
    text, names = str(value).strip(), tuple(name.strip() for name in names)
    if text in names:
        return names.index(text)
    if text.casefold() in ("true", "false"):
        folded = [name.casefold() for name in names]
        if "true" in folded or "false" in folded:
            return folded.index(text.casefold()) if text.casefold() in folded else np.nan
        return float(text.casefold() == "true")
    try:
        number = float(text)
    except ValueError:
        return np.nan
    if not number.is_integer():
        return np.nan
    if _numeric(names):
        return names.index(f"{number:.0f}") if f"{number:.0f}" in names else np.nan
    return number if 0 <= number < len(names) else np.nan


def _shown(column: pd.Series[Any], row: int) -> str:
    """A value as the user wrote it, without numpy's type around it."""
    value = column.iloc[row]
    return repr(value.tolist() if isinstance(value, np.generic | np.ndarray) else value)


@lru_cache(maxsize=32)
def read_examples(task: ResolvedTask, which: Literal["train", "validation"]) -> Examples:
    """All examples of the training or the validation data, checked. Raises UserError on the first bad row."""
    frame, where = _read_frame(task, which)
    if isinstance(task.source, ResolvedFiles):
        current = LocalFile.of(Path(getattr(task.source, which).path))
        if current.sha256 != getattr(task.source, which).sha256:
            raise UserError(f"task {task.name!r}: {where} changed while the run was under way; start it again")
    if frame.empty:
        raise UserError(f"task {task.name!r}: {where} has no rows")
    wanted = (*task.task.text_columns, task.task.label_column)
    missing = [name for name in wanted if name not in frame.columns]
    if missing:
        found = [name if name == name.strip() else repr(name) for name in map(str, frame.columns)]
        raise UserError(f"task {task.name!r}: {where} has no column {missing[0]!r}; it has {', '.join(found)}")
    columns = [_texts(task.name, frame[name], where) for name in task.task.text_columns]
    labels = _labels(task.task, frame[task.task.label_column], where)
    return Examples(tuple(zip(*columns, strict=True)), labels)


def split_rows(task: ResolvedTask, splits: SplitConfig, split: SplitName) -> NDArray[np.int64]:
    """Row numbers of a split in its source (train and selection: the training data; report: validation).

    Drawn from the seed and the task's name, so that they do not depend on the other tasks.
    """
    rng = np.random.default_rng([splits.seed, zlib.crc32(task.name.encode())])
    num_train = len(read_examples(task, "train"))
    num_held = max(1, min(splits.max_held_out, int(num_train * splits.held_out_fraction)))
    order = rng.permutation(num_train)
    held_out, train = order[:num_held], order[num_held:]
    if splits.selection_split == "train":
        train = order
    if split == "train":
        if len(train) == 0:
            raise UserError(f"task {task.name!r}: no training example is left after holding {num_held} out; give more data")
        return np.sort(train)
    if split == "selection":
        chosen = held_out if splits.selection_split == "held_out" else order
        return np.sort(chosen[: splits.max_selection])
    order = rng.permutation(len(read_examples(task, "validation")))
    return np.sort(order[: splits.max_report])


def examples_of(task: ResolvedTask, splits: SplitConfig, split: SplitName) -> Examples:
    source = read_examples(task, "validation" if split == "report" else "train")
    return source.rows(split_rows(task, splits, split))


@lru_cache(maxsize=64)
def tokenize(
    task: ResolvedTask, splits: SplitConfig, split: SplitName, base: BaseModel, max_length: int
) -> tuple[TokenizedTexts, NDArray[np.float64]]:
    """(token ids end to end, labels) of one split, truncated to `max_length` tokens each.

    Raises UserError for a token that the base model has no embedding of.
    """
    examples = examples_of(task, splits, split)
    tokenizer = _tokenizer(base)
    columns = list(zip(*examples.texts, strict=True))
    encoded = tokenizer(
        list(columns[0]), list(columns[1]) if len(columns) == 2 else None, truncation=True, max_length=max_length,
        return_attention_mask=False, return_token_type_ids=True,
    )  # fmt: skip
    lengths = np.array([len(ids) for ids in encoded["input_ids"]])
    ids, types = (
        torch.from_numpy(np.fromiter(chain.from_iterable(encoded[key]), np.int64, int(lengths.sum())))
        for key in ("input_ids", "token_type_ids")
    )
    if base.vocabulary is not None and len(ids) and int(ids.max()) >= base.vocabulary:
        raise UserError(
            f"base_model.name {base.name!r}: its tokenizer gives token id {int(ids.max())}, and the model has embeddings "
            f"of {base.vocabulary} tokens; save both together after resize_token_embeddings, or give the tokenizer of this model"
        )
    return TokenizedTexts(ids, types, torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]))), examples.labels


@lru_cache(maxsize=4)
def _tokenizer(base: BaseModel) -> Any:
    return load_tokenizer(base)
