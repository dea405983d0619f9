"""How good generated adapters are on a user's own examples: chosen on them, or compared on them for an unseen task."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cpdiff_core.bundle import Candidates, Condition, Generator
from cpdiff_core.cards import ArmScore
from cpdiff_core.config import RuntimeConfig, UserError
from cpdiff_core.domains.base_models import BaseModel
from cpdiff_core.domains.glue.data import ResolvedTask, SplitConfig, tokenize
from cpdiff_core.domains.glue.heads import HeadConfig, fit_probe
from cpdiff_core.domains.glue.stacks import Head, build_stack, logits_of
from cpdiff_core.evaluation.scores import predictions_of
from cpdiff_core.generator.probing import change_condition

_FOLDS = 5
_FEWEST = 4


@dataclass(frozen=True)
class Judgement:
    """What scoring found: the chosen candidate and why, scores of each candidate, scores to print."""

    chosen: int | None
    chosen_by: str | None
    by_candidate: tuple[tuple[ArmScore, ...], ...]
    arms: tuple[ArmScore, ...]


def _tokenized(generator: Generator, base: BaseModel, task: ResolvedTask) -> tuple[Any, NDArray[np.float64]]:
    """Every row of the user's file, in its order."""
    return tokenize(task, SplitConfig(), "report", base, generator.card.max_length)


def _scorer(
    generator: Generator, base: BaseModel, task: ResolvedTask, runtime: RuntimeConfig
) -> Callable[[torch.Tensor, Head, Any], NDArray[np.float64]]:
    """A function from vectors, a head and texts to predictions V x B."""
    card, num_classes = generator.card, task.task.num_classes
    stack = build_stack(base, card.lora, num_classes, card.precision, runtime)
    if stack.layout != card.layout:
        raise UserError(f"base model {base.name!r}: its layers do not match the generator's layout; check --base")

    def predict(w_VK: torch.Tensor, head: Head, texts: Any) -> NDArray[np.float64]:
        return predictions_of(
            task.task, logits_of(stack, w_VK, head, num_classes, texts, f"score {task.name}", runtime)
        )

    return predict


def choose_on_data(
    generator: Generator,
    base: BaseModel,
    task: ResolvedTask,
    head: Head | None,
    candidates: Candidates,
    runtime: RuntimeConfig,
) -> Judgement:
    """Score every candidate on the user's data and choose the best one."""
    assert head is not None
    texts, labels_B = _tokenized(generator, base, task)
    predict = _scorer(generator, base, task, runtime)
    predictions_MB = predict(candidates.w_MK, head, texts)
    zeros = predict(torch.zeros_like(candidates.w_MK[:1]), head, texts)[0]
    where, num = f"your {len(labels_B)} examples", len(predictions_MB)
    single = [ArmScore.of(task.task, f"this adapter on {where}", row, labels_B) for row in predictions_MB]
    chosen = int(np.argmax([score.estimate for score in single]))
    arms = (
        ArmScore.of(task.task, f"no-LoRA on {where}", zeros, labels_B),
        ArmScore.of(task.task, f"generated, mean of {num}, on {where}", predictions_MB, labels_B),
    )
    by = f"best of {num} on {where}; its score on the same examples is therefore optimistic"
    return Judgement(chosen, by, tuple((score, *arms) for score in single), arms)


def compare_unseen(
    generator: Generator, base: BaseModel, task: ResolvedTask, candidates: Candidates, runtime: RuntimeConfig
) -> tuple[Head, Judgement]:
    """The head fitted on all examples, and every arm on each fold with a head fitted on the other folds."""
    texts, labels_B = _tokenized(generator, base, task)
    if len(labels_B) < _FEWEST:
        raise UserError(
            f"--few: {len(labels_B)} examples are too few for a head and a comparison; give at least {_FEWEST}"
        )
    if (names := task.task.labels) is not None and (
        absent := [name for number, name in enumerate(names) if number not in labels_B]
    ):
        raise UserError(f"--few: no example of the class {absent[0]!r}; give some of every class in --labels")
    if task.task.labels is None and len(set(labels_B)) == 1:
        raise UserError(f"--few: every target is {labels_B[0]:g}, so there is nothing to fit; give examples that differ")
    predict = _scorer(generator, base, task, runtime)
    num, seed = len(candidates.w_MK), candidates.seed
    y_1E, nearest = candidates.condition.y_1E, generator.nearest_task(candidates.condition)
    center_E = generator.diffusion.projection.center_E.cpu()
    shuffled = change_condition(y_1E, 0, "a shuffled condition", center_E, seed)[None]
    control = generator.generate(Condition(shuffled, None, None), num, seed)
    w_VK = torch.cat(
        [candidates.w_MK, control.w_MK, generator.references[nearest][-1:], torch.zeros_like(candidates.w_MK[:1])]
    )
    predictions_VB = np.empty((len(w_VK), len(labels_B)))
    probe = HeadConfig()
    order = np.random.default_rng([seed, len(labels_B)]).permutation(len(labels_B))
    for fold in np.array_split(order, min(_FOLDS, len(labels_B) // 2)):
        rest = np.setdiff1d(order, fold)
        head = fit_probe(probe, base, task, texts.take(torch.from_numpy(rest)), labels_B[rest], runtime)
        predictions_VB[:, fold] = predict(w_VK, head, texts.take(torch.from_numpy(fold)))
    where = f"{len(labels_B)} few examples, heads fitted on the others"
    single = [ArmScore.of(task.task, f"this adapter on {where}", row, labels_B) for row in predictions_VB[:num]]
    arms = (
        ArmScore.of(task.task, f"generated, mean of {num}, on {where}", predictions_VB[:num], labels_B),
        ArmScore.of(
            task.task, f"shuffled condition, mean of {num}, on {where}", predictions_VB[num : 2 * num], labels_B
        ),
        ArmScore.of(task.task, f"adapter of the nearest task ({nearest}) on {where}", predictions_VB[-2], labels_B),
        ArmScore.of(task.task, f"no-LoRA on {where}", predictions_VB[-1], labels_B),
    )
    chosen = int(np.argmax([score.estimate for score in single]))
    by = f"best of {num} on the few examples; its score on the same examples is therefore optimistic"
    head = fit_probe(probe, base, task, texts, labels_B, runtime)
    return head, Judgement(chosen, by, tuple((score, *arms) for score in single), arms)
