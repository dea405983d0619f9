"""The paper's claims one by one: our test, our interval, and whether it holds, ties or fails.

A difference is paired over examples and over seeds, and counts only if both of its 95 % intervals lie on one side of 0
(`bootstrap.claim`). Where a claim is a conjunction it holds if every part holds and fails if one part fails.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from cpdiff_core.evaluation.bootstrap import Interval, ResampledScore, claim
from cpdiff_core.reports.comparison import Row
from cpdiff_core.reports.facts import Difference, Facts
from cpdiff_core.reports.tables import AVERAGE

MARGIN = 1.0
"""Points: what counts as comparable."""


@dataclass(frozen=True)
class Claim:
    """One line of the claim table. setting: which experiment it was tested on."""

    text: str
    setting: str
    test: str
    figure: str
    verdict: str


def difference_text(difference: ResampledScore) -> str:
    return _intervals(difference.interval, difference.seed_interval)


def _intervals(examples: Interval, seeds: Interval | None) -> str:
    return f"{examples}" + (f"; seeds [{seeds.low:.1f}, {seeds.high:.1f}]" if seeds else "; one seed")


def all_hold(verdicts: Sequence[str]) -> str:
    """holds if all do, fails if one does, else ties."""
    if all(verdict == "holds" for verdict in verdicts):
        return "holds"
    return "fails" if "fails" in verdicts else "ties"


def not_worse(difference: ResampledScore, margin: float = MARGIN) -> str:
    """Whether the first arm is at most `margin` points worse: both intervals above -margin."""
    intervals = [difference.interval, difference.seed_interval]
    if all(interval is not None and interval.low > -margin for interval in intervals):
        return "holds"
    return "fails" if claim(difference) == "fails" else "ties"


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """(mean, low, high): Student's t over independent values; infinite for one value."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, -math.inf, math.inf
    half = float(stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values)))
    return mean, mean - half, mean + half


def score_claims(setting: str, row: Row) -> list[Claim]:
    """Claims about the arms of one experiment."""
    average = row.results[AVERAGE]
    better = average["generated"] - average["original (oracle)"]
    fair = average["generated"] - average["original (selected)"]
    tasks = {task: scores for task, scores in row.results.items() if task != AVERAGE}
    soups = {task: claim(scores["model soup"] - scores["original (oracle)"]) for task, scores in tasks.items()}
    fair_soups = {task: claim(scores["model soup"] - scores["original (selected)"]) for task, scores in tasks.items()}
    claims = [
        Claim("generated is comparable to or better than original", setting,
              f"generated (selected) - original (oracle), average: both intervals above -{MARGIN:g}",
              difference_text(better), not_worse(better)),
        Claim("the same against an original that one can choose", setting,
              f"generated (selected) - original (selected), average: both intervals above -{MARGIN:g}",
              difference_text(fair), not_worse(fair)),
        Claim("generated is better than original (selected)", setting, "the same difference above 0", difference_text(fair),
              claim(fair)),
        Claim("the soup is sometimes better than original", setting,
              "soup - original (oracle), each task: above 0 on at least one; fails if below 0 on all",
              f"above 0 against the oracle: {_names(soups, 'holds')}; against original (selected): "
              f"{_names(fair_soups, 'holds')}",
              "holds" if "holds" in soups.values() else ("ties" if "ties" in soups.values() else "fails")),
    ]  # fmt: skip
    if "no-LoRA" in average:
        alone = average["generated"] - average["no-LoRA"]
        claims.insert(0, Claim("(ours) generated is better than no adapter", setting, "generated (selected) - no-LoRA, average",
                               difference_text(alone), claim(alone)))  # fmt: skip
    if "annealed" in average:
        annealed = average["generated"] - average["annealed"]
        claims.append(Claim("(ours) generated is better than the annealed run", setting,
                            "generated (selected) - annealed, average", difference_text(annealed), claim(annealed)))  # fmt: skip
    if "generated (mean)" in average and "model soup" in average:
        soup = average["generated (mean)"] - average["model soup"]
        claims.append(Claim("(ours) a generated vector is better than the soup", setting,
                            "generated (mean of 20) - soup, average", difference_text(soup), claim(soup)))  # fmt: skip
    if "soup fine-tuned" in average:
        tuned = average["generated"] - average["soup fine-tuned"]
        claims.append(Claim("(ours) generating beats spending a few steps on the soup", setting,
                            "generated (selected) - soup fine-tuned, average", difference_text(tuned), claim(tuned)))  # fmt: skip
    if "generated (ensemble)" in average and "checkpoints (ensemble)" in average:
        ensembles = average["generated (ensemble)"] - average["checkpoints (ensemble)"]
        claims.append(Claim("(ours) an ensemble of the generated beats one of as many checkpoints", setting,
                            "generated (ensemble) - checkpoints (ensemble), average", difference_text(ensembles),
                            claim(ensembles)))  # fmt: skip
    return claims


