"""Condition texts: the draw for generation is held out, descriptions are there, nothing depends on other tasks."""

from __future__ import annotations

import pytest

from cpdiff_core.config import UserError
from cpdiff_core.domains.glue.data import SplitConfig, examples_of
from cpdiff_core.domains.glue.prompts import descriptions_of, example_text, task_conditions
from cpdiff_core.generator.conditions import (
    FewShotCondition,
    LearnedCondition,
    OneHotCondition,
    TaskInfoCondition,
    TaskInfoFewShotCondition,
)

SPLITS = SplitConfig()


def conditions_of(condition, tasks, seed: int = 0):
    return task_conditions(condition, tasks, descriptions_of(condition, tasks), SPLITS, seed, "cpu")


def examples_in(prompt: str, task) -> set[str]:
    lines = {example_text(task.task, texts, 0).split(" -> ")[0] for texts in examples_of(task, SPLITS, "train").texts}
    return {line for line in lines if f"{line} -> " in prompt}


def test_held_out_prompt_shares_no_example_with_training_prompts(make_task) -> None:
    tasks = (make_task("left", num=40), make_task("right", num=40, seed=3))
    condition = TaskInfoFewShotCondition(num_prompts=8)
    y_QPE, y_QE, texts = conditions_of(condition, tasks)
    assert y_QPE.shape == (2, 8, 384)
    assert y_QE.shape == (2, 384)
    assert y_QPE.isfinite().all()
    for q, task in enumerate(tasks):
        held = examples_in(texts.generation[q], task)
        shown = set().union(*(examples_in(prompt, task) for prompt in texts.training[q]))
        assert len(held) == 2
        assert len(shown) > 4, "training prompts are differently drawn"
        assert not held & shown
        assert all(task.task.description in prompt for prompt in (*texts.training[q], texts.generation[q]))
    selection = {texts_ for texts_ in examples_of(tasks[0], SPLITS, "selection").texts}
    drawn = " ".join((*texts.training[0], texts.generation[0]))
    assert not any(f"{text} -> " in drawn for (text,) in selection), "examples for choosing are in no prompt"


def test_prompts_of_a_task_do_not_depend_on_the_other_tasks(make_task) -> None:
    tasks = (make_task("one", num=30), make_task("two", num=30, seed=4))
    condition = FewShotCondition(num_prompts=3)
    _, _, both = conditions_of(condition, tasks)
    _, _, alone = conditions_of(condition, tasks[1:])
    _, _, reseeded = conditions_of(condition, tasks[1:], seed=1)
    assert both.training[1] == alone.training[0]
    assert both.generation[1] == alone.generation[0] != reseeded.generation[0]
    assert not any(tasks[1].task.description in prompt for prompt in alone.training[0]), "examples alone"


def test_task_info_is_the_description_alone_and_one_hot_needs_no_text(make_task) -> None:
    tasks = (make_task("one", num=30), make_task("two", num=30, seed=4))
    y_QPE, _, texts = conditions_of(TaskInfoCondition(), tasks)
    assert texts.training == tuple((task.task.description,) for task in tasks)
    assert y_QPE.shape[:2] == (2, 1)
    for condition in (OneHotCondition(), LearnedCondition()):
        y_QPE, y_QE, texts = conditions_of(condition, tasks)
        assert y_QE.tolist() == [[1, 0], [0, 1]]
        assert texts.training == ()


def test_too_few_examples_are_named(make_task) -> None:
    with pytest.raises(
        UserError, match=r"task 'few': 2 training examples are too few for prompts of 2; give more data"
    ):
        conditions_of(FewShotCondition(), (make_task("few", num=3),))
