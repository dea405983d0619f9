"""The command line: `cpdiff list`, `cpdiff show NAME`, `cpdiff run NAME-or-FILE.json`."""

from __future__ import annotations

import difflib
import json
import os
import re
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from pydantic import BaseModel, ValidationError

from cpdiff_core.config import RuntimeConfig, UserError, first_line
from flows import cache, generator_commands, study_commands
from flows.options import DataDir, Device, ExperimentName, Quiet, Root, Threads
from flows.startup import begin, embedded, interrupted, resumable, runtime_of, told_in_a_line

app = typer.Typer(
    help="Generate LoRA weights from a description of the task, and learn what they are worth.",
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
)  # fmt: skip

app.add_typer(cache.app, name="cache")
generator_commands.register(app)
study_commands.register(app)

def load_experiment(name: str) -> Any:
    """An experiment by name or from a JSON file. Raises UserError naming the first wrong field."""
    from cpdiff_core.experiments import EXPERIMENTS, ExperimentConfig, experiment

    if name.endswith(".json"):
        styles = False
        with suppress(OSError, ValueError, TypeError, RecursionError):  # whatever is wrong is said below
            styles = "styles" in json.loads(Path(name).read_text(encoding="utf-8-sig"))
        if styles:
            from cpdiff_core.style_experiments import StyleExperimentConfig

            return read_config("experiment file", Path(name), StyleExperimentConfig)
        return read_config("experiment file", Path(name), ExperimentConfig)
    if name in EXPERIMENTS:
        return EXPERIMENTS[name]
    from cpdiff_core.style_experiments import STYLE_EXPERIMENTS

    return STYLE_EXPERIMENTS[name] if name in STYLE_EXPERIMENTS else experiment(name, also=STYLE_EXPERIMENTS)


def read_config(what: str, path: Path, model: type[Any]) -> Any:
    """A configuration from a JSON file. Raises UserError naming the first wrong field."""
    where = f"{what} {str(path)!r}"
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or ("it is not UTF-8 text" if isinstance(error, UnicodeError) else error)
        raise UserError(f"{where}: cannot be read ({reason}); check the path") from error
    value = parse_json(where, text)
    if not isinstance(value, dict):
        raise UserError(f"{where}: must hold one JSON object; `cpdiff show quickstart` prints an example")
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise UserError(first_fault(where, error, model)) from error


