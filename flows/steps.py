"""The steps of the pipeline: which stage is given what. The method itself is in `flows/pipeline.py`."""

from __future__ import annotations

from collections.abc import Sequence

from cpdiff_core.artifacts import Artifact
from cpdiff_core.config import RuntimeConfig
from cpdiff_core.domains.glue.data_checks import check_data
from cpdiff_core.domains.glue.fine_tuning import HarvestConfig
from cpdiff_core.domains.glue.prompts import descriptions_of
from cpdiff_core.experiments import ExperimentConfig, ResolvedExperiment
from cpdiff_core.lora.zoo import TaskHarvests, VectorSet, Zoo
from cpdiff_core.reports.inputs import SeedInputs
from flows.arms import TaskScorer, train_on
from tasks import arm_stages, stages
from tasks.report import warn
from tasks.stage import is_done


def fit_heads(experiments: Sequence[ResolvedExperiment], runtime: RuntimeConfig) -> list[dict[str, Artifact]]:
    """The head of every task of every experiment, fixed from step 0 of every run; what they share is asked for once. Where
    one is missing its data are looked through first, so that a fault in a file of validation data is told at once and not
    after the fine-tuning."""
    arguments = [
        {task.name: (one.config.head, one.base, task, one.config.splits, one.config.fine_tune.max_length) for task in one.tasks}
        for one in experiments
    ]
    needed = list(dict.fromkeys(given for by_task in arguments for given in by_task.values()))
    missing = [given for given in needed if not is_done(stages.fit_head.artifact(*given, runtime=runtime))]
    data = dict.fromkeys((task, splits) for _, _, task, splits, _ in missing)
    for line in [line for task, splits in data for line in check_data(task, splits)]:
        warn(line)
    heads = {given: stages.fit_head(*given, runtime=runtime) for given in needed}
    return [{name: heads[given] for name, given in by_task.items()} for by_task in arguments]


def encode_conditions(resolved: ResolvedExperiment, runtime: RuntimeConfig) -> Artifact:
    """What the generator is told of the tasks. It needs no weights, so it comes before the fine-tuning: a description that
    is too long or an encoder that is not there is told at once."""
    config = resolved.config
    words = descriptions_of(config.condition, resolved.tasks)
    return stages.encode_conditions(config.condition, resolved.tasks, words, config.splits, config.seed, runtime=runtime)


def runs_of(resolved: ResolvedExperiment) -> list[HarvestConfig]:
    """The runs of one seed, task by task."""
    config = resolved.config
    return [
        HarvestConfig(
            base=resolved.base, task=task, splits=config.splits, lora=config.lora, fine_tune=config.fine_tune, run=run
        )
        for task in resolved.tasks
        for run in range(config.num_runs)
    ]


def harvest(resolved: ResolvedExperiment, heads: dict[str, Artifact], runtime: RuntimeConfig) -> Zoo:
    """The last checkpoints of every run of every task. Missing runs train together, each is cached alone."""
    config, runs = resolved.config, runs_of(resolved)
    harvest_together([(run, heads) for run in runs], runtime)
    done = [stages.harvest_checkpoints(run, heads[run.task.name], runtime=runtime) for run in runs]
    tasks = tuple(
        TaskHarvests(task=task.name, runs=tuple(done[q * config.num_runs : (q + 1) * config.num_runs]))
        for q, task in enumerate(resolved.tasks)
    )
    return Zoo(tasks=tasks, num_checkpoints=config.num_checkpoints)


def cut_to_blocks(resolved: ResolvedExperiment, zoo: Zoo) -> Zoo:
    """The zoo of the columns that are generated (Tab. 4c); the zoo itself if all blocks are."""
    config = resolved.config
    if config.blocks is None:
        return zoo
    tasks = tuple(
        entry.model_copy(
            update={"runs": tuple(arm_stages.select_blocks(resolved.base, config.lora, config.blocks, run) for run in entry.runs)}
        )
        for entry in zoo.tasks
    )
    return zoo.model_copy(update={"tasks": tasks})


