"""Two experiments side by side: the same arm of both on the same validation examples, paired."""

from __future__ import annotations

import pandas as pd

from cpdiff_core.config import Config, UserError
from cpdiff_core.evaluation.bootstrap import average_over_tasks, claim
from cpdiff_core.experiment_config import ExperimentConfig
from cpdiff_core.reports.tables import AVERAGE, Results

_NOTHING_SHARED = "compare: the two experiments have no task and arm in common; choose others"


def check_comparable(a: Config, b: Config) -> None:
    """What is known of two experiments before either is computed, which may take hours. Raises UserError for experiments
    on styles, for nothing in common, for another metric, and for numbers of seeds that do not pair up."""
    if not (isinstance(a, ExperimentConfig) and isinstance(b, ExperimentConfig)):
        raise UserError("compare: one of the two experiments is on styles; choose two on texts")
    tasks = {task.name: task for task in a.tasks}
    shared = [(tasks[task.name], task) for task in b.tasks if task.name in tasks]
    if not shared or not set(a.arms) & set(b.arms):
        raise UserError(_NOTHING_SHARED)
    for mine, theirs in shared:
        if mine.primary_metric != theirs.primary_metric:
            raise UserError(
                f"compare: task {mine.name!r} is scored by {mine.primary_metric} and by {theirs.primary_metric}; give both "
                "the same table_metric"
            )
    if a.num_seeds != b.num_seeds and 1 not in (a.num_seeds, b.num_seeds):
        raise UserError(f"compare: {a.num_seeds} and {b.num_seeds} seeds do not pair up; give both the same num_seeds")


def compare(a: Results, b: Results) -> pd.DataFrame:
    """task, arm, a, b, estimate, low, high of a - b in points, and the claim "a is better" where there are seeds.

    Only what both have is compared, and the average is over the tasks that both have. Raises UserError if they share
    nothing, or if a shared task was scored on other examples or by another metric.
    """
    tasks = [task for task in a if task in b and task != AVERAGE]
    arms = [arm for arm in a[AVERAGE] if arm in b[AVERAGE]]
    if not tasks or not arms:
        raise UserError(_NOTHING_SHARED)
    rows = []
    for task in [*tasks, AVERAGE]:
        for arm in arms:
            if task == AVERAGE:
                first, second = (average_over_tasks([results[name][arm] for name in tasks]) for results in (a, b))
            else:
                first, second = a[task][arm], b[task][arm]
            try:
                difference = first - second
            except ValueError as error:
                raise UserError(f"compare: {error}; run both on the same data, splits and number of seeds") from error
            rows.append(
                {"task": task, "arm": arm, "a": first.estimate, "b": second.estimate}
                | difference.interval.model_dump()
                | {"claim": claim(difference) if difference.seed_interval else "one seed"}
            )
    return pd.DataFrame(rows)


def comparison_table(frame: pd.DataFrame, a: str, b: str) -> str:
    """The comparison for a terminal."""
    rows = [["task", "arm", a, b, "difference [95 % interval], paired", "first is better"]]
    for row in frame.to_dict("records"):
        interval = f"{row['estimate']:+.1f} [{row['low']:+.1f}, {row['high']:+.1f}]"
        rows.append([row["task"], row["arm"], f"{row['a']:.1f}", f"{row['b']:.1f}", interval, row["claim"]])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)