def parse_json(where: str, text: str) -> Any:
    """The value of a JSON text. Raises UserError, also for a field that occurs twice."""
    try:
        return json.loads(text, object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: line {error.lineno}: is not JSON ({error.msg})") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; brackets nested without end
        raise UserError(f"{where}: cannot be read ({first_line(error)})") from error


def _once(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object none of whose fields occurs twice; json itself would take the last one without a word."""
    value = dict(fields)
    if len(value) < len(fields):
        names = [name for name, _ in fields]
        raise ValueError(f"the field {next(name for name in names if names.count(name) > 1)[:60]!r} occurs twice")
    return value


def first_fault(where: str, error: ValidationError, model: type[BaseModel]) -> str:
    """One line for the first fault of a configuration of `model`: the field, the value, what is expected."""
    faults = error.errors(include_url=False)
    fault = faults[0]
    if fault["type"] == "missing":  # perhaps its name is only misspelt
        fault = next((item for item in faults if item["type"] == "extra_forbidden"), fault)
    parts = [str(part) for part in fault["loc"]]
    field = ".".join(part if re.fullmatch(r"[\w.()-]{1,60}", part) else repr(part)[:60] for part in parts)
    shown = repr(fault["input"])
    value = f" (value {shown[:60]})" if fault["type"] != "missing" and not isinstance(fault["input"], dict) else ""
    message = fault["msg"].removeprefix("Value error, ").replace("a valid tuple", "a list")
    if fault["type"] == "extra_forbidden":
        near = difflib.get_close_matches(parts[-1], sorted(_fields_at(model, fault["loc"][:-1])), n=1)
        message = f"unknown field; nearest: {near[0]}" if near else "unknown field; check its name"
    elif fault["type"] == "union_tag_not_found":
        message = 'needs "kind"; `cpdiff show quickstart` prints an example'
    more = f"; and {len(faults) - 1} more" if len(faults) > 1 else ""
    at = f"{field}{value}: " if field else ""  # a fault of several fields together names them itself
    return f"{where}: {at}{message}{more}"


def _fields_at(model: type[BaseModel], way: Sequence[str | int]) -> set[str]:
    """The fields of the part of a configuration that `way` leads to, as pydantic tells it."""
    found = {model}
    for step in way:
        if isinstance(step, str):
            kinds = {part for part in found if "kind" in part.model_fields and part.model_fields["kind"].default == step}
            inner = [part.model_fields[step].annotation for part in found if step in part.model_fields]
            found = kinds or set().union(*map(_models, inner))
    return set().union(*(part.model_fields for part in found))


def _models(annotation: Any) -> set[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return {annotation}
    return set().union(*map(_models, get_args(annotation)))


_HUB_TABLES = tuple(
    f"{table}/{base}-"
    for table in ("glue6", "table3", "table4a", "table4b", "table4c", "extra")
    for base in ("bert", "roberta", "deberta", "gpt2")
)


@app.command("list")
def list_experiments(
    every: Annotated[bool, typer.Option("--all", help="With other base models and the set behind docs/RESULTS.md.")] = False,
) -> None:
    """The experiments by name, with what they are for."""
    from cpdiff_core.experiments import EXPERIMENTS
    from cpdiff_core.style_experiments import STYLE_EXPERIMENTS

    known = EXPERIMENTS | STYLE_EXPERIMENTS
    shown = {name: item for name, item in known.items() if every or not name.startswith(("results/", *_HUB_TABLES))}
    width = max(map(len, shown))
    for name, item in shown.items():
        typer.echo(f"{name:<{width}}  {item.description}")
    if len(shown) < len(known):
        typer.echo(f"{len(known) - len(shown)} more with --all: other base models, and the set behind docs/RESULTS.md", err=True)


@app.command()
def show(name: ExperimentName) -> None:
    """The full configuration of an experiment as JSON: a starting point for your own."""
    typer.echo(json.dumps(load_experiment(name).model_dump(mode="json"), indent=1))


@app.command()
@resumable()
def run(
    name: ExperimentName,
    device: Device = "auto",
    root: Root = None,
    data_dir: DataDir = None,
    threads: Threads = None,
    adapters: Annotated[
        int | None, typer.Option(min=1, help="Adapters per batch; chosen by memory if not given.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Run an experiment; print its table and the path of its report. What is already there is not computed again."""
    started = time.monotonic()
    session = begin(root, offline=embedded(name))
    experiment = load_experiment(name)
    runtime = runtime_of(device, data_dir, threads, adapters=adapters, progress=not quiet)
    typer.echo(json.dumps(experiment.model_dump(mode="json", exclude={"economies"}), indent=1), err=True)
    typer.echo(f"base model {_found(experiment, data_dir)}", err=True)
    typer.echo(f"root       {session.root}", err=True)
    from cpdiff_core.artifacts import checked
    from tasks.report import tally

    flow = _flow_of(experiment)
    session.ready()
    report = _run_flow(flow, experiment, runtime)
    counts = tally()
    typer.echo(checked(report.parent, "summary.txt").read_text(encoding="utf-8"))
    typer.echo(
        f"{counts['computed']} stages computed, {counts['cached']} Cached, in {time.monotonic() - started:.0f} s",
        err=True,
    )
    typer.echo(f"report: {report}")


@app.command()
@resumable()
def benchmark(
    part: Annotated[
        list[str] | None,
        typer.Option(
            help="harvest, harvest_large, scoring, generator, style, quickstart_share, growth, several_gpus; all if not given."
        ),
    ] = None,
    base_model: Annotated[str, typer.Option(help="Name, hub id or folder of the base model.")] = "minilm-l6",
    steps: Annotated[int, typer.Option(min=5, help="Steps per timing of the training loops.")] = 100,
    device: Device = "auto",
    root: Root = None,
    data_dir: DataDir = None,
    threads: Threads = None,
) -> None:
    """Measure speed on this machine, each figure beside its reference in the same run."""
    session = begin(root, offline=base_model == "minilm-l6")
    runtime = runtime_of(device, data_dir, threads)
    from cpdiff_core.benchmarks import ALL_PARTS
    from flows.benchmark import run_benchmarks, table

    if unknown := set(part or ()) - set(ALL_PARTS):
        raise UserError(f"--part {sorted(unknown)[0]!r}: is unknown; choose among {', '.join(ALL_PARTS)}")
    session.ready()
    result = Path(run_benchmarks(tuple(p for p in ALL_PARTS if not part or p in part), base_model, steps, runtime=runtime))
    typer.echo(table(result))
    typer.echo(f"\nfigures: {result}")


def _found(experiment: Any, data_dir: Path | None) -> str:
    """Look for everything that an experiment needs before anything is computed. Returns what to say of its base."""
    from cpdiff_core.experiments import ExperimentConfig, resolve

    if isinstance(experiment, ExperimentConfig):
        base = resolve(experiment, data_dir).base
        return f"{base.name}: {base.folder}"
    from cpdiff_core.style_experiments import resolve_styles

    found = resolve_styles(experiment, data_dir).base
    return f"{experiment.base.kind}: {found.folder if found else 'to be pretrained on ' + experiment.photos.name}"


def _flow_of(experiment: Any) -> Any:
    """The flow that runs `experiment`. The heavy import, while the server comes up; styles are imported for styles alone."""
    from cpdiff_core.experiments import ExperimentConfig

    if isinstance(experiment, ExperimentConfig):
        from flows.pipeline import run_experiment

        return run_experiment
    from flows.style import run_style_experiment

    return run_style_experiment


def _run_flow(flow: Any, experiment: Any, runtime: RuntimeConfig) -> Path:
    """The path of the report. Faults of Prefect itself are the user's to mend: a server that went away, a full disk."""
    import httpx
    from prefect.exceptions import PrefectException

    from tasks.engine import with_engine

    try:
        return Path(with_engine(flow)(experiment, runtime))
    except (httpx.HTTPError, PrefectException) as error:
        raise UserError(f"Prefect: {first_line(error)}; finished stages are kept: run the same command again to go on") from error


def main() -> None:
    """Entry point: a user's fault is one line on stderr and exit code 2."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    signal.signal(signal.SIGTERM, interrupted)
    told_in_a_line(app)


if __name__ == "__main__":
    main()
