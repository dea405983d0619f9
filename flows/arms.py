"""Every arm of one task: which vectors it is, how the choice is made, and where its scores on validation lie."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from cpdiff_core.artifacts import Artifact
from cpdiff_core.config import RuntimeConfig
from cpdiff_core.domains.glue.continuation import ContinueConfig, continued
from cpdiff_core.domains.glue.data import ResolvedTask
from cpdiff_core.domains.glue.fine_tuning import HarvestConfig
from cpdiff_core.evaluation.arms import ArmName, AuditInputs, ScoredArm, TaskArms
from cpdiff_core.evaluation.scores import ReportArtifact, ScoringConfig, load_selection_scores
from cpdiff_core.evaluation.selection import SelectionScores, select
from cpdiff_core.evaluation.trivial import TRIVIAL_FAMILIES
from cpdiff_core.experiment_config import AuditConfig, ExperimentConfig, ResolvedExperiment
from cpdiff_core.generator.probing import CHANGES, telling_changes
from cpdiff_core.lora.vectors import evenly_spaced
from cpdiff_core.lora.zoo import VectorSet
from tasks import arm_stages, stages
from tasks.stage import root


@dataclass
class TaskScorer:
    """One task of one seed: its vectors, and the two ways to score them."""

    resolved: ResolvedExperiment
    task: ResolvedTask
    head: Artifact
    runs: tuple[Artifact, ...]
    generated: VectorSet
    generator: stages.Generator
    annealed: VectorSet | None
    tuned_soup: VectorSet | None
    runtime: RuntimeConfig
    used: list[Artifact] = field(default_factory=list)

    @property
    def config(self) -> ExperimentConfig:
        return self.resolved.config

    @property
    def scoring(self) -> ScoringConfig:
        config = self.config
        return ScoringConfig(
            base=self.resolved.base, task=self.task, splits=config.splits, lora=config.lora,
            max_length=config.fine_tune.max_length, precision=config.fine_tune.precision,
        )  # fmt: skip

    @property
    def checkpoints(self) -> VectorSet:
        """The scored checkpoints: evenly spaced in each run, its last one always among them."""
        each, runs = self.config.num_checkpoints, len(self.runs)
        share = min(each, -(-(self.config.scored_checkpoints or each * runs) // runs))
        rows = tuple(run * each + row for run in range(runs) for row in evenly_spaced(each, share))
        return VectorSet(kind="checkpoints", sources=self.runs, num_checkpoints=each, rows=rows)

    @property
    def soup(self) -> VectorSet:
        return VectorSet(kind="soup", sources=self.runs, num_checkpoints=self.config.num_checkpoints)

    @property
    def training(self) -> arm_stages.Training:
        return arm_stages.Training(
            base=self.resolved.base, lora=self.config.lora, task=self.task, runs=self.runs,
            num_checkpoints=self.config.num_checkpoints,
        )  # fmt: skip

    def selection(self, vectors: VectorSet) -> SelectionScores:
        scores = stages.score_selection(self.scoring, vectors, self.head, runtime=self.runtime)
        self.used.append(scores)
        return load_selection_scores(scores, root(), self.task.task, self.config.splits)

    def choose(self, vectors: VectorSet) -> int:
        return select(self.selection(vectors))

    def report(self, vectors: VectorSet) -> ReportArtifact:
        return stages.score_report(self.scoring, vectors, self.head, runtime=self.runtime)


def score_arms(scorer: TaskScorer) -> TaskArms:
    """Score the arms that the experiment asks for, and audit the candidates if it asks for that."""
    arms = tuple(_ARMS[name](scorer, name) for name in scorer.config.arms)
    audit = audit_task(scorer, scorer.config.audit) if scorer.config.audit else None
    trained_on = [vectors for vectors in (scorer.annealed, scorer.tuned_soup) if vectors is not None]
    return TaskArms(
        task=scorer.task, num_checkpoints=scorer.config.num_checkpoints * len(scorer.runs), arms=arms, audit=audit,
        used=(
            scorer.head, *scorer.runs, *scorer.generated.sources, *(vectors.sources[0] for vectors in trained_on),
            *dict.fromkeys(scorer.used),
        ),
    )  # fmt: skip


def _zeros(scorer: TaskScorer, name: ArmName) -> ScoredArm:
    return ScoredArm(name=name, scores=scorer.report(VectorSet(kind="zeros")), rows=(0,))


def _last(scorer: TaskScorer, name: ArmName) -> ScoredArm:
    checkpoints = scorer.checkpoints
    assert checkpoints.rows is not None
    each = scorer.config.num_checkpoints
    rows = tuple(i for i, row in enumerate(checkpoints.rows) if row % each == each - 1)
    return ScoredArm(name=name, scores=scorer.report(checkpoints), rows=rows)


def _oracle(scorer: TaskScorer, name: ArmName) -> ScoredArm:
    return ScoredArm(name=name, scores=scorer.report(scorer.checkpoints), use="oracle")


def _original(scorer: TaskScorer, name: ArmName) -> ScoredArm:
    checkpoints = scorer.checkpoints
    return ScoredArm(name=name, scores=scorer.report(checkpoints), rows=(scorer.choose(checkpoints),))


def _annealed(scorer: TaskScorer, name: ArmName) -> ScoredArm:
    assert scorer.annealed is not None
    chosen = scorer.choose(scorer.annealed) if len(scorer.runs) > 1 else 0
    return ScoredArm(name=name, scores=scorer.report(scorer.annealed), rows=(chosen,))


def _soup(scorer: TaskScorer, name: ArmName) -> ScoredArm:
    return ScoredArm(name=name, scores=scorer.report(scorer.soup), rows=(0,))


def _tuned_soup(scorer: TaskScorer, name: ArmName) -> ScoredArm:
    assert scorer.tuned_soup is not None
    return ScoredArm(name=name, scores=scorer.report(scorer.tuned_soup), rows=(0,))


def _checkpoint_ensemble(scorer: TaskScorer, name: ArmName) -> ScoredArm:
    total = scorer.config.num_checkpoints * len(scorer.runs)
    num = min(total, scorer.config.sampling.num_candidates)
    rng = np.random.default_rng([scorer.config.seed, total])
    rows = tuple(sorted(int(row) for row in rng.choice(total, num, replace=False)))
    return ScoredArm(
        name=name, scores=scorer.report(scorer.checkpoints.model_copy(update={"rows": rows})), rows=tuple(range(num)),
        use="ensemble",
    )  # fmt: skip


def _generated(scorer: TaskScorer, name: ArmName) -> ScoredArm:
    if name == "generated" and scorer.config.report_candidates == "chosen":
        chosen = scorer.generated.model_copy(update={"rows": (scorer.choose(scorer.generated),)})
        return ScoredArm(name=name, scores=scorer.report(chosen), rows=(0,))
    scores, every = scorer.report(scorer.generated), tuple(range(scorer.config.sampling.num_candidates))
    if name == "generated":
        return ScoredArm(name=name, scores=scores, rows=(scorer.choose(scorer.generated),))
    if name == "generated (random)":
        return ScoredArm(name=name, scores=scores, rows=(0,))
    return ScoredArm(name=name, scores=scores, rows=every, use="ensemble" if name == "generated (ensemble)" else "mean")


def _full(scorer: TaskScorer, name: ArmName) -> ScoredArm:
    config, base = scorer.config, scorer.resolved.base
    full = config.full.model_copy(update={"seed": config.fine_tune.seed})
    model = arm_stages.fine_tune_full(full, base, scorer.task, config.splits, runtime=scorer.runtime)
    scorer.used.append(model)
    scores = arm_stages.score_full(full, base, scorer.task, config.splits, model, runtime=scorer.runtime)
    return ScoredArm(name=name, scores=scores, rows=(0,))


_ARMS: dict[ArmName, Callable[[TaskScorer, ArmName], ScoredArm]] = {
    "no-LoRA": _zeros, "last": _last, "original (oracle)": _oracle, "original (selected)": _original,
    "annealed": _annealed, "model soup": _soup, "soup fine-tuned": _tuned_soup,
    "checkpoints (ensemble)": _checkpoint_ensemble, "generated": _generated, "generated (mean)": _generated,
    "generated (random)": _generated, "generated (ensemble)": _generated, "full": _full,
}  # fmt: skip


def audit_task(scorer: TaskScorer, config: AuditConfig) -> AuditInputs:
    """The trivial generators under the same choice as the candidates, changed conditions, and the audit's figures."""
    generated, training, runtime = scorer.generated, scorer.training, scorer.runtime
    seed = config.seed + scorer.config.seed
    trivial = arm_stages.trivial_vectors(training, generated, config.num_trivial, seed, runtime=runtime)
    vectors = VectorSet(kind="candidates", sources=(trivial,))
    chosen_by, reported = scorer.selection(vectors), scorer.report(vectors)
    arms, choice = [], {}
    for f, family in enumerate(TRIVIAL_FAMILIES):
        first, rows = f * config.num_trivial, tuple(range(f * config.num_trivial, (f + 1) * config.num_trivial))
        part = chosen_by.model_copy(update={"scores": tuple(chosen_by.scores[row] for row in rows)})
        arms.append(ScoredArm(name=f"{family} (mean)", scores=reported, rows=rows))
        arms.append(ScoredArm(name=f"{family} (best)", scores=reported, rows=(first + select(part),)))
        choice[family] = part
    return AuditInputs(
        audit=arm_stages.audit(
            training, generated, scorer.report(generated), scorer.report(scorer.checkpoints), trivial, runtime=runtime
        ),
        trivial=trivial, trivial_arms=tuple(arms), trivial_selection=choice, **changed_conditions(scorer, config),
    )  # fmt: skip