def fit_generator(
    resolved: ResolvedExperiment, zoo: Zoo, conditions: Artifact, runtime: RuntimeConfig
) -> stages.Generator:
    """Normalisation statistics, autoencoder and conditional diffusion, each a stage."""
    config = resolved.config
    normalizer = stages.fit_normalization(config.normalization, zoo)
    autoencoder = stages.fit_autoencoder(config.autoencoder, zoo, normalizer, config.seed, runtime=runtime)
    diffusion = stages.fit_diffusion(
        config.diffusion, config.condition, zoo, normalizer, autoencoder, conditions, config.seed, runtime=runtime
    )
    return stages.Generator(normalizer=normalizer, autoencoder=autoencoder, conditions=conditions, diffusion=diffusion)


def generate(
    resolved: ResolvedExperiment, task: str, zoo: Zoo, generator: stages.Generator, runtime: RuntimeConfig
) -> VectorSet:
    """The candidates of one task, whole vectors."""
    config = resolved.config
    candidates = stages.generate_candidates(config.sampling, generator, task, config.seed, runtime=runtime)
    if config.blocks is not None:
        entry = next(entry for entry in zoo.tasks if entry.task == task)
        training = arm_stages.Training(
            base=resolved.base, lora=config.lora, task=next(t for t in resolved.tasks if t.name == task), runs=entry.runs,
            num_checkpoints=config.num_checkpoints,
        )  # fmt: skip
        candidates = arm_stages.fill_blocks(training, config.blocks, candidates)
    return VectorSet(kind="candidates", sources=(candidates,))


def continue_zoo(
    resolved: ResolvedExperiment, zoo: Zoo, heads: dict[str, Artifact], runtime: RuntimeConfig
) -> tuple[Artifact | None, Artifact | None]:
    """The annealed end of every run, and the soup of every task trained on, where the experiment asks for them."""
    config, runs = resolved.config, runs_of(resolved)
    annealed = tuned = None
    if "annealed" in config.arms:
        ends = [VectorSet(kind="checkpoints", sources=(run,), num_checkpoints=1) for entry in zoo.tasks for run in entry.runs]
        annealed = train_on(runs, ends, [heads[run.task.name] for run in runs], config.annealing, runtime)
    if "soup fine-tuned" in config.arms:
        firsts = runs[:: config.num_runs]
        soups = [
            VectorSet(kind="soup", sources=entry.runs, num_checkpoints=config.num_checkpoints) for entry in zoo.tasks
        ]
        tuned = train_on(firsts, soups, [heads[run.task.name] for run in firsts], config.soup_tuning, runtime)
    return annealed, tuned


def rows_of(artifact: Artifact | None, first: int, num: int) -> VectorSet | None:
    """Some vectors of an artifact; None if there is no artifact."""
    if artifact is None:
        return None
    return VectorSet(kind="candidates", sources=(artifact,), rows=tuple(range(first, first + num)))


def harvest_together(runs: Sequence[tuple[HarvestConfig, dict[str, Artifact]]], runtime: RuntimeConfig) -> None:
    """Train the missing runs, each with the heads of its experiment, in as few passes as possible; each is committed by
    its own stage later."""
    stages.harvest_together([run for run, _ in runs], [heads[run.task.name] for run, heads in runs], runtime)


def with_audit(
    seed: SeedInputs, config: ExperimentConfig, scorers: Sequence[TaskScorer], runtime: RuntimeConfig
) -> SeedInputs:
    """The seed with what the audit's figures need, if the experiment asks for one."""
    if config.audit is None:
        return seed
    geometry = arm_stages.describe_geometry(
        tuple(scorer.training for scorer in scorers), tuple(scorer.generated for scorer in scorers), config.seed
    )
    trajectory = arm_stages.sampling_trajectory(
        config.sampling, seed.generator, seed.zoo, config.audit.num_trajectories, config.seed, runtime=runtime
    )
    return seed.model_copy(update={"geometry": geometry, "trajectory": trajectory})
