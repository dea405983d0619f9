"""The paper's tables: every row is an experiment, and what rows share is computed once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from prefect import flow

from cpdiff_core.artifacts import Artifact
from cpdiff_core.config import RuntimeConfig
from cpdiff_core.domains.glue.data import SplitConfig
from cpdiff_core.domains.glue.fine_tuning import FineTuneConfig
from cpdiff_core.domains.glue.full_tuning import FullTuningConfig
from cpdiff_core.domains.glue.heads import HeadConfig
from cpdiff_core.experiments import QUICKSTART, TABLES, BaseName, ExperimentConfig, TableName
from cpdiff_core.reports.inputs import ReportInputs
from flows.pipeline import compute_all
from tasks import arm_stages, stages
from tasks.engine import each
from tasks.prefect_artifacts import publish
from tasks.stage import folder

Data = Literal["excerpt", "full"]
EXCERPT_HARVEST = 50
"""Checkpoints harvested on the excerpt, where a row's N becomes its share of them."""
EXCERPT_ARMS = ("no-LoRA", "original (oracle)", "original (selected)", "model soup", "generated", "generated (mean)", "full")


@flow(name="reproduce-table", flow_run_name="{table} on {base}, {data} data", persist_result=False)
def reproduce_table(
    table: TableName = "table1", base: BaseName = "minilm-l6", num_seeds: int = 1, data: Data = "full",
    runtime: RuntimeConfig = RuntimeConfig(),
) -> str:  # fmt: skip
    """Compute every row of one of the paper's tables; returns the path of the table.

    Args:
        table: Which table of the paper; `extra` has what is beyond it.
        base: The base model. minilm-l6 needs nothing from a hub; the others come from it.
        num_seeds: So many seeds, pooled. A claim about the method needs at least two.
        data: full is the six GLUE tasks; excerpt shows the table on three, within the package and minutes.
        runtime: Where and how fast. Nothing here changes the result.
    """
    rows = tuple(row.model_copy(update={"num_seeds": num_seeds}) for row in TABLES[table](base))
    if data == "excerpt":
        return table_of(f"{table}-{base}-excerpt", tuple(on_excerpt(row) for row in rows), runtime)
    return table_of(f"{table}-{base}", rows, runtime)


def on_excerpt(row: ExperimentConfig) -> ExperimentConfig:
    """What distinguishes a row of a table, on the quickstart's tasks and smaller than that: about a minute on a CPU.

    It shows what the table will look like; the paper's numbers are left out, for nothing here compares with them.
    """
    harvest = row.fine_tune.num_harvest
    autoencoder = row.autoencoder
    if autoencoder.kind == "conv":
        training = autoencoder.training.model_copy(update={"steps": 20, "batch_size": 64})
        autoencoder = autoencoder.model_copy(update={"training": training})
    diffusion = QUICKSTART.diffusion
    values = {
        "name": f"excerpt/{row.name}",
        "tasks": QUICKSTART.tasks,
        "splits": SplitConfig(max_selection=48, max_report=100),
        "head": HeadConfig(max_examples=200),
        "fine_tune": FineTuneConfig(
            num_steps=60, batch_size=16, warmup_steps=6, max_length=64, num_harvest=EXCERPT_HARVEST
        ),
        "full": FullTuningConfig(num_epochs=0.2, num_evaluations=2, max_length=64),
        "num_runs": min(row.num_runs, 2),
        "num_checkpoints": max(1, round(row.num_checkpoints / harvest * EXCERPT_HARVEST)),
        "scored_checkpoints": 5,
        "autoencoder": autoencoder,
        "diffusion": diffusion.model_copy(update={"training": diffusion.training.model_copy(update={"steps": 150})}),
        "sampling": row.sampling.model_copy(update={"num_candidates": 5}),
        "arms": tuple(arm for arm in row.arms if arm in EXCERPT_ARMS),
        "paper": None,
        "economies": (
            "an excerpt of 3 tasks, 60 fine-tuning steps of 16 examples, 150 diffusion steps, 100 examples to report on: "
            "this shows how the table is made, its numbers say nothing about the method",
            f"N is scaled from {harvest} harvested checkpoints to {EXCERPT_HARVEST}; 5 checkpoints and 5 candidates scored",
        ),
    }
    # Validated anew: a copy would skip the checks between fields.
    return ExperimentConfig.model_validate(dict(row) | values)


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
