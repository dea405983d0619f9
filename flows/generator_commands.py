"""Commands that use what was generated: generate, share generators and zoos, compose adapters, compare experiments.

Nothing heavy is imported before a command runs. A generator in a folder needs no Prefect; an experiment's generator
is bundled first by a flow, whose stages are cached.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cpdiff_core.config import MAX_CANDIDATES, RuntimeConfig, UserError
from flows.options import DataDir, Device, ExperimentName, Quiet, Root, Threads
from flows.startup import begin, embedded, portable, resumable, runtime_of

if TYPE_CHECKING:
    from cpdiff_core.delivery import AdapterRequest

GeneratorName = Annotated[
    str, typer.Argument(help="builtin/NAME, a generator folder, or an experiment (name or .json), run first if need be.")
]
Out = Annotated[Path, typer.Option(help="Folder to write to; must be empty.")]


def generate(
    generator: GeneratorName,
    out: Out,
    task_info: Annotated[str | None, typer.Option(help="The task in words.")] = None,
    example: Annotated[list[str] | None, typer.Option(help="An example, 'text -> answer'; may be repeated.")] = None,
    task: Annotated[str | None, typer.Option(help="A task or style that the generator knows, by name.")] = None,
    style_image: Annotated[str | None, typer.Option(help="An image of a style, for a generator of styles.")] = None,
    num: Annotated[int, typer.Option(min=1, max=MAX_CANDIDATES, help="Candidates.")] = 20,
    seed: Annotated[int | None, typer.Option(min=0, help="Of the noise; the generator's own if not given.")] = None,
    select: Annotated[
        str | None, typer.Option(help="CSV, JSON lines or Parquet file, or folder of images of the style, to choose on.")
    ] = None,
    few: Annotated[str | None, typer.Option(help="A few labelled examples of a task never seen.")] = None,
    labels: Annotated[str | None, typer.Option(help="Class names of a task never seen: a,b,c.")] = None,
    regression: Annotated[bool, typer.Option(help="The task never seen is a regression.")] = False,
    text_columns: Annotated[str | None, typer.Option(help="Text column, or two: a,b.")] = None,
    label_column: Annotated[str, typer.Option(help="Column with the answers.")] = "label",
    merge: Annotated[bool, typer.Option(help="Also write the base with the chosen adapter merged in.")] = False,
    base: Annotated[str | None, typer.Option(help="Folder or hub id of the base model.")] = None,
    device: Device = "auto", root: Root = None, data_dir: DataDir = None, threads: Threads = None,
    quiet: Quiet = False,
) -> None:  # fmt: skip
    """Adapters for a described task, or for a style from one image: PEFT folders with model cards, chosen and compared
    where there is data."""
    _check_out(out)
    runtime = runtime_of(device, data_dir, threads, progress=not quiet)

    def of_texts() -> AdapterRequest:
        from cpdiff_core.delivery import AdapterRequest

        return AdapterRequest(
            task_info=task_info, examples=tuple(example or ()), task=task, num=num, seed=seed, select=select, few=few,
            labels=_split(labels), regression=regression, text_columns=_split(text_columns), label_column=label_column,
            merge=merge, base=base,
        )  # fmt: skip

    folder = _folder_of(generator, runtime, root, of_texts)
    from cpdiff_core.delivery import deliver
    from cpdiff_core.domains.glue.stacks import device_of
    from cpdiff_core.generators import load_generator
    from cpdiff_core.style_bundle import StyleGenerator

    loaded = load_generator(folder, device_of(runtime))
    if isinstance(loaded, StyleGenerator):
        from cpdiff_core.style_delivery import StyleRequest, deliver_style

        words = {"--task-info": task_info, "--example": example, "--few": few, "--labels": labels, "--regression": regression,
                 "--text-columns": text_columns}  # fmt: skip
        if given := [name for name, value in words.items() if value]:
            raise UserError(f"{given[0]}: {generator!r} makes adapters for styles; give it --style-image")
        wanted = StyleRequest(
            style_image=style_image, task=task, num=num, seed=seed, select=select, merge=merge, base=base
        )
        for line in deliver_style(loaded, wanted, out, runtime):
            typer.echo(line)
        return
    if style_image:
        raise UserError(f"--style-image: {generator!r} makes adapters for texts; give it --task-info")
    for line in deliver(loaded, of_texts(), out, runtime):
        typer.echo(line)


def export_generator(
    experiment: ExperimentName, out: Out,
    compact: Annotated[bool, typer.Option(help="Half precision, without the encoder: a third of the size.")] = False,
    device: Device = "auto", root: Root = None, data_dir: DataDir = None, threads: Threads = None,
    quiet: Quiet = False,
) -> None:  # fmt: skip
    """Write an experiment's generator as a folder that works on any machine, without the training data."""
    _check_out(out)
    _export(_folder_of(experiment, runtime_of(device, data_dir, threads, progress=not quiet), root), out, compact)


def import_zoo(
    folders: Annotated[list[Path], typer.Argument(help="A folder of PEFT folders per task, or one of such with task.json.")],
    out: Out,
    describe: Annotated[list[str] | None, typer.Option(help="TASK=its description in words; may be repeated.")] = None,
    base: Annotated[str | None, typer.Option(help="Base model, if the adapters do not name it.")] = None,
    settings: Annotated[Path | None, typer.Option(help="JSON file that sets the generator's training.")] = None,
    compact: Annotated[bool, typer.Option(help="Half precision, without the encoder.")] = False,
    device: Device = "auto", root: Root = None, threads: Threads = None, quiet: Quiet = False,
) -> None:  # fmt: skip
    """Train a generator on LoRA adapters made elsewhere, and write it as a portable folder."""
    _check_out(out)
    pairs = [text.partition("=") for text in describe or ()]
    if wrong := [name for name, sign, words in pairs if not (sign and words.strip())]:
        raise UserError(f"--describe {wrong[0]!r}: must be TASK=description")
    runtime = runtime_of(device, None, threads, progress=not quiet)

    def train() -> str:
        from cpdiff_core.zoo_folder import ZooGeneratorConfig
        from flows.cli import read_config
        from flows.zoos import import_zoo as flow

        config = read_config("settings file", settings, ZooGeneratorConfig) if settings else ZooGeneratorConfig()
        texts = {name: words for name, _, words in pairs}
        return flow([str(folder) for folder in folders], texts, base, config, runtime)

    _export(with_root(root, False, train), out, compact)


