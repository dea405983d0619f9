"""Zoos as folders: a folder per task, with task.json and one PEFT folder per checkpoint.

`write_zoo_task` shares a harvest in a form that PEFT users know; `find_zoo` takes in such folders, or the checkpoint
folders that the usual Trainer leaves, from anywhere: they must be plain LoRA of one base, rank, scaling and set of
modules. A checkpoint's head travels with it, but a generator draws LoRA weights alone, so one head per task is kept,
the last checkpoint's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, ValidationError, model_validator

from cpdiff_core.artifacts import write_json
from cpdiff_core.cards import TaskCard
from cpdiff_core.config import Config, LocalFile, UserError
from cpdiff_core.domains.base_models import FAMILIES, NAMES, BaseModel, cached_classifier
from cpdiff_core.generator.autoencoder import AutoencoderConfig, ConvAutoencoderConfig
from cpdiff_core.generator.conditions import LearnedCondition, OneHotCondition, TaskInfoCondition
from cpdiff_core.generator.diffusion import DiffusionConfig, SamplingConfig, check_sampling
from cpdiff_core.generator.normalization import NormalizationConfig
from cpdiff_core.lora.layout import LoraSpec, ParameterLayout, initial_vector
from cpdiff_core.lora.peft_folder import CONFIG_FILE, WEIGHTS_FILE, PeftAdapter, read_adapter, write_adapter

TASK_FILE = "task.json"


class ZooGeneratorConfig(Config):
    """How a generator is trained on adapters made elsewhere; defaults as in an experiment."""

    name: str = "imported-zoo"
    normalization: NormalizationConfig = NormalizationConfig()
    autoencoder: AutoencoderConfig = ConvAutoencoderConfig()
    condition: TaskInfoCondition | OneHotCondition | LearnedCondition = Field(
        TaskInfoCondition(), discriminator="kind", description="Examples would need the data, which does not come."
    )
    diffusion: DiffusionConfig = DiffusionConfig()
    sampling: SamplingConfig = SamplingConfig()
    max_length: int = Field(128, ge=4, le=512, description="Tokens of one example when generated adapters are scored.")
    seed: int = Field(42, ge=0, description="Of autoencoder, diffusion and sampling.")

    @model_validator(mode="after")
    def _consistent(self) -> ZooGeneratorConfig:
        check_sampling(self.diffusion, self.sampling)
        return self


class AdapterFiles(Config):
    """One PEFT folder, identified by its content."""

    config: LocalFile
    weights: LocalFile

    @property
    def folder(self) -> Path:
        return Path(self.weights.path).parent


class ZooTask(Config):
    """All adapters of one task, oldest first."""

    card: TaskCard
    adapters: tuple[AdapterFiles, ...] = Field(min_length=1)


def find_zoo(folders: Sequence[Path], descriptions: Mapping[str, str]) -> list[ZooTask]:
    """The tasks in `folders`, each a task's folder or a folder of such with task.json. descriptions: task -> words, over
    task.json.

    Raises UserError for a folder without adapters, or of which one cannot know whether its folders are tasks, a task that
    occurs twice, or a description for no task.
    """
    tasks: dict[str, ZooTask] = {}
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"zoo {str(folder)!r}: no such folder; check the path")
        inner = []
        if not (folder / TASK_FILE).is_file():
            inner = sorted(path.parent for path in folder.glob(f"*/{TASK_FILE}"))
            _check_one_task(folder, inner)
        for path in inner or [folder]:
            task = _task_of(path, descriptions)
            if task.card.name in tasks:
                raise UserError(f"zoo {str(path)!r}: the task {task.card.name!r} occurs twice; rename one folder")
            tasks[task.card.name] = task
    if unknown := sorted(set(descriptions) - set(tasks)):
        raise UserError(f"--describe {unknown[0]!r}: is none of the tasks found: {', '.join(tasks)}")
    return list(tasks.values())


def _check_one_task(folder: Path, inner: Sequence[Path]) -> None:
    """Raises UserError if folders of adapters lie in `folder` that nothing says to be tasks, or one task's runs."""
    ways = [config.parent.relative_to(folder).parts for config in folder.rglob(CONFIG_FILE)]
    allowed = 0 if inner else 1  # a task's adapters, or those of its only run
    outer = sorted({way[0] for way in ways if len(way) > allowed} - {path.name for path in inner})
    if len(outer) > allowed:
        raise UserError(
            f"zoo {str(folder)!r}: adapters lie in its folder {outer[0]!r}, which has no {TASK_FILE}; give each task's folder "
            f"by its own path, or, if all are runs of one task, put a {TASK_FILE} that holds {{}} into {str(folder)!r}"
        )


