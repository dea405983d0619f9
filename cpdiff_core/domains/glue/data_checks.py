"""A task's data before anything is computed on it: faults of every file at once, and what is odd and no fault."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cpdiff_core.domains.glue.data import ResolvedTask, SplitConfig, examples_of, read_examples, split_rows
from cpdiff_core.domains.glue.metrics import MetricName
from cpdiff_core.domains.glue.text_tasks import TextTask

SHARED = 0.05
"""Share of validation examples that may stand in the training data too without a word."""


def check_data(task: ResolvedTask, splits: SplitConfig) -> list[str]:
    """Read all data of a task and return what a reader of its scores must know, one line each.

    Raises UserError for the first fault of the training data or of the validation data, which is needed last.
    """
    for split in ("train", "selection", "report"):
        split_rows(task, splits, split)
    return remarks(task, splits)


def remarks(task: ResolvedTask, splits: SplitConfig) -> list[str]:
    """What is odd about the examples: nothing to learn, classes that do not occur, a metric that is the same whatever is
    predicted, validation seen in training."""
    train, report = examples_of(task, splits, "train"), examples_of(task, splits, "report")
    lines = []
    values = np.unique(train.labels)
    names = task.task.labels
    if len(values) == 1:
        shown = f"{values[0]:g}" if names is None else repr(names[int(values[0])])
        lines.append(f"task {task.name!r}: all {len(train)} training labels are {shown}; there is nothing to learn")
    elif names is not None and len(values) < len(names):
        absent = [name for number, name in enumerate(names) if number not in values]
        lines.append(
            f"task {task.name!r}: no training example is {', '.join(map(repr, absent[:5]))}"
            f"{' ...' if len(absent) > 5 else ''}; that is never learned"
        )
    for split, examples in (("selection", examples_of(task, splits, "selection")), ("validation", report)):
        if constant := _constant_metrics(task.task, np.unique(examples.labels)):
            lines.append(
                f"task {task.name!r}: all {len(examples)} {split} labels are the same; {' and '.join(constant)} "
                f"{'is' if len(constant) == 1 else 'are'} 0 there whatever is predicted"
            )
    seen = set(read_examples(task, "train").texts)
    again = sum(texts in seen for texts in report.texts)
    if again > SHARED * len(report):
        lines.append(
            f"task {task.name!r}: {again} of {len(report)} validation examples stand in the training data too; scores on "
            "them say little of new ones"
        )
    return lines


def _constant_metrics(task: TextTask, labels: NDArray[np.float64]) -> list[MetricName]:
    """The metrics of a task that are 0 for any predictions on examples with these labels, each once (`metrics.py`)."""
    if len(labels) > 1:
        return []
    return [name for name in task.metrics if name != "accuracy" and not (name == "f1" and labels[0] == 1)]
