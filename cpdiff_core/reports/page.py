"""One self-contained HTML page per experiment, with the same results as CSV and as text beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from cpdiff_core.artifacts import Artifact, read_json
from cpdiff_core.config import Config
from cpdiff_core.domains.base_models import BaseModel
from cpdiff_core.experiments import ExperimentConfig
from cpdiff_core.reports.tables import (
    ARMS,
    AVERAGE,
    Results,
    TaskArms,
    collect,
    differences_frame,
    metric_of,
    results_frame,
    text_table,
)


class ReportInputs(Config):
    """What a report is made from."""

    base: BaseModel
    autoencoder: Artifact
    diffusion: Artifact
    arms: tuple[TaskArms, ...]


def write_report(out: Path, config: ExperimentConfig, inputs: ReportInputs, root: Path) -> None:
    """Write report.html, results.csv, differences.csv and summary.txt into `out`."""
    results = collect(inputs.arms, root)
    quality = read_json(inputs.autoencoder.under(root), "quality.json")
    results_frame(results).to_csv(out / "results.csv", index=False)
    differences_frame(results).to_csv(out / "differences.csv", index=False)
    notes = reading_notes(config, inputs)
    warning = autoencoder_warning(quality)
    summary = [*([warning, ""] if warning else []), text_table(results), "", headline(results), "", *(f"- {n}" for n in notes)]
    (out / "summary.txt").write_text("\n".join(summary) + "\n", encoding="utf-8")
    environment = Environment(
        loader=PackageLoader("cpdiff_core.reports"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    page = environment.get_template("report.html.j2").render(
        config=config, warning=warning, headline=headline(results), notes=notes, arms=ARMS, results=results,
        metric_of=metric_of, differences=differences_frame(results).to_dict("records"), average=AVERAGE, quality=quality,
        stages=cost_rows(inputs, root), configuration=json.dumps(config.model_dump(mode="json"), indent=1),
    )  # fmt: skip
    (out / "report.html").write_text(page, encoding="utf-8")


def headline(results: Results) -> str:
    """The claim that matters first: does generating beat not adapting, on average and paired?"""
    difference = (results[AVERAGE]["generated"] - results[AVERAGE]["no-LoRA"]).interval
    verdict = "above 0" if difference.low > 0 else "not above 0"
    return f"generated - no-LoRA, average, paired: {difference} points; the 95 % interval is {verdict}."


def autoencoder_warning(quality: dict[str, float]) -> str | None:
    """The report's first line if the autoencoder explains less within a task than a PCA of 16 components."""
    explained, reference = (quality[f"{name}within_task_variance_explained"] for name in ("", "pca16_"))
    if explained >= reference:
        return None
    return (
        f"WARNING: the autoencoder explains {explained:.1%} of the variance within tasks, a PCA of 16 components "
        f"{reference:.1%}; the generator can draw little but task means."
    )


def reading_notes(config: ExperimentConfig, inputs: ReportInputs) -> list[str]:
    """What one must know to read the table."""
    chosen = {"held_out": "training examples held out of fine-tuning", "train": "the training examples themselves"}
    first = inputs.arms[0]
    notes = [
        "Scores are points (100 x the metric); brackets are 95 % percentile bootstrap intervals over validation examples.",
        f"Chosen on {chosen[config.splits.selection_split]}: original (selected), generated (best of "
        f"{config.sampling.num_candidates}). original (oracle) is the best checkpoint on validation itself, as in the paper: "
        "nobody can choose it.",
        f"Head: {config.head.kind}, fixed from step 0 and shared by all arms; no-LoRA is the frozen base with that head.",
        f"{config.base_model.name}, LoRA rank {config.lora.rank}, {config.num_runs} run(s) per task, "
        f"N = {first.num_checkpoints} checkpoints, seed {config.seed}. One seed says nothing about the spread over seeds.",
    ]
    if any(entry.task.name == "qnli" for entry in inputs.arms):
        notes.append("QNLI: if trained on a subset of its training split (12,096 rows), it does not compare with the paper's.")
    return notes + [f"This preset's economy: {text}." for text in config.economies]


def cost_rows(inputs: ReportInputs, root: Path) -> list[dict[str, Any]]:
    """Where and in how many seconds each artifact of the report was computed, from its provenance."""
    artifacts = [inputs.autoencoder, inputs.diffusion]
    for entry in inputs.arms:
        artifacts += [entry.head, entry.no_lora, entry.original, entry.soup, entry.generated]
    rows = []
    for artifact in artifacts:
        path = artifact.under(root) / "provenance.json"
        if path.is_file():
            rows.append({"stage": artifact.stage, "fingerprint": artifact.fingerprint} | json.loads(path.read_text()))
    return rows
