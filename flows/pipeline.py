"""The method on one screen: fine-tune and harvest, fit the generator, generate, choose, report.

Each step is a stage of `tasks/stages.py`, computed once per input; `flows/steps.py` says which stage gets what.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
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
    encode_conditions,
    fit_generator,
    fit_heads,
    generate,
    harvest,
    harvest_together,
    rows_of,
    runs_of,
    with_audit,
)
from tasks import stages
from tasks.engine import each
from tasks.prefect_artifacts import publish
from tasks.stage import folder


@flow(name="run-experiment", flow_run_name="{experiment.name}", persist_result=False)
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
    return compute_all((experiment,), runtime)[0]


def compute_all(experiments: Sequence[ExperimentConfig], runtime: RuntimeConfig) -> tuple[ReportInputs, ...]:
    """Everything behind several reports, what they share once. Passes of fine-tuning and then seeds go to the workers
    of a Dask cluster, if the flow has one (`tasks/engine.py`). For use inside a flow."""
    resolved = [resolve(experiment, Path(runtime.data_dir) if runtime.data_dir else None) for experiment in experiments]
    seeds = [
        (one.model_copy(update={"config": one.config.for_seed(number)}), heads)
        for one, heads in zip(resolved, fit_heads(resolved, runtime), strict=True)
        for number in range(one.config.num_seeds)
    ]
    calls = [(seed, heads, encode_conditions(seed, runtime), runtime) for seed, heads in seeds]
    harvest_together([(run, heads) for seed, heads in seeds for run in runs_of(seed)], runtime)
    done = iter(each("seed", compute_seed, calls))
    return tuple(ReportInputs(base=one.base, seeds=tuple(islice(done, one.config.num_seeds))) for one in resolved)


def compute_seed(
    resolved: ResolvedExperiment, heads: dict[str, Artifact], conditions: Artifact, runtime: RuntimeConfig
) -> SeedInputs:
    """One seed: harvest, fit, generate, choose and score."""
    config = resolved.config
    zoo = harvest(resolved, heads, runtime)                                              # Sec. 4.1
    generator = fit_generator(resolved, cut_to_blocks(resolved, zoo), conditions, runtime)  # Sec. 3.2-3.3, Eq. 6-8
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
