"""Cards: what a generator folder says of itself in JSON, the base model, the tasks, their scores."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from cpdiff_core.config import Config, UserError
from cpdiff_core.domains.base_models import NAMES, BaseModel, BaseModelConfig, resolve_base_model
from cpdiff_core.domains.glue.metrics import MetricName
from cpdiff_core.domains.glue.stacks import Precision
from cpdiff_core.domains.glue.text_tasks import DataSource, TextTask
from cpdiff_core.evaluation.bootstrap import resample
from cpdiff_core.generator.conditions import ConditionConfig
from cpdiff_core.generator.diffusion import SamplingConfig
from cpdiff_core.lora.layout import LoraSpec, ParameterLayout


class BaseReference(Config):
    """Which base model the adapters are for. The digests decide; the name says where to get it."""

    name: str = Field(description="As given to the experiment; of a local folder the last part of its path.")
    hub_id: str | None = Field(None, description="Where the hub has it; None for a local folder.")
    revision: str | None = None
    family: Literal["bert", "roberta", "deberta", "gpt2"]
    files: dict[str, str] = Field(description="sha256 of every file by its name.")

    @classmethod
    def of(cls, base: BaseModel, revision: str | None = None) -> BaseReference:
        local = os.path.isdir(os.path.expanduser(base.name))
        return cls(
            name=Path(os.path.expanduser(base.name)).resolve().name if local else base.name, revision=revision,
            hub_id=None if local else NAMES.get(base.name, base.name), family=base.family,
            files={Path(file.path).name: file.sha256 for file in base.files},
        )  # fmt: skip

    @property
    def weights(self) -> dict[str, str]:
        return {name: digest for name, digest in self.files.items() if name.endswith((".safetensors", ".bin"))}

    def find(self, name: str | None = None) -> BaseModel:
        """The base model on this machine, by its own name or from the folder or hub id `name`.

        Raises UserError if it is not there, or if its weights are other ones.
        """
        base = resolve_base_model(BaseModelConfig(name=name or self.name, revision=None if name else self.revision))
        found = BaseReference.of(base)
        if found.family != self.family or sorted(found.weights.values()) != sorted(self.weights.values()):
            mine, theirs = (next(iter(sorted(item.weights.values())), "")[:12] for item in (self, found))
            raise UserError(
                f"base model {base.name!r}: is not the one that the adapters are for ({self.family} {self.name!r}, "
                f"weights {mine}...; this is {found.family}, weights {theirs}...); give --base the folder or hub id of "
                f"{self.hub_id or self.name}"
            )
        return base


class ArmScore(Config):
    """One cell of the run's table: an arm on validation, in points, with its 95 % interval."""

    arm: str
    metric: str
    estimate: float
    low: float
    high: float

    @classmethod
    def of(cls, task: TextTask, arm: str, predictions: NDArray[np.float64], labels_B: NDArray[np.float64]) -> ArmScore:
        """By the task's first metric. predictions: [B] of one vector, or [V, B], whose scores are averaged."""
        score = resample(arm, task.name, [predictions], labels_B, name=task.primary_metric, task_metrics=task.metrics)
        return cls(arm=arm, metric=score.keys[0].metric, **score.interval.model_dump())


class TaskCard(Config):
    """What a generator knows of a task it was trained on; `TextTask` without the place of the data."""

    name: str
    description: str
    text_columns: tuple[str, ...] = ()
    label_column: str = "label"
    labels: tuple[str, ...] | None = None
    metrics: tuple[MetricName, ...] = ()
    table_metric: MetricName | None = None
    data: str = Field("unknown", description="Where the training data came from, in words.")
    prompt: str | None = Field(None, description="The held-out condition text that the run generated from.")
    num_checkpoints: int = Field(description="Training vectors of this task.")
    has_head: bool = True
    scores: tuple[ArmScore, ...] = Field((), description="Arms of the run on validation; empty if nothing was scored.")
    chosen: int | None = Field(None, description="The run's candidate that its selection split chose.")
    candidates: tuple[ArmScore, ...] = Field((), description="Each of the run's M candidates on validation.")
    verdict: str | None = Field(None, description="The memorisation audit's line, if the run made one.")

    @classmethod
    def of(cls, task: TextTask, **values: Any) -> TaskCard:
        shared = {name: getattr(task, name) for name in TextTask.model_fields if name != "data"}
        return cls(**shared, data=_source(task.data), **values)

    def text_task(self, data: DataSource, **changes: Any) -> TextTask:
        """The task on other data. Raises UserError if this card says too little (adapters made elsewhere)."""
        values = {name: getattr(self, name) for name in TextTask.model_fields if name != "data"} | changes
        if not values["metrics"]:
            raise UserError(f"task {self.name!r}: the generator does not know its text columns, labels and metrics")
        return TextTask(**values, data=data)


class GeneratorCard(Config):
    """Everything about a generator that is not a tensor."""

    format: Literal[1] = 1
    name: str
    description: str = ""
    base: BaseReference
    lora: LoraSpec
    layout: ParameterLayout
    target_modules: tuple[str, ...] = Field(description="Modules with LoRA, by PEFT's suffixes.")
    condition: ConditionConfig
    sampling: SamplingConfig
    seed: int = Field(description="The run's: with it, and the run's prompt, the run's own candidates come out.")
    max_length: int = Field(description="Tokens of one example; longer ones are cut.")
    precision: Precision = Field(description="Of the frozen base when the scores were measured.")
    head: str = Field(description="How the heads were made: probe, random, or that they came with the adapters.")
    tasks: tuple[TaskCard, ...] = Field(min_length=1)
    compact: bool = Field(False, description="Weights in half precision, no encoder.")
    settings: dict[str, Any] = Field({}, description="Further settings of the run, for the record.")
    made: dict[str, str] = Field({}, description="Device, commit and time of the diffusion model's training.")

    def task(self, name: str) -> TaskCard:
        """Raises UserError with the known names."""
        for card in self.tasks:
            if card.name == name:
                return card
        raise UserError(f"task {name!r}: is not among this generator's tasks: {', '.join(self.task_names)}")

    @property
    def task_names(self) -> tuple[str, ...]:
        return tuple(card.name for card in self.tasks)


def _source(data: DataSource) -> str:
    if data.kind == "hub":
        return f"{data.dataset} {data.subset or ''}".strip() + " on the Hugging Face hub"
    if data.kind == "files":
        return "local files"
    return f"GLUE {data.task}" + (" (the excerpt inside cpdiff)" if data.kind == "excerpt" else "")