def export_zoo(
    experiment: ExperimentName, out: Out,
    num: Annotated[int | None, typer.Option(min=1, help="Checkpoints per run, evenly spaced; default all.")] = None,
    device: Device = "auto", root: Root = None, data_dir: DataDir = None, threads: Threads = None, quiet: Quiet = False,
) -> None:  # fmt: skip
    """Write an experiment's harvested checkpoints as PEFT folders with a data card."""
    _check_out(out)
    runtime = runtime_of(device, data_dir, threads, progress=not quiet)

    def write() -> str:
        from flows.cli import load_experiment
        from flows.zoos import export_zoo as flow

        return flow(load_experiment(experiment), str(out), num, runtime)

    typer.echo(f"zoo: {with_root(root, embedded(experiment), write)}")


Adapters = Annotated[list[Path], typer.Argument(help="PEFT folders of one base model.")]
Weights = Annotated[str | None, typer.Option(help="A weight for each adapter: 0.5,0.3,0.2.")]


def interpolate(
    first: Annotated[Path, typer.Argument(help="PEFT folder.")],
    second: Annotated[Path, typer.Argument(help="PEFT folder of the same shape.")],
    out: Out,
    weight: Annotated[float, typer.Option(help="Share of the second: 0 gives the first, 1 the second.")] = 0.5,
) -> None:
    """Interpolate two adapters on their factors; the head is the first one's."""
    _compose("interpolate", [first, second], [weight], out)


def average(adapters: Adapters, out: Out, weights: Weights = None) -> None:
    """Average adapters on their factors (model soup); the head is the first one's."""
    _compose("average", adapters, _numbers(weights), out)


def add(adapters: Adapters, out: Out, weights: Weights = None) -> None:
    """Add adapters exactly, on dW; ranks add up, the head is the first one's."""
    _compose("add", adapters, _numbers(weights), out)


def compare(
    first: ExperimentName,
    second: Annotated[str, typer.Argument(help="Another experiment, by name or .json file.")],
    device: Device = "auto", root: Root = None, data_dir: DataDir = None, threads: Threads = None, quiet: Quiet = False,
) -> None:  # fmt: skip
    """Two experiments side by side, arm by arm, paired on the same examples. What is missing is computed."""
    runtime = runtime_of(device, data_dir, threads, progress=not quiet)

    def table() -> str:
        from cpdiff_core.comparison import check_comparable, compare, comparison_table
        from cpdiff_core.reports.tables import load_results
        from flows.cli import load_experiment
        from flows.pipeline import run_experiment

        experiments = [load_experiment(name) for name in (first, second)]
        check_comparable(*experiments)
        a, b = (load_results(Path(run_experiment(experiment, runtime)).parent) for experiment in experiments)
        return comparison_table(compare(a, b), experiments[0].name, experiments[1].name)

    typer.echo(with_root(root, embedded(first) and embedded(second), table))


def _check_out(out: Path) -> None:
    """Before anything is computed, which may take hours."""
    from cpdiff_core.artifacts import check_out

    check_out(out)


def _compose(how: str, folders: list[Path], weights: list[float] | None, out: Path) -> None:
    from cpdiff_core.compose import compose

    compose(how, folders, weights, out)
    typer.echo(f"adapter: {out}")


def _numbers(text: str | None) -> list[float] | None:
    try:
        return [float(part) for part in text.split(",")] if text else None
    except ValueError as error:
        raise UserError(f"--weights {text!r}: must be numbers with commas, as in 0.5,0.5") from error


def register(app: typer.Typer) -> None:
    app.command()(generate)
    app.command("export-generator")(export_generator)
    app.command("import-zoo")(import_zoo)
    app.command("export-zoo")(export_zoo)
    for command in (interpolate, average, add, compare):
        app.command()(command)


def _folder_of(
    generator: str, runtime: RuntimeConfig, root: Path | None, request: Callable[[], AdapterRequest] | None = None
) -> str:
    """A generator's folder: given as such, or an experiment's, which a flow bundles if that can give what is asked for."""
    if portable(generator):
        return generator

    def bundle() -> str:
        from flows.generate import generator_folder

        return generator_folder(generator, runtime, request() if request else None)

    return with_root(root, embedded(generator), bundle)


@resumable()
def with_root(root: Path | None, offline: bool, use: Callable[[], str]) -> str:
    """Prepare root and server, as `cpdiff run` does, and call `use`, which runs a flow."""
    session = begin(root, offline)
    import flows.pipeline  # noqa: F401 - the heavy import, while the server comes up

    session.ready()
    return use()


def _export(folder: str, out: Path, compact: bool) -> None:
    from cpdiff_core.generators import copy_generator

    copy_generator(Path(folder), out, compact)
    size = sum(path.stat().st_size for path in out.rglob("*"))
    typer.echo(f"generator: {out} ({size / 1e6:.1f} MB); use it with `cpdiff generate {out} ...`")


def _split(text: str | None) -> tuple[str, ...] | None:
    return tuple(part.strip() for part in text.split(",")) if text else None
