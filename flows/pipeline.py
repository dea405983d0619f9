"""The method on one screen: fine-tune and harvest, fit the generator, generate, choose, report.

Each step is a stage of `tasks/stages.py`, computed once per input; `flows/steps.py` says which stage gets what.
"""

from __future__ import annotations

from pathlib import Path

from prefect import flow

from cpdiff_core.config import RuntimeConfig
from cpdiff_core.experiments import QUICKSTART, ExperimentConfig, ResolvedExperiment, resolve
from cpdiff_core.reports.inputs import ReportInputs, SeedInputs
from flows.arms import TaskScorer, score_arms
from flows.steps import (
    Artifact,
    continue_zoo,
    cut_to_blocks,
    fit_generator,
    fit_heads,
    generate,
    harvest,
    harvest_all,
    harvest_together,
    rows_of,
    runs_of,
    with_audit,
)
from tasks import stages
from tasks.prefect_artifacts import publish
from tasks.stage import folder


@flow(name="run-experiment", persist_result=False)
def run_experiment(experiment: ExperimentConfig = QUICKSTART, runtime: RuntimeConfig = RuntimeConfig()) -> str:
    """Run one experiment and return the path of its report.

    Args:
        experiment: What is computed. Every field changes the result and so the cache key.
        runtime: Where and how fast. Nothing here changes the result.
    """
    report = folder(stages.report(experiment, compute(experiment, runtime)))
    publish(experiment.name, report)
    return str(report / "report.html")


def compute(experiment: ExperimentConfig, runtime: RuntimeConfig) -> ReportInputs:
    """Everything behind one report: every arm of every task, with every seed. For use inside a flow."""
    resolved = resolve(experiment, Path(runtime.data_dir) if runtime.data_dir else None)
    heads = fit_heads(resolved, runtime)
    seeds = [
        resolved.model_copy(update={"config": experiment.for_seed(number)}) for number in range(experiment.num_seeds)
    ]
    harvest_together([run for seed in seeds for run in runs_of(seed)], heads, runtime)  # all seeds in one pass
    return ReportInputs(base=resolved.base, seeds=tuple(compute_seed(seed, heads, runtime) for seed in seeds))


def compute_seed(resolved: ResolvedExperiment, heads: dict[str, Artifact], runtime: RuntimeConfig) -> SeedInputs:
    """One seed: harvest, fit, generate, choose and score."""
    config = resolved.config
    zoo = harvest(resolved, heads, runtime)                                              # Sec. 4.1
    generator = fit_generator(resolved, cut_to_blocks(resolved, zoo), runtime)           # Sec. 3.2-3.3, Eq. 6-8
    annealed, tuned = continue_zoo(resolved, zoo, heads, runtime)                        # controls
    scorers = [
        TaskScorer(
            resolved=resolved, task=task, head=heads[task.name], runs=zoo.tasks[q].runs, generator=generator,
            generated=generate(resolved, task.name, zoo, generator, runtime),            # M candidates from noise
            annealed=rows_of(annealed, q * config.num_runs, config.num_runs), tuned_soup=rows_of(tuned, q, 1),
            runtime=runtime,
        )
        for q, task in enumerate(resolved.tasks)
    ]  # fmt: skip
    arms = tuple(score_arms(scorer) for scorer in scorers)                               # choose, then report
    return with_audit(SeedInputs(seed=config.seed, zoo=zoo, generator=generator, arms=arms), config, scorers, runtime)


@flow(name="compute-experiment", persist_result=False)
def compute_experiment(experiment: ExperimentConfig, runtime: RuntimeConfig = RuntimeConfig()) -> None:
    """Compute everything behind a report and stop there: the report may pool it with other seeds.

    Args:
        experiment: What is computed.
        runtime: Where and how fast.
    """
    compute(experiment, runtime)


@flow(name="harvest-experiments", persist_result=False)
def harvest_experiments(experiments: tuple[ExperimentConfig, ...], runtime: RuntimeConfig = RuntimeConfig()) -> None:
    """Train all runs that several experiments need, in as few passes as possible.

    Args:
        experiments: Which experiments; runs that they share are trained once.
        runtime: Where and how fast.
    """
    harvest_all(experiments, runtime)
