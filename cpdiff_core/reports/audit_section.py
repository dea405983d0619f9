"""The memorisation audit of a report: one verdict line per task, and the numbers behind it, pooled over seeds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter

from cpdiff_core.artifacts import read_json
from cpdiff_core.config import Config
from cpdiff_core.domains.glue.data import ResolvedTask
from cpdiff_core.evaluation.arms import AuditInputs, TaskArms
from cpdiff_core.evaluation.audit import (
    Distances,
    Diversity,
    IouSummary,
    Novelty,
    Verdict,
    best_family,
    condition_effect,
    verdict,
)
from cpdiff_core.evaluation.bootstrap import ResampledScore, claim
from cpdiff_core.evaluation.selection import SelectionScores
from cpdiff_core.evaluation.trivial import MatchedDistance
from cpdiff_core.reports.inputs import ReportInputs
from cpdiff_core.reports.tables import Results, pooled_score


class StoredAudit(Config):
    """What the audit stage writes for one task of one seed."""

    task: str
    regression: bool
    iou: IouSummary
    novelty: Novelty
    diversity: Diversity
    resembles: tuple[str, ...]


@dataclass(frozen=True)
class TaskAudit:
    """The audit of one task, pooled over seeds. matched: family -> one per seed; trivial: arm name -> score."""

    verdict: Verdict
    audits: tuple[StoredAudit, ...]
    matched: dict[str, tuple[MatchedDistance, ...]]
    trivial: dict[str, ResampledScore]
    against_mean: ResampledScore | None
    against_best: ResampledScore | None
    effects: tuple[tuple[str, ResampledScore], ...]

    @property
    def reached(self) -> tuple[str, ...]:
        """Families that come as far from the training vectors as the generated ones, with every seed."""
        return tuple(name for name, found in self.matched.items() if all(match.reached for match in found))

    @property
    def seed_claim(self) -> str:
        difference = self.against_mean
        if difference is None:
            return "unmatched"
        return claim(difference) if difference.seed_interval else "one seed"


def audit_tasks(inputs: ReportInputs, results: Results, root: Path) -> dict[str, TaskAudit]:
    """task -> its audit; empty if the experiment asked for none."""
    if inputs.seeds[0].arms[0].audit is None:
        return {}
    entries = zip(*(seed.arms for seed in inputs.seeds), strict=True)
    return {entry[0].task.name: _audit_task(entry, results[entry[0].task.name], root) for entry in entries}


def _audit_task(entries: tuple[TaskArms, ...], row: dict[str, ResampledScore], root: Path) -> TaskAudit:
    task = entries[0].task
    parts = [entry.audit for entry in entries if entry.audit is not None]
    audits = tuple(StoredAudit.model_validate(read_json(part.audit.under(root), "audit.json")) for part in parts)
    lists = [
        TypeAdapter(list[MatchedDistance]).validate_python(read_json(part.trivial.under(root), "matched.json"))
        for part in parts
    ]
    matched = {found[0].family: found for found in zip(*lists, strict=True)}
    trivial = {
        arm.name: pooled_score(arm.name, task, [part.trivial_arms[i] for part in parts], root)
        for i, arm in enumerate(parts[0].trivial_arms)
    }
    effects = _effects(task, parts, root)
    reached = [name for name, found in matched.items() if all(match.reached for match in found)]
    against_mean = against_best = None
    name = ""
    if reached:
        selection = {family: _pooled_selection(family, parts) for family in reached}
        name, best = best_family(selection, "mean"), best_family(selection, "best")
        against_mean = row["generated (mean)"] - trivial[f"{name} (mean)"]
        if "generated" in row:
            against_best = row["generated"] - trivial[f"{best} (best)"]
    alike = [
        family for family in matched if 2 * sum(family in audit.resembles for audit in audits) > len(audits)
    ]
    found = verdict(task.name, pooled_novelty(audits), alike, name, against_mean.interval if against_mean else None)
    return TaskAudit(
        verdict=found, audits=audits, matched=matched, trivial=trivial, against_mean=against_mean,
        against_best=against_best, effects=effects,
    )  # fmt: skip


def pooled_novelty(audits: tuple[StoredAudit, ...]) -> Novelty:
    """The distances of all seeds together. A seed's copy distance is its own, so distances are brought to a common one."""
    copy_distance = float(np.mean([audit.novelty.copy_distance for audit in audits]))

    def joined(which: str, part: str, rescale: bool) -> tuple[float, ...]:
        return tuple(
            distance * (copy_distance / audit.novelty.copy_distance if rescale and audit.novelty.copy_distance > 0 else 1.0)
            for audit in audits
            for distance in getattr(getattr(audit.novelty, which), part)
        )

    return Novelty(
        factors=Distances(generated=joined("factors", "generated", False), training=joined("factors", "training", False)),
        product=Distances(generated=joined("product", "generated", True), training=joined("product", "training", True)),
        copy_distance=copy_distance,
    )


def effect_line(change: str, difference: ResampledScore) -> str:
    """One line on a changed condition."""
    return condition_effect(change, difference.interval)


def _pooled_selection(family: str, parts: list[AuditInputs]) -> SelectionScores:
    first = parts[0].trivial_selection[family]
    scores = tuple(score for part in parts for score in part.trivial_selection[family].scores)
    return first.model_copy(update={"scores": scores})


def _effects(task: ResolvedTask, parts: list[AuditInputs], root: Path) -> tuple[tuple[str, ResampledScore], ...]:
    """(change, right minus changed), pooled over seeds, the same noises on both sides."""
    right = pooled_score("right condition", task, [part.right for part in parts], root)
    return tuple(
        (arm.name, right - pooled_score(arm.name, task, [part.changed[i] for part in parts], root))
        for i, arm in enumerate(parts[0].changed)
    )
