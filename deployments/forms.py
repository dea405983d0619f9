"""The flows behind the forms of the Prefect UI.

A form offers names to choose from, says what each field does, and starts with values that run. The work is done by the
flows in `flows/`; nothing is computed here.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any, Literal

from prefect import flow
from prefect.runtime import flow_run
from prefect.states import Completed
from pydantic import Field, ValidationError, ValidatorFunctionWrapHandler, WrapValidator

from cpdiff_core.benchmarks import ALL_PARTS, Part
from cpdiff_core.config import MAX_THREADS, UserError
from cpdiff_core.delivery import AdapterRequest
from cpdiff_core.experiments import EXPERIMENTS, BaseName, ExperimentConfig, TableName, experiment
from cpdiff_core.style_experiments import STYLE_EXPERIMENTS, StyleExperimentConfig
from deployments import confinement
from deployments.faults import form, in_words_of_the_form, show_one_line
from deployments.rerun import benchmark_verdict, compare, ended, fresh_roots, on_root, previous_root
from flows.benchmark import run_benchmarks
from flows.cli import first_fault, parse_json
from flows.generate import generate_adapters
from flows.pipeline import run_experiment
from flows.style import run_style_experiment
from flows.tables import Data, reproduce_table
from tasks.engine import part_of_a_flow
from tasks.prefect_artifacts import headline, publish_adapters


def _told_shortly(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
    """Of a wrong configuration its first fault, where pydantic would list every experiment's name before it."""
    value = _from_json(value)
    try:
        return validate(value)
    except ValidationError as error:
        if not isinstance(value, dict):
            raise ValueError(f"{value!r} is no experiment; `cpdiff list` prints their names") from error
    try:
        return ExperimentConfig.model_validate(value)
    except ValidationError as error:
        raise ValueError(first_fault("configuration", error, ExperimentConfig)) from error


def _from_json(value: Any) -> Any:
    """A configuration that has been pasted as JSON, read; anything else as it is."""
    return parse_json("configuration", value) if isinstance(value, str) and value.lstrip().startswith("{") else value


# Titles are what the form writes on the tabs between alternatives.
Named = Annotated[Literal[(*EXPERIMENTS, *STYLE_EXPERIMENTS)], Field(title="by name")]  # type: ignore[valid-type]
AsJson = Annotated[str, Field(title="as JSON", pattern=r"^\s*\{")]
OfOnesOwn = Annotated[ExperimentConfig, Field(title="field by field")]
Chosen = Annotated[Named | AsJson | OfOnesOwn, WrapValidator(_told_shortly)]
OtherName = Annotated[str, Field(title="another name", min_length=1)]
GENERATING = tuple(name for name, item in EXPERIMENTS.items() if item.blocks is None)
OfExperiment = Annotated[Literal[GENERATING], Field(title="of an experiment")]  # type: ignore[valid-type]
Kept = Annotated[str, Field(title="builtin or a folder", min_length=1)]
Device = Literal["auto", "cpu", "cuda"]
Threads = Annotated[int, Field(ge=1, le=MAX_THREADS, title="a number")] | Annotated[None, Field(title="torch's choice")]
Steps = Annotated[int, Field(ge=5, le=100_000, title="a number")] | Annotated[None, Field(title="100 on a GPU, 10 on a CPU")]

FLOW_OPTIONS: dict[str, Any] = {"persist_result": False}
show_one_line()


def _chosen(value: Named | ExperimentConfig) -> ExperimentConfig | StyleExperimentConfig:
    if isinstance(value, str):
        return STYLE_EXPERIMENTS[value] if value in STYLE_EXPERIMENTS else experiment(value)
    confinement.check_experiment(value)
    return value


def _flow_of(config: ExperimentConfig | StyleExperimentConfig) -> Any:
    chosen: Any = run_experiment if isinstance(config, ExperimentConfig) else run_style_experiment
    return part_of_a_flow(chosen)


def _name_of(value: Any) -> str:
    value = _from_json(value)
    if isinstance(value, str):
        return value
    return str(value["name"] if isinstance(value, dict) else value.name)


