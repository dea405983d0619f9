"""docs/RESULTS.md: the numbers of the committed set of experiments, the claims, and what they cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cpdiff_core.artifacts import read_json
from cpdiff_core.experiment_config import ExperimentConfig
from cpdiff_core.reports.claims import Claim, ablation_claims, audit_claims, score_claims
from cpdiff_core.reports.comparison import Row, comparison_table, markdown, read_row
from cpdiff_core.reports.facts import FACTS_FILE, Facts
from cpdiff_core.reports.tables import AVERAGE

_TABLES = {
    "table3": "Table 3: the number of checkpoints N",
    "table4a": "Table 4a: normalisation (statistics by coordinate; `task-vector` is our default)",
    "table4b": "Table 4b: condition",
    "table4c": "Table 4c: blocks that are generated (the others keep the last checkpoint)",
    "extra": "Without the autoencoder, and other samplers",
}
LINKED_FIGURES = ("novelty", "similarity", "tsne", "trajectory")
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
    parts = [
        "# Results",
        "Made by one command, which goes on where it stopped:",
        f"```sh\n{command}\n```",
        f"{first.device}, {date}, commit {first.commit or 'unknown'}; seeds {', '.join(map(str, first.seeds))}; "
        f"{total_seconds:.0f} s in all. MiniLM-L6, all six GLUE tasks. Each cell is the mean over seeds with its 95 % "
        "bootstrap interval over validation examples, then ± the standard deviation over seeds. QNLI is trained on a subset "
        "of its training split (12,096 rows) and does not compare with the paper's, nor does any MiniLM number with a BERT one.",
        choices(finished[0].config),
        "## Claims",
        "A difference counts only if its interval over examples and its interval over seeds (Student's t) lie on the same side "
        "of 0. Nothing here corrects for the number of claims.",
        claim_table(claims_of(rows, facts, [item.name for item in audited])),
    ]
    for item in audited:
        runs = "single trajectory" if item.config.num_runs == 1 else f"zoo of {item.config.num_runs} runs a task"
        parts += [
            f"## Table 1, r = {item.config.lora.rank}, {runs}",
            comparison_table([rows[item.name]], item.config.arms),
            "Audit:",
            "\n".join(f"- {found.verdict}; with seeds: {found.seed_claim}" for found in facts[item.name].tasks.values()),
            figure_links(item),
        ]
    for table, title in _TABLES.items():
        members = [rows[name] for name in rows if name.startswith(f"{table}/")]
        if members:
            parts += [f"## {title}", comparison_table(members, _ABLATION_ARMS)]
    parts += [weights_table(facts), "## Mixed metrics", mixed, "## Cost", cost_table(facts)]
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
             f"{fine_tune.weight_decay:g}, warm-up {fine_tune.warmup_steps}", f"{split} (search of Sec. 4.1) or prior work"),
            ("soup fine-tuned: lr and steps", f"{config.soup_tuning.learning_rate}, {config.soup_tuning.num_steps}",
             "validation averages of a prototype (METHOD.md): favours the control"),
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


def figure_links(item: Finished) -> str:
    names = [name for name in LINKED_FIGURES if (item.report / f"{name}.png").is_file()]
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
    return "## What the autoencoder keeps, and what it saves\n\n" + markdown(header, lines)


def cost_table(facts: Mapping[str, Facts]) -> str:
    lines = [
        (name, *(_cost(found, stage) for stage in ("harvest_checkpoints", "fit_autoencoder", "fit_diffusion",
                                                   "generate_candidates", "score_report")),
         f"{sum(cost.seconds for cost in found.cost.values()):.0f}")
        for name, found in facts.items()
    ]  # fmt: skip
    note = (
        "Seconds of all seeds where each artifact was computed, waiting for other processes on the same device included; "
        "artifacts shared between rows count in each of them."
    )
    header = ("experiment", "harvest", "autoencoder", "diffusion", "generation", "scoring on validation", "all stages")
    return f"{note}\n\n" + markdown(header, lines)


def _cost(found: Facts, stage: str) -> str:
    cost = found.cost.get(stage)
    if cost is None:
        return "-"
    return f"{cost.seconds:.0f}" + (f", {cost.peak_gpu_gib:.1f} GiB" if cost.peak_gpu_gib else "")


def worked_mixed_metrics(row: Row, mixed: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """METHOD.md section 3 on our own numbers: the generated arm by F1 and Pearson beside an original by combined score.

    mixed: task -> metric -> arm -> points, means over seeds.
    """
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
