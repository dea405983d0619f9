"""The numbers of one report that other tables and the claims need, as one JSON file."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from cpdiff_core.artifacts import provenance_of, read_json
from cpdiff_core.config import Config
from cpdiff_core.evaluation.bootstrap import Interval, ResampledScore, average_over_tasks, claim
from cpdiff_core.evaluation.geometry import Geometry
from cpdiff_core.generator.probing import Trajectory
from cpdiff_core.reports.audit_section import TaskAudit
from cpdiff_core.reports.cost import Spending
from cpdiff_core.reports.inputs import ReportInputs, artifacts_in

FACTS_FILE = "facts.json"


class Difference(Config):
    """A paired difference in points: over examples, over seeds, and what follows."""

    name: str
    over_examples: Interval
    over_seeds: Interval | None
    claim: str

    @classmethod
    def of(cls, score: ResampledScore) -> Difference:
        return cls(
            name=score.arm, over_examples=score.interval, over_seeds=score.seed_interval,
            claim=claim(score) if score.seed_interval else "one seed",
        )  # fmt: skip


class TaskFacts(Config):
    """The audit of one task: per-seed figures in tuples."""

    verdict: str
    kind: str
    seed_claim: str
    copies: tuple[int, ...]
    num_candidates: int
    generated_distance: tuple[float, ...]
    training_distance: tuple[float | None, ...]
    factor_training_distance: tuple[float | None, ...]
    generated_training_iou: tuple[float, ...]
    training_training_iou: tuple[float | None, ...]
    num_distinct: tuple[int, ...]
    dispersion: tuple[float | None, ...]
    against_mean: Difference | None
    against_best: Difference | None
    effects: dict[str, Difference]


class StageCost(Config):
    """What one kind of stage cost over all seeds: computed artifacts, seconds, largest peak of GPU memory."""

    num: int
    seconds: float
    peak_gpu_gib: float | None


class Facts(Config):
    """Everything of a report but the scores."""

    seeds: tuple[int, ...]
    device: str
    commit: str | None
    autoencoder: tuple[dict[str, float], ...]
    tasks: dict[str, TaskFacts]
    against_trivial: Difference | None
    separation_training: tuple[float, ...]
    separation_generated: tuple[float, ...]
    trajectories: tuple[Trajectory, ...]
    cost: dict[str, StageCost]
    spending: tuple[Spending, ...] = ()


def collect_facts(inputs: ReportInputs, audits: dict[str, TaskAudit], root: Path) -> Facts:
    """Read the audit, the geometry, the trajectories, the autoencoders' quality and the costs of all seeds."""
    geometries = [
        Geometry.model_validate(read_json(seed.geometry.under(root), "geometry.json")) for seed in inputs.seeds if seed.geometry
    ]
    trajectories = tuple(
        Trajectory.model_validate(read_json(seed.trajectory.under(root), "trajectory.json"))
        for seed in inputs.seeds
        if seed.trajectory
    )
    against = [audit.against_mean for audit in audits.values() if audit.against_mean is not None]
    diffusion = inputs.seeds[0].generator.diffusion
    provenance = provenance_of([diffusion], root)[diffusion]
    return Facts(
        seeds=tuple(seed.seed for seed in inputs.seeds),
        device=str(provenance.get("device", "")), commit=provenance.get("commit"),
        autoencoder=tuple(read_json(seed.generator.autoencoder.under(root), "quality.json") for seed in inputs.seeds),
        tasks={task: _task_facts(task, audit, geometries) for task, audit in audits.items()},
        against_trivial=Difference.of(average_over_tasks(against)) if against and len(against) == len(audits) else None,
        separation_training=_known(found.separation("training") for found in geometries),
        separation_generated=_known(found.separation("generated") for found in geometries),
        trajectories=trajectories, cost=stage_costs(inputs, root),
    )  # fmt: skip


def _known(values: Iterable[float | None]) -> tuple[float, ...]:
    return tuple(value for value in values if value is not None)


def _task_facts(task: str, audit: TaskAudit, geometries: list[Geometry]) -> TaskFacts:
    found = [one.novelty for one in audit.audits]
    return TaskFacts(
        verdict=audit.verdict.text, kind=audit.verdict.kind, seed_claim=audit.seed_claim,
        copies=tuple(one.copies for one in found), num_candidates=len(found[0].product.generated),
        generated_distance=tuple(one.product.generated_median for one in found),
        training_distance=tuple(one.product.training_median for one in found),
        factor_training_distance=tuple(one.factors.training_median for one in found),
        generated_training_iou=tuple(one.iou.generated_training_max for one in audit.audits),
        training_training_iou=tuple(one.iou.training_training_max for one in audit.audits),
        num_distinct=tuple(one.diversity.num_distinct for one in audit.audits),
        dispersion=tuple(one.dispersion(task) for one in geometries),
        against_mean=audit.against_mean and Difference.of(audit.against_mean),
        against_best=audit.against_best and Difference.of(audit.against_best),
        effects={change: Difference.of(difference) for change, difference in audit.effects},
    )  # fmt: skip


def stage_costs(inputs: ReportInputs, root: Path) -> dict[str, StageCost]:
    """Seconds by kind of stage, where each artifact was computed; shared artifacts count once."""
    costs: dict[str, list[dict[str, float]]] = {}
    for artifact, made in provenance_of(artifacts_in(inputs), root).items():
        costs.setdefault(artifact.stage, []).append(made)
    return {
        name: StageCost(
            num=len(values), seconds=float(np.sum([value["seconds"] for value in values])),
            peak_gpu_gib=max((_gib(value) for value in values), default=None) or None,
        )
        for name, values in costs.items()
    }  # fmt: skip


def _gib(provenance: dict[str, float]) -> float:
    peak = provenance.get("peak_gpu_bytes") or 0.0
    return float(peak) / 2**30
