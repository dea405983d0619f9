"""One self-contained HTML page per experiment, with the same results as CSV and as text beside it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cpdiff_core.artifacts import Artifact, read_json, write_json
from cpdiff_core.domains.glue.data_checks import remarks
from cpdiff_core.evaluation.arms import MEANING
from cpdiff_core.evaluation.audit import novelty_unit
from cpdiff_core.evaluation.geometry import Geometry
from cpdiff_core.experiment_config import ExperimentConfig
from cpdiff_core.generator.probing import Trajectory
from cpdiff_core.paper import paper_scores
from cpdiff_core.reports.audit_section import TaskAudit, audit_tasks, effect_line
from cpdiff_core.reports.cost import CostReport, cost_report
from cpdiff_core.reports.explorer import Reading, explorer
from cpdiff_core.reports.facts import FACTS_FILE, collect_facts
from cpdiff_core.reports.figures import draw_figures
from cpdiff_core.reports.html import Pictures, counted, render
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
from cpdiff_core.reports.vector_figures import draw_vectors
from cpdiff_core.reports.vectors import TaskVectors, candidates_frame, collect_vectors


def write_report(out: Path, config: ExperimentConfig, inputs: ReportInputs, root: Path) -> None:
    """Write report.html, results.csv, candidates.csv, differences.csv, scores.*, summary.txt and the figures into `out`."""
    results = collect(inputs, root)
    audits = audit_tasks(inputs, results, root)
    save_results(out, results)
    cost = experiment_cost(inputs, root)
    facts = collect_facts(inputs, audits, root).model_copy(update={"spending": cost.lines})
    write_json(out / FACTS_FILE, facts.model_dump(mode="json"))
    results_frame(results).to_csv(out / "results.csv", index=False)
    metrics_frame(inputs, root).to_csv(out / "metrics.csv", index=False)
    differences = differences_frame(results)
    differences.to_csv(out / "differences.csv", index=False)
    vectors = collect_vectors(config, inputs, root)
    candidates_frame(vectors.values()).to_csv(out / "candidates.csv", index=False, float_format="%.6g")
    quality = read_json(inputs.seeds[0].generator.autoencoder.under(root), "quality.json")
    notes, warning, first_line = reading_notes(config, inputs), autoencoder_warning(quality), headline(results)
    summary = [*([warning, ""] if warning else []), text_table(results), "", first_line, ""]
    summary += [audit.verdict.text for audit in audits.values()] + ([""] if audits else []) + [f"- {n}" for n in notes]
    (out / "summary.txt").write_text("\n".join(summary) + "\n", encoding="utf-8")
    page = report_page(out, config, inputs, results, differences.to_dict("records"), vectors, audits, cost, root)
    (out / "report.html").write_text(page, encoding="utf-8")


def report_page(
    out: Path, config: ExperimentConfig, inputs: ReportInputs, results: Results, differences: list[dict[Any, Any]],
    vectors: dict[str, TaskVectors], audits: dict[str, TaskAudit], cost: CostReport, root: Path,
) -> str:  # fmt: skip
    """The page; its figures are written into `out` on the way."""
    figures, pictures = draw_figures(out, inputs, results, audits, root), Pictures(out)
    explored = explorer(list(vectors.values()), reading(config, vectors))
    fallback = {} if explored is None else {name: pictures.source(f"{name}.png") for name in draw_vectors(out, explored)}
    trajectories = trajectory_data(inputs, audits, root)
    geometries = [
        Geometry.model_validate(read_json(seed.geometry.under(root), "geometry.json"))
        for seed in inputs.seeds
        if seed.geometry is not None
    ]
    quality = read_json(inputs.seeds[0].generator.autoencoder.under(root), "quality.json")
    return render(
        "report.html.j2", {"explore": explored and explored.data(), "trajectory": trajectories},
        config=config, warning=autoencoder_warning(quality), headline=headline(results), notes=reading_notes(config, inputs),
        arms=list(results[AVERAGE]), tasks=[task for task in results if task != AVERAGE], results=results, metric_of=metric_of,
        spans=column_spans(results), differences=differences, average=AVERAGE, quality=quality, meaning=MEANING,
        audits=audits, effect_line=effect_line, geometries=geometries,
        paper=paper_scores(config.paper) if config.paper else {}, explorer=explored,
        fallback={"vectors": "", "map": ""} | fallback, trajectory=trajectories, cost=cost,
        figures=[(pictures.source(f"{name}.png"), caption) for name, caption in figures],
        configuration=json.dumps(config.model_dump(mode="json"), indent=1),
    )  # fmt: skip


def column_spans(results: Results) -> dict[str, tuple[float, float]]:
    """task -> (lowest, highest) bound of any arm: the scale of its column's bars."""
    intervals = {task: [score.interval for score in row.values()] for task, row in results.items()}
    return {task: (min(one.low for one in found), max(one.high for one in found)) for task, found in intervals.items()}


