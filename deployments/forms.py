"""The flows behind the forms of the Prefect UI.

A form offers names to choose from, says what each field does, and starts with values that run. The work is done by the
flows in `flows/`; nothing is computed here.
"""

from __future__ import annotations

import time
from typing import Annotated, Any, Literal

from prefect import flow
from prefect.runtime import flow_run
from prefect.states import Completed
from pydantic import Field

from cpdiff_core.benchmarks import ALL_PARTS, Part
from cpdiff_core.config import UserError
from cpdiff_core.delivery import AdapterRequest
from cpdiff_core.experiments import EXPERIMENTS, BaseName, ExperimentConfig, TableName, experiment
from cpdiff_core.style_experiments import STYLE_EXPERIMENTS, StyleExperimentConfig
from deployments import confinement
from deployments.rerun import benchmark_warnings, compare, fresh_roots, on_root, previous_root, warn
from flows.benchmark import run_benchmarks
from flows.generate import generate_adapters
from flows.pipeline import run_experiment
from flows.style import run_style_experiment
from flows.tables import reproduce_table
from tasks.engine import with_engine
from tasks.stage import root

ExperimentName = Literal[(*EXPERIMENTS, *STYLE_EXPERIMENTS)]  # type: ignore[valid-type]
Device = Literal["auto", "cpu", "cuda"]
Threads = Annotated[int, Field(ge=1)] | None

FLOW_OPTIONS: dict[str, Any] = {"persist_result": False}


def _chosen(value: ExperimentName | ExperimentConfig) -> ExperimentConfig | StyleExperimentConfig:
    if isinstance(value, str):
        return STYLE_EXPERIMENTS[value] if value in STYLE_EXPERIMENTS else experiment(value)
    confinement.check_experiment(value)
    return value


def _flow_of(config: ExperimentConfig | StyleExperimentConfig) -> Any:
    chosen: Any = run_experiment if isinstance(config, ExperimentConfig) else run_style_experiment
    return with_engine(chosen)


def _name_of(value: Any) -> str:
    if isinstance(value, str):
        return value
    return str(value["name"] if isinstance(value, dict) else value.name)


def _experiment_run() -> str:
    return f"{_name_of(flow_run.parameters['experiment'])} {time.strftime('%Y-%m-%d %H:%M')}"


def _table_run() -> str:
    return f"{flow_run.parameters['table']} on {flow_run.parameters['base']}"


@flow(name="run-experiment", flow_run_name=_experiment_run, **FLOW_OPTIONS)
def run_experiment_form(
    experiment: ExperimentName | ExperimentConfig = "quickstart",
    device: Device = "auto",
    num_threads: Threads = None,
) -> str:
    """Run one experiment: fine-tune, fit the generator, generate adapters, score them, write a report.

    What has been computed before is taken from the cache.

    Args:
        experiment: Choose one by name, or fill in a configuration of your own. `cpdiff list` says what each is for.
        device: Where to compute. auto takes a GPU if the worker has one.
        num_threads: CPU threads; leave empty for torch's choice.
    """
    config = _chosen(experiment)
    return str(_flow_of(config)(config, confinement.runtime(device, num_threads)))


@flow(name="reproduce-table", flow_run_name=_table_run, **FLOW_OPTIONS)
def reproduce_table_form(
    table: TableName = "table1",
    base: BaseName = "minilm-l6",
    num_seeds: Annotated[int, Field(ge=1)] = 1,
    device: Device = "auto",
    num_threads: Threads = None,
) -> str:
    """Run every row of one of the paper's tables, one after another; rows share what they have in common.

    Args:
        table: Which table of the paper; extra holds the rows that the paper does not have.
        base: The base model. minilm-l6 needs no download; the others are found on the hub or in a local folder.
        num_seeds: Seeds per row; more than one gives intervals over seeds.
        device: Where to compute. auto takes a GPU if the worker has one.
        num_threads: CPU threads; leave empty for torch's choice.
    """
    return str(with_engine(reproduce_table)(table, base, num_seeds, confinement.runtime(device, num_threads)))