def changed_conditions(scorer: TaskScorer, config: AuditConfig) -> dict[str, object]:
    """Candidates of changed conditions beside as many of the right one, from the same noises."""
    resolved = scorer.config
    num = min(config.num_changed, resolved.sampling.num_candidates)
    sampling = resolved.sampling.model_copy(update={"num_candidates": num})
    changed = arm_stages.generate_changed(
        sampling, scorer.generator, scorer.task.name, resolved.seed, runtime=scorer.runtime
    )
    scores = scorer.report(VectorSet(kind="candidates", sources=(changed,)))
    telling = telling_changes(len(resolved.tasks), resolved.condition.kind, resolved.normalization.scope == "task")
    arms = tuple(
        ScoredArm(name=change, scores=scores, rows=tuple(range(c * num, (c + 1) * num)))
        for c, change in enumerate(CHANGES)
        if change in telling
    )
    same = tuple(range(num))
    return {"changed": arms, "right": ScoredArm(name="right", scores=scorer.report(scorer.generated), rows=same)}


def train_on(
    runs: Sequence[HarvestConfig], starts: Sequence[VectorSet], heads: Sequence[Artifact], config: ContinueConfig,
    runtime: RuntimeConfig,
) -> Artifact:  # fmt: skip
    """Train vectors on, all tasks and runs in one pass."""
    return arm_stages.continue_training(
        tuple(continued(run, config) for run in runs), tuple(starts), tuple(heads), runtime=runtime
    )