def reading(config: ExperimentConfig, vectors: dict[str, TaskVectors]) -> Reading:
    """How the page calls the scores and distances of single vectors."""
    single = all(len(one.units) > 0 for one in vectors.values()) and config.num_checkpoints * config.num_runs == 1
    unit = novelty_unit(single)
    return Reading(
        splits={"selection": "selection examples", "report": "validation examples"},
        columns={"selection": "selection score", "report": "validation score"},
        decimals={"selection": 1, "report": 1},
        xlabel=f"distance to the nearest training vector on \u0394W (1: {unit})", distance_name="to the nearest, on \u0394W",
        note="Scores are points of a single vector, without interval; the selection score is what chooses. "
        f"Novelty is the distance over {unit}; at 1 or below "
        "a candidate counts as a copy. Disagreement: share of examples on which it predicts otherwise than another "
        "candidate, mean over the others"
        + (" (regression: by more than 0.5)." if any(task.labels is None for task in config.tasks) else "."),
    )  # fmt: skip


def trajectory_data(inputs: ReportInputs, audits: dict[str, TaskAudit], root: Path) -> dict[str, Any]:
    """task -> the first seed's samples at every step; empty if they were not followed."""
    first = inputs.seeds[0]
    if first.trajectory is None:
        return {}
    found = Trajectory.model_validate(read_json(first.trajectory.under(root), "trajectory.json"))
    return {
        task: {
            "steps": found.steps, "reference": audits[task].audits[0].novelty.factors.training_median,
            "lines": {"decoded x_t": found.distance[task], "predicted weights": found.predicted[task]},
        }
        for task in found.distance
    }  # fmt: skip


def experiment_cost(inputs: ReportInputs, root: Path) -> CostReport:
    """Against fine-tuning one adapter for each task: a run of each, with its head. Of the first seed."""
    first = inputs.seeds[0]
    runs = [entry.runs[0] for entry in first.zoo.tasks]
    candidates = [artifact for entry in first.arms for artifact in entry.used if artifact.stage in _CANDIDATES]
    chose = [artifact for entry in first.arms for artifact in _chose(entry.used, candidates, root)]
    several = ", one seed" if len(inputs.seeds) > 1 else ""
    made = "a chosen candidate" if chose else "candidates"
    return cost_report(
        artifacts_in(inputs), runs, [*candidates, *chose],
        (f"simply fine-tuning: one adapter for each task{several}", f"generating: {made} for each task{several}"),
        root,
    )  # fmt: skip


_CANDIDATES = ("generate_candidates", "fill_blocks")


def _chose(used: Iterable[Artifact], candidates: list[Artifact], root: Path) -> list[Artifact]:
    """The selection scores of the candidates."""
    scores = [artifact for artifact in used if artifact.stage == "score_selection"]
    return [artifact for artifact in scores if set(named_sources(artifact, root)) & set(candidates)]


def named_sources(scores: Artifact, root: Path) -> list[Artifact]:
    """The artifacts whose vectors were scored."""
    sources = read_json(scores.under(root), "config.json")["inputs"]["vectors"]["sources"]
    return [Artifact(**source) for source in sources]


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


_PRINTED = 1e-3
"""Of a share of variance. With 16 vectors or fewer a PCA keeps all but rounding, which nothing else can."""


def autoencoder_warning(quality: dict[str, float]) -> str | None:
    """The report's first line if the autoencoder explains less within a task than a PCA of 16 components."""
    explained, reference = (quality[f"{name}within_task_variance_explained"] for name in ("", "pca16_"))
    if explained >= reference - _PRINTED:
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
    normalized = config.normalization
    notes = ["Scores are points (100 x the metric); brackets are 95 % percentile bootstrap intervals over validation examples."]
    choosing = {"original (selected)": "", "generated": f" (best of {sampling.num_candidates})", "full": ""}
    if config.num_runs > 1:
        choosing["annealed"] = f" (best of {config.num_runs} runs)"
    if chose := [arm + choosing[arm] for arm in config.arms if arm in choosing]:
        notes.append(f"Chosen on {chosen[config.splits.selection_split]}: {', '.join(chose)}.")
    if "original (oracle)" in config.arms:
        notes.append(f"original (oracle) is {MEANING['original (oracle)']}.")
    notes += [
        f"Head: {config.head.kind}, fixed from step 0 and shared by all arms"
        + (" but full, whose head is trained" if "full" in config.arms else "")
        + ("; no-LoRA is the frozen base with that head." if "no-LoRA" in config.arms else "."),
        f"{config.base_model.name}, LoRA rank {config.lora.rank}, {counted(config.num_runs, 'run')} per task, "
        f"N = {counted(entries[0].num_checkpoints, 'checkpoint')}.",
        f"Condition {config.condition.kind}; normalisation {normalized.scope}"
        + (f" by {normalized.axis}" if normalized.scope != "none" else "")
        + f"; sampler {sampling.scheduler}, {counted(sampling.num_inference_steps, 'step')}, "
        + f"{counted(sampling.num_candidates, 'candidate')}.",
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
    notes += [f"WARNING: {line}." for entry in entries for line in remarks(entry.task, config.splits)]
    return notes + [f"This preset's economy: {text}." for text in config.economies]