def audit_claims(setting: str, facts: Facts) -> list[Claim]:
    """Claims about what the generated vectors are."""
    if not facts.tasks:
        return []
    tasks, n = facts.tasks, next(iter(facts.tasks.values())).num_candidates
    memorised = [task for task, found in tasks.items() if any(2 * copies > n for copies in found.copies)]
    distances = [
        generated / training
        for found in tasks.values()
        for generated, training in zip(found.generated_distance, found.training_distance, strict=True)
        if training
    ]
    dispersion = {
        task: mean_interval([math.log(ratio) for ratio in found.dispersion if ratio])
        for task, found in tasks.items()
        if any(found.dispersion)
    }
    wider = {task: _sign(low, high) for task, (_, low, high) in dispersion.items()}
    separation = mean_interval([math.log(max(found, 1e-9)) for found in facts.separation_generated])
    mistakes = {
        task: mean_interval([g - t for g, t in zip(found.generated_training_iou, found.training_training_iou, strict=True)
                             if t is not None])
        for task, found in tasks.items()
        if None not in found.training_training_iou
    }  # fmt: skip
    effects = {task: _told(found.effects["another task's condition"]) for task, found in tasks.items()}
    kept, approach = _trajectory_figures(facts)
    claims = [
        Claim("generated weights are not copies", setting, "in no task and seed are most candidates nearer to a training vector "
              "(on dW) than the median training vector is to its nearest other one (mostly the step before or after it)",
              f"{sum(sum(found.copies) for found in tasks.values())} copies of {n * len(facts.seeds) * len(tasks)}; distance "
              f"{np.median(distances):.2g} x training's own (median)"
              + (f"; memorised: {', '.join(memorised)}" if memorised else ""),
              "fails" if memorised else "holds"),
        Claim("(ours) generated adapters make other mistakes than training checkpoints", setting,
              "largest wrong-prediction IoU with a scored checkpoint, generated - checkpoints' own with each other, each task: "
              "interval over seeds below 0",
              "; ".join(f"{task} {mean:+.2f} [{low:.2f}, {high:.2f}]" for task, (mean, low, high) in mistakes.items()
                        if math.isfinite(low)),
              all_hold([_sign(-high, -low) for _, low, high in mistakes.values()]) if mistakes else "not tested"),
        Claim("generated weights are more widely dispersed than the originals", setting,
              "spread of generated / spread of training, each task: interval over seeds above 1",
              "; ".join(f"{task} {math.exp(mean):.3f} [{math.exp(low):.3f}, {math.exp(high):.3f}]"
                        for task, (mean, low, high) in dispersion.items() if math.isfinite(low))
              + f"; above 1: {_names(wider, 'holds')}; below 1: {_names(wider, 'fails')}", all_hold(list(wider.values()))),
        Claim("the generated distributions of different tasks are alike", setting,
              "root mean square distance between tasks' means / spread inside tasks: interval over seeds below 1",
              f"generated {math.exp(separation[0]):.1f} [{math.exp(separation[1]):.1f}, {math.exp(separation[2]):.1f}]; training "
              f"{np.mean(facts.separation_training):.1f}", _sign(-separation[2], -separation[1])),
        Claim("sampling trajectories approach the originals and keep a distance", setting,
              "every task and seed: the last distance is below half of the first, and above the training vectors' own",
              f"last / first {approach:.2g}; last / training's own {kept:.2g} (medians)", _trajectory_verdict(facts)),
        Claim("the condition decides what is generated", setting,
              "right - another task's condition, same statistics and noises, each task: above 0",
              "; ".join(f"{task} {figures}" for task, (figures, _) in effects.items()),
              all_hold([verdict for _, verdict in effects.values()])),
    ]  # fmt: skip
    if facts.against_trivial is not None:
        claims.append(Claim("(ours) generated beats the best trivial generator at equal distance", setting,
                            "generated (mean of 20) - best family by selection, average of tasks",
                            *_told(facts.against_trivial)))  # fmt: skip
    return claims


