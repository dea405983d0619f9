"""The barrier between choosing and reporting (Sec. 4.1: choose on the training set, report on validation).

Scores for choosing and scores for reporting are two types that do not convert into each other, in memory or from a
file. `select` takes the first only. The paper's *original* column chooses by the very scores that it reports; that is
`oracle`, a function of its own, and the tables print its name.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from cpdiff_core.config import Config, UserError
from cpdiff_core.domains.glue.metrics import MetricName


def _finite_or_none(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value


ScoreValue = Annotated[float | None, BeforeValidator(_finite_or_none)]


class _VectorScores(Config):
    """One score per vector of one artifact, on one metric of one task."""

    task: str
    metric: MetricName | Literal["negative KID", "negative Fréchet distance"]
    vectors: str = Field(description="The artifact whose rows are scored, as stage/fingerprint.")
    scores: tuple[ScoreValue, ...] = Field(
        min_length=1, description="Points, higher is better, in the artifact's order. None: predictions not finite."
    )


class SelectionScores(_VectorScores):
    """Scores on data for choosing: a held-out part of train (our default) or train itself (the paper)."""

    kind: Literal["selection"] = "selection"
    split: Literal["held_out", "train"]


class ReportScores(_VectorScores):
    """Scores on validation, for reporting and never for choosing."""

    kind: Literal["report"] = "report"
    split: Literal["validation"] = "validation"


def select(scores: SelectionScores) -> int:
    """The row with the best selection score; the lowest of equals. A vector without a score is never chosen.

    Raises TypeError for anything but SelectionScores, UserError if no vector has a score.
    """
    if not isinstance(scores, SelectionScores):
        raise TypeError(
            f"select chooses by SelectionScores only and was given {type(scores).__name__}; "
            "score the vectors on the selection split, or call `oracle` and say so in the table"
        )
    return _best(scores)


def oracle(report: ReportScores) -> int:
    """The row that is best on validation itself: the paper's *original*, an upper bound that nobody can choose by.

    Raises TypeError for anything but ReportScores, UserError if no vector has a score.
    """
    if not isinstance(report, ReportScores):
        raise TypeError(f"oracle takes ReportScores and was given {type(report).__name__}; call `select` to choose")
    return _best(report)


def _best(scores: _VectorScores) -> int:
    usable = [(-score, row) for row, score in enumerate(scores.scores) if score is not None]
    if not usable:
        raise UserError(
            f"task {scores.task!r}: all {len(scores.scores)} vectors of {scores.vectors} have no finite "
            f"{scores.metric}; lower the learning rate or the noise that made them"
        )
    return min(usable)[1]