@flow(name="rerun-experiment", flow_run_name=_experiment_run, **FLOW_OPTIONS)
def rerun_experiment_form(
    experiment: ExperimentName | ExperimentConfig = "quickstart",
    device: Device = "auto",
    num_threads: Threads = None,
    keep: Annotated[int, Field(ge=1)] = 2,
) -> Any:
    """Compute an experiment again from nothing, and compare it with the last time.

    Ends as `Warning` if an artifact with the same inputs has other bytes, or a score has left the earlier interval.

    Args:
        experiment: Choose one by name, or fill in a configuration of your own.
        device: Where to compute. auto takes a GPU if the worker has one.
        num_threads: CPU threads; leave empty for torch's choice.
        keep: How many reruns of the experiment are kept, this one included.
    """
    config = _chosen(experiment)
    base, fresh = root(), fresh_roots(root(), config.name)
    earlier = previous_root(base, config.name)
    report = on_root(fresh.new(), _flow_of(config), config, confinement.runtime(device, num_threads))
    warnings = compare(config.name, earlier, fresh.newest())
    fresh.prune(keep)
    return warn(config.name, warnings, report)


@flow(name="run-benchmarks", **FLOW_OPTIONS)
def run_benchmarks_form(
    parts: list[Part] = list(ALL_PARTS),  # noqa: B006 - the form shows it
    base: BaseName = "minilm-l6",
    steps: Annotated[int, Field(ge=5)] = 100,
    device: Device = "auto",
    num_threads: Threads = None,
) -> Any:
    """Measure speed on the worker, each figure beside its reference in the same run, and compare with the last time.

    Ends as `Warning` if a ratio is more than a tenth below the last one on the same device.

    Args:
        parts: What to measure.
        base: The base model.
        steps: Steps per timing of the training loops.
        device: Where to compute. auto takes a GPU if the worker has one.
        num_threads: CPU threads; leave empty for torch's choice.
    """
    result = run_benchmarks.fn(parts, base, steps, runtime=confinement.runtime(device, num_threads))
    return warn("benchmarks", benchmark_warnings(root() / "benchmarks"), result)


@flow(name="generate-adapters", **FLOW_OPTIONS)
def generate_adapters_form(
    name: str = "my-adapters", generator: str = "builtin/minilm-glue6", request: AdapterRequest | None = None,
    device: Device = "auto",
) -> Any:  # fmt: skip
    """Generate LoRA adapters for a task from a description of it, as PEFT folders with model cards.

    Args:
        name: The folder below <root>/adapters that the adapters are written to; it must not exist yet.
        generator: builtin/<name>, or the name of a folder below <root>/generators.
        request: The task in words or by name, and how many candidates. Files lie below the worker's CPDIFF_DATA_DIR.
        device: Where to compute. auto takes a GPU if the worker has one.
    """
    request = request or AdapterRequest(task="sst2", num=4)
    out = confinement.named_folder(root() / "adapters", "name", name)
    if not generator.startswith("builtin/"):
        generator = str(confinement.named_folder(root() / "generators", "generator", generator))
    else:
        confinement.named_folder(root(), "generator", generator.removeprefix("builtin/"))
    files = {
        field: str(confinement.data_file(f"request.{field}", value))
        for field in ("select", "few")
        if (value := getattr(request, field)) is not None
    }
    if request.base is not None:
        confinement.check_model("request.base", request.base)
    lines = generate_adapters.fn(generator, request.model_copy(update=files), str(out), confinement.runtime(device, None))
    return Completed(message="\n".join([*lines, f"adapters: {out}"])[:2000])


@flow(name="compare-reruns", **FLOW_OPTIONS)
def compare_reruns_form(experiment: ExperimentName = "quickstart") -> Any:
    """Compare the two newest reruns of an experiment again. Computes nothing; needs no GPU.

    Args:
        experiment: Which experiment.
    """
    kept = fresh_roots(root(), experiment).kept()
    if len(kept) < 2:
        raise UserError(f"experiment {experiment!r}: has {len(kept)} reruns, two are needed; run rerun-experiment")
    return warn(experiment, compare(experiment, kept[-2], kept[-1]), str(kept[-1]))
