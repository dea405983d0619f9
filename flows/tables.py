"""The paper's tables: every row is an experiment, and what rows share is computed once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from prefect import flow

from cpdiff_core.artifacts import Artifact
from cpdiff_core.config import RuntimeConfig
from cpdiff_core.experiments import TABLES, BaseName, ExperimentConfig, TableName
from cpdiff_core.reports.inputs import ReportInputs
from flows.pipeline import compute_all
from tasks import arm_stages, stages
from tasks.engine import each
from tasks.prefect_artifacts import publish
from tasks.stage import folder


@flow(name="reproduce-table", persist_result=False)
def reproduce_table(
    table: TableName = "table1", base: BaseName = "minilm-l6", num_seeds: int = 1, runtime: RuntimeConfig = RuntimeConfig()
) -> str:
    """Compute every row of one of the paper's tables; returns the path of the table.

    Args:
        table: Which table of the paper; `extra` has what is beyond it.
        base: The base model. minilm-l6 needs nothing from a hub; the others come from it.
        num_seeds: So many seeds, pooled. A claim about the method needs at least two.
        runtime: Where and how fast. Nothing here changes the result.
    """
    rows = tuple(row.model_copy(update={"num_seeds": num_seeds}) for row in TABLES[table](base))
    return table_of(f"{table}-{base}", rows, runtime)


def table_of(name: str, rows: tuple[ExperimentConfig, ...], runtime: RuntimeConfig) -> str:
    """Any experiments side by side. For use inside a flow."""
    made = folder(arm_stages.table(name, rows, reports_of(rows, runtime)))
    publish(name, made)
    return str(Path(made) / "table.md")


def reports_of(experiments: Sequence[ExperimentConfig], runtime: RuntimeConfig) -> tuple[Artifact, ...]:
    """The reports of several experiments. For use inside a flow."""
    return tuple(each("report", report_of, list(zip(experiments, compute_all(experiments, runtime), strict=True))))


def report_of(experiment: ExperimentConfig, inputs: ReportInputs) -> Artifact:
    return stages.report(experiment, inputs)
