"""A text task is a value. The six GLUE tasks of the paper are such values; so is a user's own.

Descriptions are ours: the paper's prompt texts stand in an appendix that nobody has.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from cpdiff_core.config import Config
from cpdiff_core.domains.glue.metrics import MetricName

TaskName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]


class FileData(Config):
    """Examples in local files: CSV, JSON lines or Parquet, by their ending."""

    kind: Literal["files"] = "files"
    train: str = Field(description="File with the training examples; relative paths start at --data-dir.")
    validation: str = Field(description="File with the validation examples, on which results are reported.")


class HubData(Config):
    """A dataset on the Hugging Face hub."""

    kind: Literal["hub"] = "hub"
    dataset: str = Field(description="Hub id, for example nyu-mll/glue.")
    subset: str | None = Field(None, description="Configuration of the dataset, for example sst2.")
    revision: str | None = Field(None, description="Branch, tag or commit; the newest commit if None.")
    train_split: str = Field("train", description="Split to train on.")
    validation_split: str = Field("validation", description="Split on which results are reported.")


class GlueData(Config):
    """One of the six GLUE tasks: <data-dir>/glue/<task>/{train,validation}.parquet, or else the hub."""

    kind: Literal["glue"] = "glue"
    task: Literal["sst2", "rte", "mrpc", "cola", "qnli", "stsb"] = Field(description="Which of the six.")


class ExcerptData(Config):
    """The small excerpt of GLUE inside this package (SST-2, CoLA, STS-B)."""

    kind: Literal["excerpt"] = "excerpt"
    task: Literal["sst2", "cola", "stsb"] = Field(description="Which of the three.")


DataSource = Annotated[FileData | HubData | GlueData | ExcerptData, Field(discriminator="kind")]


class TextTask(Config):
    """What an adapter is fine-tuned for, and what the generator is told of it."""

    name: TaskName = Field(description="What to call it.")
    data: DataSource = Field(description="Where its examples come from.")
    text_columns: tuple[str, ...] = Field(min_length=1, max_length=2, description="One text column, or two for pairs.")
    label_column: str = Field("label", description="Column with the answers.")
    labels: tuple[str, ...] | None = Field(
        description="Class names in the order of their numbers; null for regression. Label values may be numbers or names."
    )
    metrics: tuple[MetricName, ...] = Field(min_length=1, description="All are stored and reported, each under its name.")
    table_metric: MetricName | None = Field(
        None, description="The one that tables show; the mean of `metrics` (GLUE's combined_score) if None and there are two."
    )
    description: str = Field(min_length=1, description="The task in words: the generator's condition (task_info).")

    @model_validator(mode="after")
    def _consistent(self) -> TextTask:
        if self.labels is not None and len(self.labels) < 2:
            raise ValueError(f"task {self.name!r}: labels needs at least two names; use null for regression")
        if self.labels is not None and len({name.strip() for name in self.labels}) != len(self.labels):
            raise ValueError(f"task {self.name!r}: labels has a name twice")
        if self.labels is not None and any(not name.strip() for name in self.labels):
            raise ValueError(f"task {self.name!r}: labels has a blank name; give every class a word")
        if len(set(self.text_columns)) != len(self.text_columns):
            raise ValueError(f"task {self.name!r}: text_columns has {self.text_columns[0]!r} twice; a pair is of two columns")
        if self.label_column in self.text_columns:
            raise ValueError(f"task {self.name!r}: label_column {self.label_column!r} is among text_columns; name another")
        correlations = {"pearson", "spearmanr"}
        if "combined_score" in self.metrics:
            raise ValueError(f"task {self.name!r}: combined_score is the mean of the metrics and not one of them; leave it out")
        wrong = [m for m in self.metrics if (m in correlations) != (self.labels is None)]
        if wrong:
            kind = "regression" if self.labels is None else "classification"
            raise ValueError(f"task {self.name!r}: metric {wrong[0]!r} does not fit {kind}")
        if self.labels is not None and len(self.labels) > 2 and "f1" in self.metrics:
            raise ValueError(f"task {self.name!r}: metric 'f1' is for two classes; use accuracy or matthews_correlation")
        if self.table_metric not in (None, *self.metrics, *(["combined_score"] if len(self.metrics) > 1 else [])):
            raise ValueError(f"task {self.name!r}: table_metric {self.table_metric!r} is not among metrics")
        return self

    @property
    def primary_metric(self) -> MetricName:
        """The metric that heads the tables and chooses among candidates."""
        return self.table_metric or ("combined_score" if len(self.metrics) > 1 else self.metrics[0])

    @property
    def num_classes(self) -> int:
        """Outputs of the head: one per class, a single one for regression."""
        return 1 if self.labels is None else len(self.labels)


GLUE_TASKS: dict[str, TextTask] = {
    task.name: task
    for task in (
        TextTask(
            name="sst2", data=GlueData(task="sst2"), text_columns=("sentence",), labels=("negative", "positive"),
            metrics=("accuracy",),
            description="Sentiment of a phrase from a film review: decide whether it is negative or positive.",
        ),
        TextTask(
            name="rte", data=GlueData(task="rte"), text_columns=("sentence1", "sentence2"),
            labels=("entailment", "not_entailment"), metrics=("accuracy",),
            description="Textual entailment: decide whether the second sentence follows from the first.",
        ),
        TextTask(
            name="mrpc", data=GlueData(task="mrpc"), text_columns=("sentence1", "sentence2"),
            labels=("not_equivalent", "equivalent"), metrics=("accuracy", "f1"),
            description="Paraphrase detection: decide whether two sentences from news articles mean the same.",
        ),
        TextTask(
            name="cola", data=GlueData(task="cola"), text_columns=("sentence",), labels=("unacceptable", "acceptable"),
            metrics=("matthews_correlation",),
            description="Linguistic acceptability: decide whether a sentence is grammatical English.",
        ),
        TextTask(
            name="qnli", data=GlueData(task="qnli"), text_columns=("question", "sentence"),
            labels=("entailment", "not_entailment"), metrics=("accuracy",),
            description="Question answering as inference: decide whether the sentence contains the answer to the question.",
        ),
        TextTask(
            name="stsb", data=GlueData(task="stsb"), text_columns=("sentence1", "sentence2"), labels=None,
            metrics=("pearson", "spearmanr"),
            description="Semantic similarity: rate from 0 to 5 how similar two sentences are in meaning.",
        ),
    )
}  # fmt: skip


def excerpt(task: Literal["sst2", "cola", "stsb"]) -> TextTask:
    """The GLUE task on the excerpt inside this package."""
    return GLUE_TASKS[task].model_copy(update={"data": ExcerptData(task=task)})
