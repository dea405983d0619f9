"""The results table: arms in columns, tasks and their average in rows, a 95 % interval in every cell.

Intervals and differences come from `evaluation.bootstrap`: paired on the same validation examples, one metric per
row, the average resampled task by task.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from cpdiff_core.artifacts import Artifact
from cpdiff_core.config import Config
from cpdiff_core.domains.glue.data import ResolvedTask
from cpdiff_core.evaluation.bootstrap import ResampledScore, average_over_tasks, resample
from cpdiff_core.evaluation.scores import ReportArtifact, load_predictions, load_report_scores
from cpdiff_core.evaluation.selection import oracle

AVERAGE = "average"
ARMS = ("no-LoRA", "original (oracle)", "original (selected)", "model soup", "generated")


class TaskArms(Config):
    """One task of one experiment: the scores of every arm on validation, and the rows chosen on the selection split."""

    task: ResolvedTask
    head: Artifact
    num_checkpoints: int
    chosen_original: int
    chosen_candidate: int
    no_lora: ReportArtifact
    original: ReportArtifact
    soup: ReportArtifact
    generated: ReportArtifact


Results = dict[str, dict[str, ResampledScore]]
"""task (or `average`) -> arm -> score."""


def collect(arms: Sequence[TaskArms], root: Path) -> Results:
    """Every cell of the table, with the average over tasks as a last row."""
    results: Results = {}
    for entry in arms:
        task = entry.task.task
        rows = {
            "no-LoRA": (entry.no_lora, 0),
            "original (oracle)": (entry.original, oracle(load_report_scores(entry.original, root, task))),
            "original (selected)": (entry.original, entry.chosen_original),
            "model soup": (entry.soup, 0),
            "generated": (entry.generated, entry.chosen_candidate),
        }
        results[task.name] = {}
        for arm, (artifact, row) in rows.items():
            predictions_VB, labels_B = load_predictions(artifact.under(root), task)
            results[task.name][arm] = resample(
                arm, task.name, [predictions_VB[row]], labels_B, name=task.primary_metric, task_metrics=task.metrics
            )
    results[AVERAGE] = {arm: average_over_tasks([results[entry.task.name][arm] for entry in arms]) for arm in ARMS}
    return results


def metric_of(score: ResampledScore) -> str:
    """The metric's name as a cell prints it; an average over tasks names no single one."""
    names = {key.metric for key in score.keys}
    return names.pop() if len(score.keys) == 1 else "mean of the rows above"


def results_frame(results: Results) -> pd.DataFrame:
    """The table in long form: task, arm, metric, estimate, low, high, all in points."""
    return pd.DataFrame(
        [
            {"task": task, "arm": arm, "metric": metric_of(score), **score.interval.model_dump()}
            for task, row in results.items()
            for arm, score in row.items()
        ]
    )


def differences_frame(results: Results) -> pd.DataFrame:
    """generated minus every other arm, paired on the same examples, in points."""
    return pd.DataFrame(
        [
            {"task": task, "difference": f"generated - {arm}", **(row["generated"] - row[arm]).interval.model_dump()}
            for task, row in results.items()
            for arm in ARMS[:-1]
        ]
    )


def text_table(results: Results) -> str:
    """The table for a terminal; each cell `score [low, high]`, each row with its metric's name."""
    rows = [["task", "metric", *ARMS]]
    for task, row in results.items():
        rows.append([task, metric_of(row["generated"]), *(str(row[arm].interval) for arm in ARMS)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:-1], "-" * len(lines[0]), lines[-1]])