def _finished(what: str) -> Any:
    """The state of a run that has written a report: what the report says first, and where it lies."""
    said = headline(Path(what).parent)
    return Completed(message=f"{said} Report: {what}" if said else f"Report: {what}")


def _at(name: str) -> str:
    return f"{name} {time.strftime('%Y-%m-%d %H:%M')}"


def _experiment_run() -> str:
    return _at(_name_of(flow_run.parameters["experiment"]))


def _rerun() -> str:
    return f"again: {_experiment_run()}"


def _comparison_run() -> str:
    return f"compared: {_experiment_run()}"


def _table_run() -> str:
    given = flow_run.parameters
    return _at(f"{given['table']} on {given['base']}, {given['data']} data")


def _benchmark_run() -> str:
    return _at(f"benchmarks on {flow_run.parameters['base']}")


def _generation_run() -> str:
    return _at(f"adapters from {flow_run.parameters['generator']}")


@flow(name="run-experiment", flow_run_name=_experiment_run, **FLOW_OPTIONS)
@form
def run_experiment_form(
    experiment: Chosen = "quickstart",
    device: Device = "auto",
    num_threads: Threads = None,
) -> Any:
    """Run one experiment: fine-tune, fit the generator, generate adapters, score them, write a report.

    What has been computed before is taken from the cache.

    Args:
        experiment: One by name, or a configuration of your own: as JSON (what `cpdiff show quickstart` prints is a start), or
            field by field. quickstart needs nothing from outside; `cpdiff list` says what each name is for, and most need
            data in the worker's CPDIFF_DATA_DIR or the hub, and a GPU.
        device: Where to compute. auto takes a GPU if the worker has one.
        num_threads: CPU threads of the run.
    """
    config = _chosen(experiment)
    return _finished(_flow_of(config)(config, confinement.runtime(device, num_threads)))


@flow(name="reproduce-table", flow_run_name=_table_run, **FLOW_OPTIONS)
@form
def reproduce_table_form(
    table: TableName = "table1",
    data: Data = "excerpt",
    base: BaseName = "minilm-l6",
    num_seeds: Annotated[int, Field(ge=1, le=20)] = 1,
    device: Device = "auto",
    num_threads: Threads = None,
) -> Any:
    """Compute every row of one of the paper's tables; rows share what they have in common.

    Args:
        table: Which table of the paper. table1 varies the rank; table3 the number of checkpoints; table4a normalisation; table4b
            the condition; table4c the blocks that are generated; extra holds what the paper does not have. Table 2, of styles,
            is the experiment table2/tiny.
        data: excerpt shows the table on a small part of three tasks, in 5 to 15 minutes without a GPU; its numbers say
            nothing about the method. full is all six GLUE tasks, below the worker's CPDIFF_DATA_DIR or from the hub: minutes a
            row on an H200, many hours on a CPU.
        base: The base model. minilm-l6 needs no download; the others come from the hub.
        num_seeds: Seeds per row, pooled. A claim about the method needs at least two.
        device: Where to compute. auto takes a GPU if the worker has one.
        num_threads: CPU threads of the run.
    """
    runtime = confinement.runtime(device, num_threads)
    return _finished(part_of_a_flow(reproduce_table)(table, base, num_seeds, data, runtime))


@flow(name="rerun-experiment", flow_run_name=_rerun, **FLOW_OPTIONS)
@form
def rerun_experiment_form(
    experiment: Chosen = "quickstart",
    keep: Annotated[int, Field(ge=1, le=100)] = 2,
    device: Device = "auto",
    num_threads: Threads = None,
) -> Any:
    """Compute an experiment again from nothing, and compare it with the last time.

    Ends as `Warning` if an artifact with the same inputs has other bytes, or a score has left the earlier interval.

    Args:
        experiment: One by name, or a configuration of your own, as JSON or field by field.
        keep: How many reruns of the experiment are kept, this one included.
        device: Where to compute. auto takes a GPU if the worker has one.
        num_threads: CPU threads of the run. Another number may give other last bits.
    """
    config = _chosen(experiment)
    base = confinement.worker_root()
    fresh = fresh_roots(base, config.name)
    earlier, path = previous_root(base, config.name), fresh.new()
    try:
        report = on_root(path, _flow_of(config), config, confinement.runtime(device, num_threads))
        verdict = compare(config.name, earlier, path)
    finally:
        fresh.prune(config.name, keep)
    return ended(config.name, verdict, report)


