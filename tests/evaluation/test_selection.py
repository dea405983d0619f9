"""The barrier: what chooses cannot see report scores, in memory, from a file, or by a mistyped split."""

import json

import pytest
from pydantic import ValidationError

from cpdiff_core.config import UserError
from cpdiff_core.evaluation.selection import ReportScores, SelectionScores, oracle, select

COMMON = {"task": "rte", "metric": "accuracy", "vectors": "generate/0123"}


def selection(*scores):
    return SelectionScores(**COMMON, split="held_out", scores=scores)


def report(*scores):
    return ReportScores(**COMMON, scores=scores)


def test_select_takes_the_best_and_the_lowest_of_equals():
    assert select(selection(50.0, 61.0, 60.0)) == 1
    assert select(selection(50.0, 61.0, 61.0)) == 1
    assert select(selection(-3.0)) == 0


def test_vectors_without_a_finite_score_are_never_chosen():
    nan, inf = float("nan"), float("inf")
    assert select(selection(nan, -20.0, inf)) == 1
    with pytest.raises(UserError, match=r"rte.*2 vectors.*accuracy"):
        select(selection(nan, nan))
    with pytest.raises(UserError):
        oracle(report(nan))


def test_select_refuses_report_scores_and_oracle_refuses_selection_scores():
    with pytest.raises(TypeError, match=r"SelectionScores only.*ReportScores"):
        select(report(1.0, 2.0))
    with pytest.raises(TypeError, match="ReportScores"):
        oracle(selection(1.0, 2.0))
    assert oracle(report(1.0, 2.0)) == 1


def test_neither_type_can_be_made_from_the_other_or_carry_the_others_split():
    for text in (report(1.0).model_dump_json(), json.dumps({**COMMON, "split": "validation", "scores": [1.0]})):
        with pytest.raises(ValidationError):
            SelectionScores.model_validate_json(text)
    with pytest.raises(ValidationError):
        ReportScores.model_validate_json(selection(1.0).model_dump_json())
    with pytest.raises(ValidationError):
        ReportScores(**COMMON, split="held_out", scores=(1.0,))


def test_scores_are_frozen_and_survive_json_with_missing_values():
    scores = selection(float("nan"), 50.0)
    assert SelectionScores.model_validate_json(scores.model_dump_json()) == scores
    assert json.loads(scores.model_dump_json())["scores"] == [None, 50.0]
    with pytest.raises(ValidationError):
        scores.scores = (1.0,)
