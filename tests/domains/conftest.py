"""A tiny base model and tasks in files, for the tests of the text domain."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import saved_base, sentences, write_jsonl

from cpdiff_core.domains.base_models import BaseModel
from cpdiff_core.domains.glue.data import ResolvedTask, resolve_task
from cpdiff_core.domains.glue.text_tasks import FileData, TextTask

MakeTask = Callable[..., ResolvedTask]


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    return saved_base(tmp_path_factory.mktemp("model") / "bert")


@pytest.fixture(scope="session")
def make_task(tmp_path_factory: pytest.TempPathFactory) -> MakeTask:
    """`make_task(name, classes=, num=)`: sentences with a cue word; classes None is regression, 2 has named labels."""

    def make(name: str, classes: int | None = 2, num: int = 60, seed: int = 0, pairs: bool = False) -> ResolvedTask:
        folder = tmp_path_factory.mktemp(name)
        rng = np.random.default_rng(seed)
        for number, part in enumerate(("train", "validation")):
            texts, cues = sentences(num, seed + 100 * number)
            others, _ = sentences(num, seed + 100 * number + 50, cue=False)
            labels: list[Any] = [bool(cue) * (classes or 5) / 2 + rng.normal(0, 0.1) for cue in cues]
            if classes is not None:
                labels = [int((cue + i) % classes) if classes > 2 else int(cue) for i, cue in enumerate(cues)]
            rows = [
                {"text": text, "label": label} | ({"other": other} if pairs else {})
                for text, other, label in zip(texts, others, labels, strict=True)
            ]
            write_jsonl(folder / f"{part}.jsonl", rows)
        task = TextTask(
            name=name, data=FileData(train="train.jsonl", validation="validation.jsonl"),
            text_columns=("text", "other") if pairs else ("text",),
            labels=None if classes is None else tuple(f"class {c}" for c in range(classes)),
            metrics=("pearson",) if classes is None else ("accuracy",), description=f"The task {name}.",
        )  # fmt: skip
        return resolve_task(task, Path(folder))

    return make
