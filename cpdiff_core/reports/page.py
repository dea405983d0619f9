"""One self-contained HTML page per experiment, with the same results as CSV and as text beside it."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from cpdiff_core.artifacts import provenance_of, read_json, write_json
from cpdiff_core.evaluation.arms import MEANING
from cpdiff_core.evaluation.geometry import Geometry
from cpdiff_core.experiment_config import ExperimentConfig
from cpdiff_core.paper import paper_scores
from cpdiff_core.reports.audit_section import audit_tasks, effect_line
from cpdiff_core.reports.facts import FACTS_FILE, collect_facts
from cpdiff_core.reports.figures import draw_figures
from cpdiff_core.reports.inputs import ReportInputs, artifacts_in
from cpdiff_core.reports.tables import (
    AVERAGE,
    Results,
    collect,
    differences_frame,
    metric_of,
    metrics_frame,
    results_frame,
    save_results,
    text_table,
)


def write_report(out: Path, config: ExperimentConfig, inputs: ReportInputs, root: Path) -> None:
    """Write report.html, results.csv, differences.csv, scores.*, summary.txt and the figures into `out`."""
    results = collect(inputs, root)
    audits = audit_tasks(inputs, results, root)
    save_results(out, results)
    facts = collect_facts(inputs, audits, root)
    write_json(out / FACTS_FILE, facts.model_dump(mode="json"))
    results_frame(results).to_csv(out / "results.csv", index=False)
    metrics_frame(inputs, root).to_csv(out / "metrics.csv", index=False)
    differences = differences_frame(results)
    differences.to_csv(out / "differences.csv", index=False)
    figures = draw_figures(out, inputs, results, audits, root)
    geometries = [
        Geometry.model_validate(read_json(seed.geometry.under(root), "geometry.json"))
        for seed in inputs.seeds
        if seed.geometry is not None
    ]
    quality = read_json(inputs.seeds[0].generator.autoencoder.under(root), "quality.json")
    notes, warning, first_line = reading_notes(config, inputs), autoencoder_warning(quality), headline(results)
    summary = [*([warning, ""] if warning else []), text_table(results), "", first_line, ""]
    summary += [audit.verdict.text for audit in audits.values()] + ([""] if audits else []) + [f"- {n}" for n in notes]
    (out / "summary.txt").write_text("\n".join(summary) + "\n", encoding="utf-8")
    stages = cost_rows(inputs, root)
    environment = Environment(
        loader=PackageLoader("cpdiff_core.reports"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    page = environment.get_template("report.html.j2").render(
        config=config, warning=warning, headline=first_line, notes=notes, arms=list(results[AVERAGE]), results=results,
        metric_of=metric_of, differences=differences.to_dict("records"), average=AVERAGE, quality=quality, stages=stages,
        seconds=sum(stage["seconds"] for stage in stages), meaning=MEANING, audits=audits, effect_line=effect_line,
        geometries=geometries, paper=paper_scores(config.paper) if config.paper else {}, provenance=stages[0] if stages else {},
        figures=[(embedded(out / f"{name}.png"), caption) for name, caption in figures],
        configuration=json.dumps(config.model_dump(mode="json"), indent=1),
    )  # fmt: skip
    (out / "report.html").write_text(page, encoding="utf-8")


def embedded(path: Path) -> str:
    """A PNG as a data URI, so that the page is one file."""
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def headline(results: Results) -> str:
    """The claim that matters first: does generating beat not adapting, on average and paired?"""
    arms = results[AVERAGE]
    generated = next((arm for arm in ("generated", "generated (mean)") if arm in arms), None)
    against = next((arm for arm in ("no-LoRA", "original (selected)", "model soup") if arm in arms), None)
    if generated is None or against is None:
        return "This experiment has no two arms to compare in a headline."
    difference = (arms[generated] - arms[against]).interval
    verdict = "above 0" if difference.low > 0 else "not above 0"
    return f"{generated} - {against}, average, paired: {difference} points; the 95 % interval is {verdict}."


def autoencoder_warning(quality: dict[str, float]) -> str | None:
    """The report's first line if the autoencoder explains less within a task than a PCA of 16 components."""
    explained, reference = (quality[f"{name}within_task_variance_explained"] for name in ("", "pca16_"))
    if explained >= reference:
        return None
    return (
        f"WARNING: the autoencoder explains {explained:.1%} of the variance within tasks, a PCA of 16 components "
        f"{reference:.1%}; the generator cannot draw the rest{', little but task means' if explained < 0.5 else ''}."
    )


def reading_notes(config: ExperimentConfig, inputs: ReportInputs) -> list[str]:
    """What one must know to read the table."""
    chosen = {"held_out": "training examples held out of fine-tuning", "train": "the training examples themselves"}
    entries = inputs.seeds[0].arms
    sampling = config.sampling
    notes = [
        "Scores are points (100 x the metric); brackets are 95 % percentile bootstrap intervals over validation examples.",
        f"Chosen on {chosen[config.splits.selection_split]}: original (selected), generated (best of "
        f"{sampling.num_candidates}). original (oracle) is the best checkpoint on validation itself, as in the paper: "
        "nobody can choose it.",
        f"Head: {config.head.kind}, fixed from step 0 and shared by all arms; no-LoRA is the frozen base with that head.",
        f"{config.base_model.name}, LoRA rank {config.lora.rank}, {config.num_runs} run(s) per task, "
        f"N = {entries[0].num_checkpoints} checkpoints.",
        f"Condition {config.condition.kind}; normalisation {config.normalization.scope} by {config.normalization.axis}; "
        f"sampler {sampling.scheduler}, {sampling.num_inference_steps} steps, {sampling.num_candidates} candidates.",
    ]
    seeds = ", ".join(str(seed.seed) for seed in inputs.seeds)
    if len(inputs.seeds) == 1:
        notes.append(f"Seed {seeds} alone: one seed says nothing about the spread over seeds, and proves no claim.")
    else:
        notes.append(
            f"Seeds {seeds}, pooled: each cell is the mean over seeds, its interval is over examples; the spread over "
            "seeds stands apart, and a claim needs both."
        )
    if "annealed" in config.arms:
        notes.append(f"annealed: {config.annealing.num_steps} more steps, learning rate to 0, AdamW's moments from zero.")
    if "soup fine-tuned" in config.arms:
        tuning = config.soup_tuning
        notes.append(
            f"soup fine-tuned: {tuning.num_steps} steps of {tuning.batch_size or config.fine_tune.batch_size} examples. "
            "The generator's own training spends no step on the tasks' loss."
        )
    if config.blocks is not None:
        blocks = config.blocks
        notes.append(f"Blocks {blocks.first}-{blocks.last} are generated; the others hold: {blocks.fill}.")
    if config.paper is not None:
        notes.append(
            f"The paper's numbers are {config.paper.table}, row '{config.paper.row}': another base or split unless named "
            "so, without metric names, and possibly of mixed metrics; they are never subtracted from ours."
        )
    if any(entry.task.name == "qnli" for entry in entries):
        notes.append("QNLI: if trained on a subset of its training split (12,096 rows), it does not compare with the paper's.")
    return notes + [f"This preset's economy: {text}." for text in config.economies]


def cost_rows(inputs: ReportInputs, root: Path) -> list[dict[str, Any]]:
    """Where and in how many seconds each artifact behind the report was computed, from its provenance."""
    found = provenance_of(artifacts_in(inputs), root)
    return [{"stage": artifact.stage, "fingerprint": artifact.fingerprint} | made for artifact, made in found.items()]
