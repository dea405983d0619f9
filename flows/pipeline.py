"""The method on one screen: fine-tune and harvest, fit the generator, generate, choose, report."""

from __future__ import annotations

from pathlib import Path

from prefect import flow

from cpdiff_core.config import RuntimeConfig
from cpdiff_core.domains.glue.data import ResolvedTask
from cpdiff_core.domains.glue.fine_tuning import HarvestConfig
from cpdiff_core.evaluation.scores import ScoringConfig, load_selection_scores
from cpdiff_core.evaluation.selection import select
from cpdiff_core.experiments import QUICKSTART, ExperimentConfig, ResolvedExperiment, resolve
from cpdiff_core.lora.vectors import evenly_spaced
from cpdiff_core.lora.zoo import TaskHarvests, VectorSet, Zoo
from cpdiff_core.reports.page import ReportInputs, TaskArms
from tasks import stages
from tasks.stage import folder, root


@flow(name="run-experiment", persist_result=False)
def run_experiment(experiment: ExperimentConfig = QUICKSTART, runtime: RuntimeConfig = RuntimeConfig()) -> str:
    """Run one experiment and return the path of its report.

    Args:
        experiment: What is computed. Every field changes the result and so the cache key.
        runtime: Where and how fast. Nothing here changes the result.
    """
    resolved = resolve(experiment, Path(runtime.data_dir) if runtime.data_dir else None)
    heads = {
        task.name: stages.fit_head(
            experiment.head, resolved.base, task, experiment.splits, experiment.fine_tune.max_length, runtime=runtime
        )
        for task in resolved.tasks
    }
    zoo = harvest(resolved, heads, runtime)                                              # Sec. 4.1
    generator = fit_generator(resolved, zoo, runtime)                                    # Sec. 3.2-3.3, Eq. 6-8
    arms = tuple(
        score_task(resolved, task, zoo, generator, heads[task.name], runtime) for task in resolved.tasks
    )
    inputs = ReportInputs(base=resolved.base, autoencoder=generator.autoencoder, diffusion=generator.diffusion, arms=arms)
    return str(folder(stages.report(experiment, inputs)) / "report.html")


def harvest(resolved: ResolvedExperiment, heads: dict[str, stages.Artifact], runtime: RuntimeConfig) -> Zoo:
    """The last checkpoints of every run of every task. Missing runs train together, each is cached alone."""
    config = resolved.config
    runs = [
        HarvestConfig(
            base=resolved.base, task=task, splits=config.splits, lora=config.lora, fine_tune=config.fine_tune, run=run
        )
        for task in resolved.tasks
        for run in range(config.num_runs)
    ]
    stages.harvest_together(runs, [heads[run.task.name] for run in runs], runtime)
    done = [stages.harvest_checkpoints(run, heads[run.task.name], runtime=runtime) for run in runs]
    tasks = tuple(
        TaskHarvests(task=task.name, runs=tuple(done[q * config.num_runs : (q + 1) * config.num_runs]))
        for q, task in enumerate(resolved.tasks)
    )
    return Zoo(tasks=tasks, num_checkpoints=config.num_checkpoints)


def fit_generator(resolved: ResolvedExperiment, zoo: Zoo, runtime: RuntimeConfig) -> stages.Generator:
    """Normalisation statistics, autoencoder, conditions and conditional diffusion, each a stage."""
    config = resolved.config
    normalizer = stages.fit_normalization(config.normalization, zoo)
    autoencoder = stages.fit_autoencoder(config.autoencoder, zoo, normalizer, config.seed, runtime=runtime)
    conditions = stages.encode_conditions(config.condition, resolved.tasks, config.splits, config.seed, runtime=runtime)
    diffusion = stages.fit_diffusion(
        config.diffusion, config.condition, zoo, normalizer, autoencoder, conditions, config.seed, runtime=runtime
    )
    return stages.Generator(normalizer=normalizer, autoencoder=autoencoder, conditions=conditions, diffusion=diffusion)


def score_task(
    resolved: ResolvedExperiment, task: ResolvedTask, zoo: Zoo, generator: stages.Generator, head: stages.Artifact,
    runtime: RuntimeConfig,
) -> TaskArms:  # fmt: skip
    """Generate the candidates of one task, choose on the selection split, score every arm on validation."""
    config = resolved.config
    candidates = stages.generate_candidates(config.sampling, generator, task.name, config.seed, runtime=runtime)
    runs = next(entry.runs for entry in zoo.tasks if entry.task == task.name)
    total = zoo.num_checkpoints * len(runs)
    original = VectorSet(
        kind="checkpoints", sources=runs, num_checkpoints=zoo.num_checkpoints,
        rows=evenly_spaced(total, min(total, config.scored_checkpoints or total)),
    )  # fmt: skip
    generated = VectorSet(kind="candidates", sources=(candidates,))
    scoring = ScoringConfig(
        base=resolved.base, task=task, splits=config.splits, lora=config.lora, max_length=config.fine_tune.max_length,
        precision=config.fine_tune.precision,
    )  # fmt: skip

    def choose(vectors: VectorSet) -> int:
        scores = stages.score_selection(scoring, vectors, head, runtime=runtime)
        return select(load_selection_scores(scores, root(), task.task, config.splits))

    def report(vectors: VectorSet) -> stages.ReportArtifact:
        return stages.score_report(scoring, vectors, head, runtime=runtime)

    chosen_original, chosen_candidate = choose(original), choose(generated)
    shown = (
        generated if config.report_candidates == "all" else generated.model_copy(update={"rows": (chosen_candidate,)})
    )
    return TaskArms(
        task=task, head=head, num_checkpoints=total, chosen_original=chosen_original,
        chosen_candidate=chosen_candidate if config.report_candidates == "all" else 0,
        no_lora=report(VectorSet(kind="zeros")), original=report(original),
        soup=report(VectorSet(kind="soup", sources=runs, num_checkpoints=zoo.num_checkpoints)), generated=report(shown),
    )  # fmt: skip
