"""The results table: arms against tasks and their average, a 95 % interval in every cell.

Intervals and differences come from `evaluation.bootstrap`: paired on the same validation examples, one metric per
task, the average resampled task by task, several seeds pooled on the same resamples with their spread shown apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from cpdiff_core.artifacts import read_json, read_tensors, write_json, write_tensors
from cpdiff_core.domains.glue.data import ResolvedTask
from cpdiff_core.domains.glue.metrics import compute_metrics
from cpdiff_core.evaluation.arms import AVERAGE as AVERAGE
from cpdiff_core.evaluation.arms import ScoredArm, arm_predictions
from cpdiff_core.evaluation.bootstrap import ResampledScore, TaskKey, average_over_tasks, claim, resample
from cpdiff_core.reports.inputs import ReportInputs

_WIDE = 6
Results = dict[str, dict[str, ResampledScore]]
"""task (or `average`) -> arm -> score, pooled over seeds."""


def pooled_score(name: str, task: ResolvedTask, arms: Sequence[ScoredArm], root: Path) -> ResampledScore:
    """One arm of one task on the task's table metric: one item of `arms` per seed."""
    text_task = task.task
    outputs = [arm_predictions(arm, root, text_task) for arm in arms]
    return resample(
        name, task.name, [predictions for predictions, _ in outputs], outputs[0][1], name=text_task.primary_metric,
        task_metrics=text_task.metrics,
    )  # fmt: skip


def collect(inputs: ReportInputs, root: Path) -> Results:
    """Every cell of the table, with the average over tasks as a last row."""
    results: Results = {}
    for entries in zip(*(seed.arms for seed in inputs.seeds), strict=True):
        task = entries[0].task
        results[task.name] = {
            arm.name: pooled_score(arm.name, task, [entry.arm(arm.name) for entry in entries], root)
            for arm in entries[0].arms
        }
    return with_average(results)


def metrics_frame(inputs: ReportInputs, root: Path) -> pd.DataFrame:
    """Every metric of every task for every arm, in points, means over vectors and seeds: task, metric, arm, points."""
    rows = []
    for entries in zip(*(seed.arms for seed in inputs.seeds), strict=True):
        task = entries[0].task.task
        for arm in entries[0].arms:
            scores = []
            for entry in entries:
                predictions, labels = arm_predictions(entry.arm(arm.name), root, task)
                scores.append({name: value.mean() for name, value in compute_metrics(task.metrics, predictions, labels).items()})
            for name in scores[0]:
                points = float(np.mean([score[name] for score in scores]))
                rows.append({"task": task.name, "metric": name, "arm": arm.name, "points": points})
    return pd.DataFrame(rows)


def with_average(results: Results) -> Results:
    arms = next(iter(results.values()))
    return results | {AVERAGE: {arm: average_over_tasks([row[arm] for row in results.values()]) for arm in arms}}


def save_results(out: Path, results: Mapping[str, Mapping[str, ResampledScore]]) -> None:
    """Write every score with its resamples, so that other tables can take differences without scoring anew."""
    tensors: dict[str, torch.Tensor] = {}
    keys: list[tuple[str, str, list[list[str]]]] = []
    for task, row in results.items():
        for arm, score in row.items():
            tensors[f"{task}|{arm}|per_seed"] = torch.from_numpy(score.per_seed)
            tensors[f"{task}|{arm}|resampled"] = torch.from_numpy(score.resampled)
            keys.append((task, arm, [[key.task, key.metric, key.examples] for key in score.keys]))
    write_tensors(out / "scores.safetensors", tensors)
    write_json(out / "scores.json", keys)


def load_results(folder: Path) -> Results:
    """What `save_results` wrote in a sealed artifact."""
    tensors = read_tensors(folder, "scores.safetensors")
    results: Results = {}
    for task, arm, keys in read_json(folder, "scores.json"):
        results.setdefault(task, {})[arm] = ResampledScore(
            arm=arm, keys=tuple(TaskKey(*key) for key in keys), per_seed=tensors[f"{task}|{arm}|per_seed"].numpy(),
            resampled=tensors[f"{task}|{arm}|resampled"].numpy(),
        )  # fmt: skip
    return results


def metric_of(score: ResampledScore) -> str:
    """The metric's name as a cell prints it; an average over tasks names no single one."""
    names = {key.metric for key in score.keys}
    return names.pop() if len(score.keys) == 1 else "mean of the tasks' metrics"


def results_frame(results: Results) -> pd.DataFrame:
    """The table in long form, in points: task, arm, metric, estimate, low, high, standard deviation over seeds."""
    return pd.DataFrame(
        [
            {"task": task, "arm": arm, "metric": metric_of(score)} | score.interval.model_dump()
            | {"num_seeds": len(score.per_seed), "seed_std": score.seed_std}
            for task, row in results.items()
            for arm, score in row.items()
        ]
    )  # fmt: skip


def compared_pairs(arms: Sequence[str]) -> list[tuple[str, str]]:
    """Which arms the report subtracts: like with like, a chosen vector from a chosen one, an ensemble from an ensemble."""
    singles = [arm for arm in arms if "generated" not in arm and "ensemble" not in arm]
    pairs = [("generated", arm) for arm in singles if "generated" in arms]
    pairs += [("generated (mean)", arm) for arm in singles if "generated (mean)" in arms and "original" not in arm]
    if {"generated (ensemble)", "checkpoints (ensemble)"} <= set(arms):
        pairs.append(("generated (ensemble)", "checkpoints (ensemble)"))
    return pairs


def differences_frame(results: Results) -> pd.DataFrame:
    """Paired differences on the same examples, in points, with what the seeds say.

    claim: holds, ties or fails for "the first is better": it needs an interval over examples and one over seeds.
    """
    rows = []
    for task, row in results.items():
        for first, second in compared_pairs(list(row)):
            difference = row[first] - row[second]
            seeds = difference.seed_interval
            rows.append(
                {"task": task, "difference": f"{first} - {second}"} | difference.interval.model_dump()
                | {"seed_std": difference.seed_std, "seed_low": seeds and seeds.low, "seed_high": seeds and seeds.high}
                | {"claim": claim(difference) if seeds else "one seed"}
            )  # fmt: skip
    return pd.DataFrame(rows)


def text_table(results: Results) -> str:
    """The table for a terminal; each cell `score [low, high]`. Many arms stand in rows, few in columns."""
    arms = list(next(iter(results.values())))
    rows = [["task", "metric", *arms]]
    for task, row in results.items():
        rows.append([task, metric_of(row[arms[0]]), *(str(row[arm].interval) for arm in arms)])
    if len(arms) > _WIDE:
        return _ruled([list(column) for column in zip(*rows, strict=True)], head=2, foot=0)
    return _ruled(rows, head=1, foot=1)


def _ruled(rows: list[list[str]], head: int, foot: int) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    rule = "-" * max(map(len, lines))
    end = len(lines) - foot
    return "\n".join([*lines[:head], rule, *lines[head:end], *([rule] if foot else []), *lines[end:]])
