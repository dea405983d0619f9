"""The hyper-parameter search as a flow: every point of the grid is a cached harvest, all trained in one pass."""

from __future__ import annotations

from pathlib import Path

from prefect import flow

from cpdiff_core.artifacts import Artifact, write_json
from cpdiff_core.config import RuntimeConfig
from cpdiff_core.domains.base_models import resolve_base_model
from cpdiff_core.domains.glue.data import resolve_task
from cpdiff_core.domains.glue.fine_tuning import HarvestConfig
from cpdiff_core.domains.glue.search import SearchConfig, best_setting, settings
from cpdiff_core.evaluation.scores import ScoringConfig, load_selection_scores
from cpdiff_core.lora.zoo import VectorSet
from tasks import stages
from tasks.provenance import commit, device_name
from tasks.stage import root


@flow(name="search-hyper-parameters", persist_result=False)
def search_hyper_parameters(config: SearchConfig, out: str, runtime: RuntimeConfig = RuntimeConfig()) -> str:
    """Search the grid on the held-out split and write the kept set with all the evidence to `out` (JSON).

    Args:
        config: The grid. Every point is cached, so a larger grid computes only what is new.
        out: File to write.
        runtime: Where and how fast.
    """
    data_dir = Path(runtime.data_dir) if runtime.data_dir else None
    base = resolve_base_model(config.base_model)
    tasks = [resolve_task(task, data_dir) for task in config.tasks]
    heads: dict[str, Artifact] = {
        task.name: stages.fit_head(config.head, base, task, config.splits, config.max_length, runtime=runtime) for task in tasks
    }
    runs = [
        HarvestConfig(base=base, task=task, splits=config.splits, lora=config.lora, fine_tune=fine_tune)
        for fine_tune in config.grid()
        for task in tasks
    ]
    stages.harvest_together(runs, [heads[run.task.name] for run in runs], runtime)
    scores: list[dict[str, tuple[float | None, ...]]] = [{} for _ in config.grid()]
    for i, run in enumerate(runs):
        harvest = stages.harvest_checkpoints(run, heads[run.task.name], runtime=runtime)
        vectors = VectorSet(kind="checkpoints", sources=(harvest,), num_checkpoints=config.num_lengths)
        scoring = ScoringConfig(
            base=base, task=run.task, splits=config.splits, lora=config.lora, max_length=config.max_length,
            precision=config.precision,
        )  # fmt: skip
        artifact = stages.score_selection(scoring, vectors, heads[run.task.name], runtime=runtime)
        found = load_selection_scores(artifact, root(), run.task.task, config.splits)
        scores[i // len(tasks)][run.task.name] = found.scores
    evidence = settings(config, scores)
    best = best_setting(evidence)
    write_json(
        Path(out),
        {
            "fine_tune": best.model_dump(mode="json", exclude={"scores"}),
            "average": best.average,
            "chosen_on": "held_out, never validation",
            "device": device_name(runtime.device),
            "commit": commit(),
            "search": config.model_dump(mode="json", exclude={"tasks"}),
            "tasks": [task.name for task in tasks],
            "evidence": [item.model_dump(mode="json") | {"average": item.average} for item in evidence],
        },
    )
    return out
