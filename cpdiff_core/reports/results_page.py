"""docs/RESULTS.md: the numbers of the committed set of experiments, the claims, and what they cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cpdiff_core.artifacts import read_json
from cpdiff_core.evaluation.arms import MEANING
from cpdiff_core.experiment_config import ExperimentConfig
from cpdiff_core.reports.claims import MARGIN, Claim, ablation_claims, audit_claims, score_claims
from cpdiff_core.reports.comparison import Row, comparison_table, markdown, read_row
from cpdiff_core.reports.facts import FACTS_FILE, Facts
from cpdiff_core.reports.tables import AVERAGE

_TABLES = {
    "table3": "Table 3: the number of checkpoints N",
    "table4a": "Table 4a: normalisation (statistics by coordinate; `task-vector` is our default)",
    "table4b": "Table 4b: condition",
    "table4c": "Table 4c: blocks that are generated (the others keep the last checkpoint; the paper's are 0-1, 0-4, 0-8, 0-11)",
    "extra": "Without the autoencoder, and other samplers",
}
_LINKED_FIGURES = ("novelty", "similarity", "tsne", "trajectory")
_ABLATION_ARMS = ("generated", "generated (mean)")


@dataclass(frozen=True)
class Finished:
    """One finished experiment of the set and the folder of its report."""

    config: ExperimentConfig
    report: Path

    @property
    def name(self) -> str:
        return self.config.name.removeprefix("results/")

    @property
    def facts(self) -> Facts:
        return Facts.model_validate(read_json(self.report, FACTS_FILE))


def results_markdown(finished: Sequence[Finished], command: str, date: str, total_seconds: float, mixed: str) -> str:
    """The page. Where experiments of the set are missing, their tables and claims are left out and named."""
    rows = {item.name: read_row(item.config, item.report) for item in finished}
    facts = {item.name: item.facts for item in finished}
    audited = [item for item in finished if item.config.audit is not None]
    first = facts[finished[0].name]
    claims = claims_of(rows, facts, [item.name for item in audited])
    parts = [
        "# Results",
        "Made by one command, which goes on where it stopped:",
        f"```sh\n{command}\n```",
        f"{first.device}, {date}, commit {first.commit or 'unknown'}; seeds {', '.join(map(str, first.seeds))}; the command's "
        f"last call took {total_seconds:.0f} s. MiniLM-L6, all six GLUE tasks. Each cell is the mean over seeds with its 95 % "
        "bootstrap interval over validation examples, then ± the standard deviation over seeds (0 without LoRA: the head and the "
        "splits are the same for all). QNLI is trained on a subset of its training split (12,096 rows) and does not compare with "
        "the paper's, nor does any MiniLM number with a BERT one. Lines in italics are the paper's, on BERT-base at the same "
        "rank, without metric names. Not run: full fine-tuning, other ranks, other base models; "
        "[STYLE.md](STYLE.md) has the claims about styles.",
        files(audited),
        "## What is compared",
        arm_meanings(finished),
        "Economies: " + "; ".join(dict.fromkeys(text for item in finished for text in item.config.economies)) + "."
        if any(item.config.economies for item in finished) else "",
        choices(finished[0].config),
        "## Claims",
        "A difference counts only if its interval over examples and its interval over seeds (Student's t) lie on the same side "
        "of 0: above, the claim **holds**, below, it **fails**, and all else **ties**. *Comparable* holds if both lie above "
        f"-{MARGIN:g} point; else it fails if both lie below 0. A claim about each task, or about several differences, holds if "
        "every one holds and fails if one fails. Where only vectors are measured there is no interval over examples. Nothing "
        "here corrects for the number of claims.",
        glance(claims),
        claim_table(claims),
    ]  # fmt: skip
    for item in audited:
        runs = "single trajectory" if item.config.num_runs == 1 else f"zoo of {item.config.num_runs} runs a task"
        parts += [
            f"## Table 1, r = {item.config.lora.rank}, {runs}",
            comparison_table([rows[item.name]], item.config.arms),
            "Audit: the mean of the generated vectors against the best trivial generator, chosen on the selection split among "
            "those that reach the distance. The word at the end asks for the interval over seeds too.",
            "\n".join(f"- {found.verdict}; with seeds: {found.seed_claim}" for found in facts[item.name].tasks.values()),
            audit_table(facts[item.name]),
            figure_links(item),
        ]
    if audited:
        parts += [_AUDIT_NOTE, _FIGURE_NOTE]
    for table, title in _TABLES.items():
        members = [rows[name] for name in rows if name.startswith(f"{table}/")]
        if members:
            parts += [f"## {title}", comparison_table(members, _ABLATION_ARMS)]
    mixed_section = f"## Mixed metrics\n\nOn {finished[0].name}. {mixed}" if mixed else ""
    parts += [weights_table(facts), mixed_section, "## Cost", cost_table(facts)]
    return "\n\n".join(part for part in parts if part) + "\n"


def choices(config: ExperimentConfig) -> str:
    """What was chosen, and on which split."""
    fine_tune, split = config.fine_tune, config.splits.selection_split
    return markdown(
        ("choice", "value", "made on"),
        [
            ("checkpoint of *original (selected)*, candidate of *generated*, annealed run", "best of its set", split),
            ("best trivial family", "best of those that reach the distance", split),
            ("*original (oracle)*", "best checkpoint", "validation (as in the paper; an upper bound)"),
            ("fine-tuning", f"lr {fine_tune.learning_rate:g}, {fine_tune.num_steps} steps, weight decay "
             f"{fine_tune.weight_decay:g}, warm-up {fine_tune.warmup_steps}",
             f"{split}: the search of Sec. 4.1, evidence in `cpdiff_core/tuned/minilm-l6.json`"),
            ("soup fine-tuned: lr and steps", f"{config.soup_tuning.learning_rate}, {config.soup_tuning.num_steps}",
             "validation averages, before this program: favours the control"),
            ("autoencoder, diffusion, sampler", "defaults", "reconstruction and training loss"),
        ],
    )  # fmt: skip


def claims_of(rows: Mapping[str, Row], facts: Mapping[str, Facts], audited: Sequence[str]) -> list[Claim]:
    claims = [found for name in audited for found in score_claims(name, rows[name])]
    default = "r1-single"
    try:
        claims += ablation_claims(rows, default)
    except (KeyError, IndexError):  # the set is not complete
        claims.append(Claim("claims of Tables 3, 4a, 4b, 4c", default, "-", "not all rows have been run", "not tested"))
    return claims + [found for name in audited for found in audit_claims(name, facts[name])]


def claim_table(claims: Sequence[Claim]) -> str:
    return markdown(
        ("claim", "on", "test", "our figures (points unless said)", "verdict"),
        [(one.text, one.setting, one.test, one.figure, f"**{one.verdict}**") for one in claims],
    )


def glance(claims: Sequence[Claim]) -> str:
    """Claims against experiments: the verdicts alone."""
    settings = list(dict.fromkeys(one.setting for one in claims))
    verdict = {(one.text, one.setting): one.verdict for one in claims}
    texts = list(dict.fromkeys(one.text for one in claims))
    return markdown(("claim", *settings), [(text, *(verdict.get((text, name), "") for name in settings)) for text in texts])


def files(audited: Sequence[Finished]) -> str:
    """Where the pages and the numbers in full lie."""
    pages = ", ".join(f"[{item.name}](results/{item.name.replace('/', '-')}.html)" for item in audited)
    return (
        (f"The pages with every vector, difference and audit figure (download, then open): {pages}. " if pages else "")
        + "Every cell of the tables with three decimals: [results.csv](results/results.csv). Audit, geometry, trajectories and "
        "cost of each experiment: `results/*-facts.json`."
    )


def arm_meanings(finished: Sequence[Finished]) -> str:
    """Every arm of the tables in words."""
    arms = dict.fromkeys(arm for item in finished for arm in item.config.arms)
    return markdown(("arm", "what it is"), [(arm, MEANING[arm]) for arm in arms])


_AUDIT_NOTE = (
    "In the audit tables distances, IoU and distinct are means over seeds. *distance*: median distance to the nearest training "
    "vector on dW = BA; beside it the training vectors' own to their nearest other one. *shared mistakes*: largest "
    "wrong-prediction IoU with one of the scored checkpoints; beside it these checkpoints' own with each other (STS-B: an error "
    "above 0.5 is wrong). *distinct*: different prediction vectors among the candidates. *mean*, *chosen*: generated minus the "
    "best trivial generator at equal distance, as means of 20 and as the best of 20 chosen alike. *other condition*, *other "
    "statistics*: what the score loses with another task's. Points, with intervals over examples."
)
_FIGURE_NOTE = (
    "Figures, in their order: score against novelty (hollow: a trivial generator that does not reach the distance; the dotted "
    "line is the training vectors' own distance); largest wrong-prediction IoU with a training checkpoint against score, first "
    "seed; t-SNE of training and generated vectors, first seed; distance of samples to the nearest training vector on their way "
    "from noise (dotted: the training vectors' own), first seed."
)


def audit_table(facts: Facts) -> str:
    """The audit's figures by task, means over seeds."""

    def mean(values: Sequence[float | None]) -> str:
        known = [value for value in values if value is not None]
        return f"{np.mean(known):.2f}" if known else "-"

    lines = [
        (
            task,
            f"{mean(found.generated_distance)}; {mean(found.training_distance)}",
            f"{sum(found.copies)} of {found.num_candidates * len(found.copies)}",
            f"{mean(found.generated_training_iou)}; {mean(found.training_training_iou)}",
            f"{np.mean(found.num_distinct):.3g}",
            *("-" if one is None else f"{one.over_examples}" for one in (
                found.against_mean, found.against_best, found.effects.get("another task's condition"),
                found.effects.get("another task's statistics"),
            )),
        )
        for task, found in facts.tasks.items()
    ]  # fmt: skip
    names = ("task", "distance", "copies", "shared mistakes", "distinct", "mean", "chosen", "other condition", "other statistics")
    return markdown(names, lines)


