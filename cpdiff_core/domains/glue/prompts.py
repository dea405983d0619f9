"""Condition texts of text tasks (Sec. 4.3): the description, and examples drawn from the training data.

Training uses several draws of examples per task; generation uses a further draw, whose examples none of the
training prompts contain.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence

import numpy as np
import torch

from cpdiff_core.config import Config, UserError
from cpdiff_core.domains.glue.data import Examples, ResolvedTask, SplitConfig, examples_of
from cpdiff_core.domains.glue.text_tasks import TextTask
from cpdiff_core.generator.conditions import (
    ConditionConfig,
    FewShotCondition,
    LearnedCondition,
    OneHotCondition,
    StyleImageCondition,
    TaskInfoCondition,
    TaskInfoFewShotCondition,
    build_prompt,
    encode_texts,
    one_hot_conditions,
)


class TaskConditions(Config):
    """The texts behind the conditions, for the record; empty for `one_hot` and `learned`."""

    training: tuple[tuple[str, ...], ...] = ()
    generation: tuple[str, ...] = ()


def example_text(task: TextTask, texts: tuple[str, ...], label: float) -> str:
    """One example as a line: its texts and its answer."""
    answer = f"{label:g}" if task.labels is None else task.labels[int(label)]
    # The corpora hold the odd control character; in a prompt it would be an error.
    clean = [re.sub(r"[\x00-\x1f\x7f]+", " ", text) for text in texts]
    return f"{' | '.join(clean)} -> {answer}"


def _draws(task: ResolvedTask, examples: Examples, num_prompts: int, num_examples: int, seed: int) -> list[list[str]]:
    """num_prompts + 1 draws; the last one shares no example with the others."""
    need = num_examples + 1
    if len(examples) < need:
        raise UserError(
            f"task {task.name!r}: {len(examples)} training examples are too few for prompts of {num_examples}; "
            "give more data, or use the condition task_info"
        )
    rng = np.random.default_rng([seed, zlib.crc32(task.name.encode()), 0x70726F])
    order = rng.permutation(len(examples))
    held, pool = order[:num_examples], order[num_examples:]
    chosen = [rng.choice(pool, num_examples, replace=len(pool) < num_examples) for _ in range(num_prompts)]
    return [
        [example_text(task.task, examples.texts[i], examples.labels[i]) for i in rows] for rows in [*chosen, held]
    ]


def descriptions_of(condition: ConditionConfig, tasks: Sequence[ResolvedTask]) -> tuple[str | None, ...]:
    """The words of each task, None where the condition does not read them."""
    told = isinstance(condition, TaskInfoCondition | TaskInfoFewShotCondition)
    return tuple(task.task.description if told else None for task in tasks)


def task_conditions(
    condition: ConditionConfig, tasks: Sequence[ResolvedTask], descriptions: Sequence[str | None], splits: SplitConfig,
    seed: int, device: str | torch.device,
) -> tuple[torch.Tensor, torch.Tensor, TaskConditions]:  # fmt: skip
    """(y_QPE for training, y_QE for generation, the texts). descriptions: from `descriptions_of`. Raises UserError for an
    unusable text."""
    if isinstance(condition, OneHotCondition | LearnedCondition):
        y_QPE = one_hot_conditions(len(tasks))
        return y_QPE, y_QPE[:, 0], TaskConditions()
    if isinstance(condition, StyleImageCondition):
        raise UserError("condition.kind 'style_image': is for styles; text tasks take task_info, few_shot or one_hot")
    training: list[tuple[str, ...]] = []
    generation: list[str] = []
    for task, description in zip(tasks, descriptions, strict=True):
        draws: list[list[str]] = [[], []]
        if isinstance(condition, FewShotCondition | TaskInfoFewShotCondition):
            examples = examples_of(task, splits, "train")
            draws = _draws(task, examples, condition.num_prompts, condition.num_examples, seed)
        try:
            texts = [build_prompt(condition.encoder, description, draw) for draw in draws]
        except UserError as error:
            raise UserError(f"task {task.name!r}: {error}") from error
        training.append(tuple(texts[:1] if isinstance(condition, TaskInfoCondition) else texts[:-1]))
        generation.append(texts[-1])
    y_PE = [encode_texts(condition.encoder, texts, device) for texts in training]
    return (
        torch.stack(y_PE), encode_texts(condition.encoder, generation, device),
        TaskConditions(training=tuple(training), generation=tuple(generation)),
    )  # fmt: skip