def _task_of(path: Path, descriptions: Mapping[str, str]) -> ZooTask:
    found = sorted({config.parent for config in path.rglob(CONFIG_FILE)}, key=_natural)
    if not found:
        raise UserError(f"zoo {str(path)!r}: holds no PEFT folder ({CONFIG_FILE}); give a folder of a task's adapters")
    value: dict[str, Any] = {}
    if (path / TASK_FILE).is_file():
        try:
            value = json.loads((path / TASK_FILE).read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"zoo {str(path)!r}: {TASK_FILE} is not JSON; mend it") from error
        if not isinstance(value, dict):
            raise UserError(f"zoo {str(path)!r}: {TASK_FILE} must hold one JSON object; mend it")
    value = {"description": ""} | value | {"name": path.resolve().name, "num_checkpoints": len(found)}
    if value["name"] in descriptions:
        value["description"] = descriptions[value["name"]]
    head = [read_adapter(folder) for folder in found][-1].head  # all are read: their faults are told now
    outputs = min((tensor.shape[0] for name, tensor in head.items() if name.endswith("weight")), default=1)
    if "labels" not in value and outputs > 1:
        value["labels"] = tuple(str(number) for number in range(outputs))
    adapters = tuple(
        AdapterFiles(config=LocalFile.of(folder / CONFIG_FILE), weights=LocalFile.of(folder / WEIGHTS_FILE))
        for folder in found
    )
    try:
        return ZooTask(card=TaskCard.model_validate(value), adapters=adapters)
    except ValidationError as error:
        fault = error.errors()[0]
        field = ".".join(map(str, fault["loc"]))
        raise UserError(f"zoo {str(path)!r}: {TASK_FILE}: {field}: {fault['msg']}; mend it") from error


def _natural(path: Path) -> list[tuple[int, str]]:
    """checkpoint-900 before checkpoint-1000."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", str(path))]


def base_name_of(tasks: Sequence[ZooTask]) -> str:
    """The one base that all adapters name, as `base_models` knows it. Raises UserError if they name several or none."""
    names = {read_adapter(adapter.folder).base for task in tasks for adapter in task.adapters}
    if len(names) != 1 or not (name := names.pop()):
        listed = ", ".join(sorted(map(repr, names))) or "none"
        raise UserError(f"zoo: the adapters name several base models or none ({listed}); say which one with --base")
    return next((short for short, hub_id in NAMES.items() if hub_id == name), name)


def shared_shape(
    tasks: Sequence[ZooTask], base: BaseModel, num_labels: int = 2
) -> tuple[LoraSpec, tuple[str, ...], ParameterLayout]:
    """(LoRA spec, target modules, layout) that every adapter of the zoo has on this base.

    Raises UserError that names the first adapter of another rank, scaling, set of modules or shape.
    """
    adapters = [read_adapter(files.folder) for task in tasks for files in task.adapters]
    first = adapters[0]
    family = FAMILIES[base.family]
    classifier, _ = cached_classifier(base, num_labels)
    try:
        _, layout = initial_vector(classifier, first.lora, first.target_modules, family.block_pattern, 0)
    except ValueError as error:
        raise UserError(
            f"adapter {str(first.folder)!r}: its target_modules {', '.join(first.target_modules[:4])} are not in "
            f"{base.name!r}; give the right --base"
        ) from error
    for adapter in adapters:
        _same(adapter, first)
        adapter.vector(layout)
    return first.lora, first.target_modules, layout


def _same(adapter: PeftAdapter, first: PeftAdapter) -> None:
    for what, mine, theirs in (
        ("rank", adapter.lora.rank, first.lora.rank),
        ("scaling lora_alpha / r", adapter.lora.scaling, first.lora.scaling),
        ("target_modules", adapter.target_modules, first.target_modules),
    ):
        if mine != theirs:
            raise UserError(
                f"adapter {str(adapter.folder)!r}: its {what} is {mine}, that of {str(first.folder)!r} is {theirs}; a "
                "generator needs adapters of one shape, so import them apart"
            )


def load_zoo_task(task: ZooTask, layout: ParameterLayout) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(w_NK oldest first, the head of the last adapter; empty if it has none)."""
    adapters = [read_adapter(files.folder) for files in task.adapters]
    return torch.stack([adapter.vector(layout) for adapter in adapters]), adapters[-1].head


def write_zoo_task(
    folder: Path, card: TaskCard, w_NK: torch.Tensor, layout: ParameterLayout, lora: LoraSpec,
    target_modules: Sequence[str], *, base: str, revision: str | None, head: Mapping[str, torch.Tensor],
) -> None:  # fmt: skip
    """Write one task of a zoo: task.json and a PEFT folder per checkpoint, in order."""
    write_json(folder / TASK_FILE, card.model_dump(mode="json", exclude={"num_checkpoints", "name"}))
    for n, w_K in enumerate(w_NK):
        target = folder / f"checkpoint-{n:04d}"
        write_adapter(target, w_K, layout, lora, target_modules, base=base, revision=revision, head=head)