def linked_figures(report: Path) -> list[str]:
    """Names of the figures that the page shows of a report."""
    return [name for name in _LINKED_FIGURES if (report / f"{name}.png").is_file()]


def figure_links(item: Finished) -> str:
    names = linked_figures(item.report)
    folder = item.name.replace("/", "-")
    return " ".join(f"![{name} of {item.name}](results/{folder}-{name}.png)" for name in names)


def weights_table(facts: Mapping[str, Facts]) -> str:
    """Why normalisation matters, or does not: what the autoencoder keeps under each (seed by seed)."""
    lines = [
        (
            name,
            ", ".join(f"{quality['within_task_variance_explained']:.3f}" for quality in found.autoencoder),
            ", ".join(f"{quality['pca16_within_task_variance_explained']:.3f}" for quality in found.autoencoder),
            f"{found.autoencoder[0]['vector_numbers']:.0f} -> {found.autoencoder[0]['latent_numbers']:.0f}",
            _cost(found, "fit_diffusion"),
        )
        for name, found in facts.items()
    ]
    header = ("experiment", "within-task variance kept, by seed", "by a PCA of 16", "K -> latent", "diffusion: seconds, peak GiB")
    note = (
        "The share of the training vectors' variance inside their tasks that is left after encoding and decoding, beside that "
        "of a PCA of 16 components (1 where vectors do not vary, or without an autoencoder). The diffusion model works on the "
        f"latent. {_PEAK_NOTE}"
    )
    return f"## What the autoencoder keeps, and what it saves\n\n{note}\n\n" + markdown(header, lines)


