"""Several experiments side by side: the paper's tables, whose rows are experiments and whose columns are tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from cpdiff_core.artifacts import checked
from cpdiff_core.evaluation.bootstrap import ResampledScore
from cpdiff_core.experiment_config import ExperimentConfig
from cpdiff_core.paper import paper_scores
from cpdiff_core.reports.tables import AVERAGE, Results, load_results, metric_of


@dataclass(frozen=True)
class Row:
    """One experiment of a table, read from its report."""

    config: ExperimentConfig
    results: Results

    @property
    def label(self) -> str:
        return self.config.name.split("/")[-1]

    @property
    def paper(self) -> dict[str, dict[str, float]]:
        return paper_scores(self.config.paper) if self.config.paper else {}


def read_row(config: ExperimentConfig, report: Path) -> Row:
    return Row(config, load_results(report))


def cell(score: ResampledScore) -> str:
    """`estimate [low, high] +- spread over seeds`, in points."""
    spread = "" if score.seed_std is None else f" ± {score.seed_std:.1f}"
    return f"{score.interval}{spread}"


def comparison_frame(rows: Sequence[Row], arms: Sequence[str]) -> pd.DataFrame:
    """Long form: row, arm, task, metric, estimate, low, high, seed_std, the paper's number (for the arm it prints)."""
    records = []
    for row in rows:
        for task, scores in row.results.items():
            for arm in arms:
                if arm in scores:
                    score = scores[arm]
                    records.append(
                        {"row": row.config.name, "arm": arm, "task": task, "metric": metric_of(score)}
                        | score.interval.model_dump()
                        | {"seed_std": score.seed_std, "paper": row.paper.get(task, {}).get(arm)}
                    )  # fmt: skip
    return pd.DataFrame(records)


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A pipe table."""
    rows = [list(header), ["---"] * len(header), *[list(line) for line in lines]]
    return "\n".join("| " + " | ".join(value.replace("|", "/") for value in row) + " |" for row in rows)


def comparison_table(rows: Sequence[Row], arms: Sequence[str]) -> str:
    """Experiments and arms in rows, tasks in columns, the paper's numbers under ours where it prints that arm."""
    tasks = list(rows[0].results)
    header = ["row", "arm", *[f"{task} ({metric_of(rows[0].results[task][_first(rows[0], arms)])})" for task in tasks]]
    lines = []
    for row in rows:
        for arm in arms:
            if arm not in row.results[AVERAGE]:
                continue
            lines.append([row.label, arm, *[cell(row.results[task][arm]) for task in tasks]])
            if any(arm in scores for scores in row.paper.values()):
                printed = [row.paper.get(task, {}).get(arm) for task in tasks]
                lines.append(["", f"*{arm}, the paper's*", *["" if value is None else f"*{value}*" for value in printed]])
    return markdown(header, lines)


def shared_notes(reports: Sequence[Path]) -> list[str]:
    """What one must know to read several reports side by side: the notes that all of them have below their tables, what has
    been saved at first, then the seeds."""
    texts = [checked(report, "summary.txt").read_text(encoding="utf-8") for report in reports]
    notes = [[line.removeprefix("- ") for line in text.splitlines() if line.startswith("- ")] for text in texts]
    shared = [note for note in notes[0] if all(note in others for others in notes[1:])]
    first = ("This preset's economy", "Seed")
    return sorted(shared, key=lambda note: next((i for i, start in enumerate(first) if note.startswith(start)), len(first)))


def _first(row: Row, arms: Sequence[str]) -> str:
    return next(arm for arm in arms if arm in row.results[AVERAGE])
