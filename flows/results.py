"""`cpdiff results`: every experiment behind docs/RESULTS.md, in one command that goes on where it stopped.

A single small model leaves a GPU idle between kernels, so several processes share one: the command gives the flow a
cluster of local workers, unless CPDIFF_DASK names another.
"""

from __future__ import annotations

import datetime
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefect import flow

from cpdiff_core.config import RuntimeConfig
from cpdiff_core.experiments import ExperimentConfig
from flows.tables import reports_of
from tasks.stage import bring, folder

_COMPARED = "## What is compared\n"
FINDINGS = rf"(?ms)^## Findings\n.*?(?=^{_COMPARED})"
"""A section that people write and a new run keeps."""


@flow(name="compute-results", persist_result=False)
def compute_results(experiments: tuple[ExperimentConfig, ...], runtime: RuntimeConfig = RuntimeConfig()) -> dict[str, str]:
    """Compute several experiments; returns the folder of the report by the experiment's name.

    Args:
        experiments: Which ones; what they share is computed once.
        runtime: Where and how fast. Nothing here changes the result.
    """
    longest_first = sorted(experiments, key=_expected_cost, reverse=True)
    reports = reports_of(longest_first, runtime)
    for report in reports:
        bring(report)
    return {item.name: str(folder(report)) for item, report in zip(longest_first, reports, strict=True)}


def _expected_cost(item: ExperimentConfig) -> tuple[int, int, int]:
    return (item.audit is not None, item.num_runs, item.lora.rank)


def write_results(
    chosen: Sequence[Any], reports: dict[str, Path], out: Path, runtime: RuntimeConfig, seconds: float
) -> None:
    """RESULTS.md, and beside it the figures, the long tables and the reports of the audited experiments."""
    from cpdiff_core.reports.comparison import comparison_frame, read_row
    from cpdiff_core.reports.results_page import Finished, linked_figures, results_markdown, worked_mixed_metrics

    finished = [Finished(item, reports[item.name]) for item in chosen]
    folder = out / "results"
    folder.mkdir(parents=True, exist_ok=True)
    rows = [read_row(item.config, item.report) for item in finished]
    arms = list(dict.fromkeys(arm for row in rows for arm in row.config.arms))
    comparison_frame(rows, arms).to_csv(folder / "results.csv", index=False, float_format="%.3f")
    for item in finished:
        name = item.name.replace("/", "-")
        shutil.copy(item.report / "facts.json", folder / f"{name}-facts.json")
        if item.config.audit is not None:  # the others' figures are in their reports
            shutil.copy(item.report / "report.html", folder / f"{name}.html")
            for figure in linked_figures(item.report):
                shutil.copy(item.report / f"{figure}.png", folder / f"{name}-{figure}.png")
    mixed = ""
    if {"generated", "original (oracle)"} <= set(finished[0].config.arms):
        mixed = worked_mixed_metrics(rows[0], _all_metrics(finished[0]))
    command = "cpdiff results" + (" --data-dir DIR" if runtime.data_dir else "")
    page = results_markdown(finished, command, datetime.date.today().isoformat(), seconds, mixed)
    target = out / "RESULTS.md"
    kept = re.search(FINDINGS, target.read_text(encoding="utf-8")) if target.is_file() else None
    target.write_text(page.replace(_COMPARED, (kept.group() if kept else "") + _COMPARED, 1), encoding="utf-8")


def _all_metrics(item: Any) -> dict[str, dict[str, dict[str, float]]]:
    """task -> metric -> arm -> points, of the tasks with a combined score."""
    import pandas as pd

    frame = pd.read_csv(item.report / "metrics.csv")
    found: dict[str, dict[str, dict[str, float]]] = {}
    for task, part in frame.groupby("task"):
        if "combined_score" in set(part["metric"]):
            for metric, rows in part.groupby("metric"):
                found.setdefault(str(task), {})[str(metric)] = dict(zip(rows["arm"], rows["points"], strict=True))
    return found