@flow(name="run-benchmarks", flow_run_name=_benchmark_run, **FLOW_OPTIONS)
@form
def run_benchmarks_form(
    parts: list[Part] = list(ALL_PARTS),  # noqa: B006 - the form shows it
    base: BaseName = "minilm-l6",
    steps: Steps = None,
    device: Device = "auto",
    num_threads: Threads = None,
) -> Any:
    """Measure speed on the worker, each figure beside its reference in the same run, and compare with the last time.

    Ends as `Warning` if a ratio is more than a tenth below the last one on the same device.

    Args:
        parts: What to measure. several_gpus is skipped where there is one.
        base: The base model. minilm-l6 needs no download; the others come from the hub.
        steps: Steps per timing of the training loops.
        device: Where to compute. auto takes a GPU if the worker has one.
        num_threads: CPU threads of the run.
    """
    if not parts:
        raise UserError(f"parts []: is empty; choose at least one of {', '.join(ALL_PARTS)}")
    result = run_benchmarks.fn(tuple(parts), base, steps, runtime=confinement.runtime(device, num_threads))
    return ended("benchmarks", benchmark_verdict(confinement.worker_root() / "benchmarks"), result)


@flow(name="generate-adapters", flow_run_name=_generation_run, **FLOW_OPTIONS)
@form
def generate_adapters_form(
    generator: OfExperiment | Kept = "quickstart",
    request: AdapterRequest = AdapterRequest(task="sst2"),
    name: str = "",
    device: Device = "auto",
    num_threads: Threads = None,
) -> Any:
    """Generate LoRA adapters for a task from a description of it, as PEFT folders with model cards.

    Args:
        generator: The generator of an experiment (if that has not been run on this root, it is computed first: minutes for
            quickstart, a GPU and data for the others); or builtin/NAME, or a folder below generators in the root.
        request: The task, by name or in words, and how many candidates. Files lie below the worker's CPDIFF_DATA_DIR.
        name: The folder below adapters in the root that the adapters are written to, new or empty. Without a name it is
            called after the generator and the time.
        device: Where to compute. auto takes a GPU if the worker has one.
        num_threads: CPU threads of the run.
    """
    root = confinement.worker_root()
    source = confinement.generator(root / "generators", generator, GENERATING)
    name = name or f"{generator.replace('/', '-')}-{time.strftime('%Y%m%dT%H%M%S')}"
    out = confinement.named_folder(root / "adapters", "name", name)
    files = {
        field: str(confinement.data_file(f"request.{field}", value))
        for field in ("select", "few")
        if (value := getattr(request, field)) is not None
    }
    if request.base is not None:
        confinement.check_model("request.base", request.base)
    runtime = confinement.runtime(device, num_threads)
    lines = generate_adapters.fn(source, request.model_copy(update=files), str(out), runtime)
    said = [in_words_of_the_form(line) for line in lines]
    publish_adapters(name, said, out)
    return Completed(message="; ".join(said)[:2000])


@flow(name="compare-reruns", flow_run_name=_comparison_run, **FLOW_OPTIONS)
@form
def compare_reruns_form(experiment: Named | OtherName = "quickstart") -> Any:
    """Compare the two newest reruns of an experiment again. Computes nothing; needs no GPU.

    Args:
        experiment: Which experiment; another name is that of a configuration of your own. It must have been rerun twice.
    """
    kept = fresh_roots(confinement.worker_root(), experiment).finished(experiment)
    if len(kept) < 2:
        raise UserError(f"experiment {experiment!r}: has {len(kept)} finished reruns, two are needed; run rerun-experiment")
    return ended(experiment, compare(experiment, kept[-2], kept[-1]), str(kept[-1]))