def ablation_claims(rows: Mapping[str, Row], default: str) -> list[Claim]:
    """Claims of Tables 3, 4a, 4b, 4c, from rows by name (`table3/minilm-n1`); differences of the mean over candidates."""
    def average(name: str, task: str = AVERAGE) -> ResampledScore:
        return rows[name].results[task]["generated (mean)"]

    ranges = [name for name in rows if name.startswith("table4c/")]
    batch = average("table4a/minilm-task") - average("table4a/minilm-batch")
    none = average("table4a/minilm-batch") - average("table4a/minilm-none")
    many = average("table3/minilm-n500") - average("table3/minilm-n1")
    mrpc = average("table3/minilm-n500", "mrpc") - average("table3/minilm-n1", "mrpc")
    blocks = average(ranges[-1]) - average(ranges[0])
    others = {
        name.removeprefix("table4b/minilm-"): average("table4b/minilm-task-info-few-shot") - average(name)
        for name in rows
        if name.startswith("table4b/") and not name.endswith("task-info-few-shot")
    }
    identity = average(default) - average("extra/minilm-no-autoencoder")
    return [
        Claim("task normalisation beats batch beats none", default,
              "both differences of the mean of 20, average (coordinate axis)",
              f"task - batch {difference_text(batch)}; batch - none {difference_text(none)}",
              all_hold([claim(batch), claim(none)])),
        Claim("larger N is better", default, "N = 500 - N = 1, mean of 20, average", difference_text(many), claim(many)),
        Claim("larger N is better on MRPC (paper: +4.5)", default, "N = 500 - N = 1, MRPC", difference_text(mrpc), claim(mrpc)),
        Claim("more blocks are better", default,
              f"blocks {ranges[-1].split('-', 1)[1]} minus blocks {ranges[0].split('-', 1)[1]}, mean of 20, average",
              difference_text(blocks), claim(blocks)),
        Claim("description + examples beats the other conditions", default, "its difference to each, mean of 20, average",
              "; ".join(f"{name} {difference_text(found)}" for name, found in others.items()),
              all_hold([claim(found) for found in others.values()])),
        Claim("the autoencoder helps the score", default, "with - without autoencoder, mean of 20, average",
              difference_text(identity), claim(identity)),
    ]  # fmt: skip


def _names(verdicts: Mapping[str, str], wanted: str) -> str:
    return ", ".join(task for task, verdict in verdicts.items() if verdict == wanted) or "none"


def _told(found: Difference) -> tuple[str, str]:
    """(figures, verdict) of a stored difference; one seed proves nothing."""
    return _intervals(found.over_examples, found.over_seeds), found.claim if found.over_seeds else "ties"


def _sign(low: float, high: float) -> str:
    """holds if an interval lies above 0, fails if below, else ties."""
    return "holds" if low > 0 else "fails" if high < 0 else "ties"


def _trajectory_figures(facts: Facts) -> tuple[float, float]:
    """(last distance over training's own, last over first), medians over tasks and seeds."""
    kept, approach = [], []
    for seed, found in enumerate(facts.trajectories):
        for task, distances in found.distance.items():
            own = facts.tasks[task].factor_training_distance[seed]
            approach.append(distances[-1] / distances[0])
            if own:
                kept.append(distances[-1] / own)
    return (float(np.median(kept)) if kept else math.nan), (float(np.median(approach)) if approach else math.nan)


def _trajectory_verdict(facts: Facts) -> str:
    verdicts = []
    for seed, found in enumerate(facts.trajectories):
        for task, distances in found.distance.items():
            own = facts.tasks[task].factor_training_distance[seed] or 0.0
            verdicts.append("holds" if distances[-1] < 0.5 * distances[0] and distances[-1] > own else "fails")
    share = verdicts.count("holds")
    return "holds" if share == len(verdicts) else "fails" if share == 0 else "ties"
