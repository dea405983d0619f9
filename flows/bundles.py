"""The flow that bundles the generator of an experiment: a portable folder with what its adapters score."""

from __future__ import annotations

from pathlib import Path

from prefect import flow

from cpdiff_core.artifacts import read_json
from cpdiff_core.cards import ArmScore, BaseReference, GeneratorCard, TaskCard
from cpdiff_core.config import RuntimeConfig, UserError
from cpdiff_core.domains.base_models import FAMILIES
from cpdiff_core.domains.glue.data import ResolvedTask
from cpdiff_core.domains.glue.stacks import build_stack
from cpdiff_core.domains.glue.text_tasks import TextTask
from cpdiff_core.evaluation.scores import ReportArtifact, ScoringConfig, load_predictions, load_selection_scores
from cpdiff_core.evaluation.selection import select
from cpdiff_core.experiments import ExperimentConfig, ResolvedExperiment, resolve
from cpdiff_core.lora.zoo import VectorSet, Zoo
from cpdiff_core.reports.facts import FACTS_FILE
from flows.pipeline import run_experiment
from flows.steps import encode_conditions, fit_generator, fit_heads, harvest, runs_of
from tasks import bundle_stages, stages
from tasks.stage import folder, root


@flow(name="bundle-generator", flow_run_name="generator of {experiment.name}", persist_result=False)
def bundle_experiment(
    experiment: ExperimentConfig, runtime: RuntimeConfig = RuntimeConfig(), num_references: int = 4
) -> str:
    """Bundle the generator of an experiment and return its folder. What has been computed is not computed again.

    Args:
        experiment: Whose generator; of several seeds the first. All of its M candidates are scored on validation.
        runtime: Where and how fast. Nothing here changes the result.
        num_references: Training adapters per task that travel with the generator, to measure novelty against.
    """
    config = experiment.for_seed(0)
    if config.blocks is not None:
        raise UserError(
            f"experiment {config.name!r}: blocks is set, so only a part of an adapter is generated; bundle an "
            "experiment that generates whole adapters"
        )
    resolved = resolve(config, Path(runtime.data_dir) if runtime.data_dir else None)
    (heads,) = fit_heads((resolved,), runtime)
    conditions = encode_conditions(resolved, runtime)
    runs = runs_of(resolved)
    stages.harvest_together(runs, [heads[run.task.name] for run in runs], runtime)
    zoo = harvest(resolved, heads, runtime)
    generator = fit_generator(resolved, zoo, conditions, runtime)
    prompts = read_json(folder(generator.conditions), "prompts.json")["generation"] or [None] * len(resolved.tasks)
    verdicts = _verdicts(experiment, runtime)
    cards = tuple(
        _task_card(resolved, task, prompt, zoo, generator, heads[task.name], runtime).model_copy(
            update={"verdict": verdicts.get(task.name)}
        )
        for task, prompt in zip(resolved.tasks, prompts, strict=True)
    )
    settings = config.model_dump(mode="json", include={"fine_tune", "splits", "head", "num_runs", "normalization"})
    card = GeneratorCard(
        name=config.name, description=config.description, lora=config.lora, condition=config.condition,
        base=BaseReference.of(resolved.base, config.base_model.revision), sampling=config.sampling, seed=config.seed,
        layout=build_stack(resolved.base, config.lora, 2, config.fine_tune.precision, runtime).layout,
        max_length=config.fine_tune.max_length, precision=config.fine_tune.precision, tasks=cards, settings=settings,
        target_modules=FAMILIES[resolved.base.family].target_modules,
        head=f"{config.head.kind}, fitted before the adapters were trained and fixed since",
    )  # fmt: skip
    task_heads = tuple(bundle_stages.TaskHead(task=name, head=head) for name, head in heads.items())
    return str(folder(bundle_stages.bundle_generator(card, generator, task_heads, zoo, num_references)))


def _verdicts(experiment: ExperimentConfig, runtime: RuntimeConfig) -> dict[str, str]:
    """task -> the audit's line, if the experiment asks for an audit."""
    if experiment.audit is None:
        return {}
    report = Path(run_experiment(experiment, runtime)).parent
    return {name: facts["verdict"] for name, facts in read_json(report, FACTS_FILE)["tasks"].items()}


def _task_card(
    resolved: ResolvedExperiment, task: ResolvedTask, prompt: str | None, zoo: Zoo, generator: stages.Generator,
    head: stages.Artifact, runtime: RuntimeConfig,
) -> TaskCard:  # fmt: skip
    """What the task's arms and its candidates score on validation, and which one the selection split chooses."""
    config = resolved.config
    candidates = stages.generate_candidates(config.sampling, generator, task.name, config.seed, runtime=runtime)
    runs = next(entry.runs for entry in zoo.tasks if entry.task == task.name)
    scoring = ScoringConfig(
        base=resolved.base, task=task, splits=config.splits, lora=config.lora, max_length=config.fine_tune.max_length,
        precision=config.fine_tune.precision,
    )  # fmt: skip
    generated = VectorSet(kind="candidates", sources=(candidates,))
    soup = VectorSet(kind="soup", sources=runs, num_checkpoints=zoo.num_checkpoints)

    def report(vectors: VectorSet) -> ReportArtifact:
        return stages.score_report(scoring, vectors, head, runtime=runtime)

    chosen = select(
        load_selection_scores(
            stages.score_selection(scoring, generated, head, runtime=runtime), root(), task.task, config.splits
        )
    )
    scored = report(generated)
    arms = {"no-LoRA": report(VectorSet(kind="zeros")), "model soup": report(soup)}
    num = config.sampling.num_candidates
    return TaskCard.of(
        task.task, prompt=prompt, num_checkpoints=zoo.num_checkpoints * len(runs), chosen=chosen,
        scores=(
            *(_score(task.task, arm, artifact) for arm, artifact in arms.items()),
            _score(task.task, f"generated, mean of {num}", scored),
            _score(task.task, f"generated, chosen of {num} on {config.splits.selection_split}", scored, chosen),
        ),
        candidates=tuple(_score(task.task, f"candidate {row}", scored, row) for row in range(num)),
    )  # fmt: skip


def _score(task: TextTask, arm: str, artifact: ReportArtifact, row: int | None = None) -> ArmScore:
    """An arm on validation, in points: one row of a score artifact, or the mean of the scores of all."""
    predictions_VB, labels_B = load_predictions(artifact.under(root()), task)
    return ArmScore.of(task, arm, predictions_VB if row is None else predictions_VB[row], labels_B)