def cost_table(facts: Mapping[str, Facts]) -> str:
    lines = [
        (name, *(_cost(found, stage) for stage in ("harvest_checkpoints", "fit_autoencoder", "fit_diffusion",
                                                   "generate_candidates", "score_report")),
         f"{sum(cost.seconds for cost in found.cost.values()):.0f}")
        for name, found in facts.items()
    ]  # fmt: skip
    note = (
        "Seconds of all seeds where each artifact was computed, waiting for other processes on the same device included; "
        "artifacts shared between rows count in each of them. Where only some blocks are generated, the drawing of these (-) is "
        f"not counted. {_PEAK_NOTE}"
    )
    header = ("experiment", "harvest", "autoencoder", "diffusion", "generation", "scoring on validation", "all stages")
    return f"{note}\n\n" + markdown(header, lines)


_PEAK_NOTE = "Peaks are the process's, with what other stages still held: they bound a stage's need and do not compare."


def _cost(found: Facts, stage: str) -> str:
    cost = found.cost.get(stage)
    if cost is None:
        return "-"
    return f"{cost.seconds:.0f}" + (f", {cost.peak_gpu_gib:.1f} GiB" if cost.peak_gpu_gib else "")


def worked_mixed_metrics(row: Row, mixed: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """What mixing metrics would do to our own numbers: the generated arm by F1 and Pearson beside an original by combined score.

    mixed: task -> metric -> arm -> points, means over seeds; of the tasks with a combined score. Empty if there is none.
    """
    if not mixed:
        return ""
    lines = [
        (task, name, f"{values['generated']:.1f}", f"{values['original (oracle)']:.1f}",
         f"{values['generated'] - values['original (oracle)']:+.1f}")
        for task, metrics in mixed.items()
        for name, values in metrics.items()
    ]  # fmt: skip
    shift = {
        task: metrics[first]["generated"] - metrics["combined_score"]["generated"]
        for task, metrics in mixed.items()
        for first in [next(name for name in ("f1", "pearson") if name in metrics)]
    }
    average = row.results[AVERAGE]["generated"] - row.results[AVERAGE]["original (oracle)"]
    num = len(row.results) - 1
    like = average.estimate
    return "\n\n".join(
        [
            "One metric for both arms, each in turn:",
            markdown(("task", "metric", "generated", "original (oracle)", "difference"), lines),
            f"On one metric (combined score) generated - original averages {like:+.2f} over {num} tasks. Were the generated side "
            f"read as F1 and Pearson and the original as combined score, as the released code and logs suggest, the same "
            f"predictions would average {like + sum(shift.values()) / num:+.2f}: {sum(shift.values()) / num:+.2f} points come "
            "from the mixing alone. Our tables cannot mix: a score knows its metric, and subtraction refuses another.",
        ]
    )
