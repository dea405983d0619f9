"""The flow behind the form of adapters, and where a generator comes from: an experiment, a folder, or the package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import flow
from prefect.context import FlowRunContext

from cpdiff_core.artifacts import check_out
from cpdiff_core.bundle import Generator
from cpdiff_core.config import RuntimeConfig, UserError
from cpdiff_core.delivery import AdapterRequest, check_request, deliver
from cpdiff_core.domains.glue.stacks import device_of
from cpdiff_core.experiment_config import ExperimentConfig
from cpdiff_core.generators import load_generator
from cpdiff_core.style_experiments import StyleExperimentConfig
from flows.bundles import bundle_experiment
from flows.cli import load_experiment
from flows.startup import portable
from flows.style_bundles import bundle_style_experiment


@flow(name="generate-adapters", flow_run_name="adapters from {generator}", persist_result=False)
def generate_adapters(
    generator: str, request: AdapterRequest, out: str, runtime: RuntimeConfig = RuntimeConfig()
) -> list[str]:
    """Write PEFT folders with model cards for a text task, and return what there is to say about them.

    Args:
        generator: builtin/<name>, a generator folder, or an experiment by name or .json file.
        request: The task in words, how many candidates, and the data to choose on.
        out: Folder that the adapters are written to; must be empty.
        runtime: Where and how fast.
    """
    check_out(Path(out))
    loaded = load_generator(generator_folder(generator, runtime, request), device_of(runtime))
    if not isinstance(loaded, Generator):
        raise UserError(f"generator {generator!r}: makes adapters for styles; choose one of a text experiment")
    return deliver(loaded, request, Path(out), runtime)


def generator_folder(generator: str, runtime: RuntimeConfig, request: AdapterRequest | None = None) -> str:
    """The folder of a generator. That of an experiment comes from the cache; what is missing there is computed first,
    unless a text experiment cannot give what `request` asks for, which raises UserError."""
    if portable(generator):
        return generator
    experiment = load_experiment(generator)
    if request is not None and isinstance(experiment, ExperimentConfig):
        check_request(experiment.name, experiment.condition, experiment.tasks, request)
    bundle: Any = bundle_style_experiment if isinstance(experiment, StyleExperimentConfig) else bundle_experiment
    # Inside a flow its stages and their progress stand on the page of the run that somebody has started.
    return str(bundle(experiment, runtime) if FlowRunContext.get() is None else bundle.fn(experiment, runtime))
