"""Commands that compute more than one experiment: results, table, search. Nothing heavy is imported before one runs."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from cpdiff_core.config import UserError
from flows.options import DataDir, Device, Root, Threads
from flows.startup import begin, resumable, runtime_of


def register(app: typer.Typer) -> None:
    for command in (results, table, search):
        app.command()(command)


@resumable()
def results(
    device: Device = "auto", root: Root = None, data_dir: DataDir = None, threads: Threads = None,
    out: Annotated[Path, typer.Option(help="Folder that gets RESULTS.md and results/.")] = Path("docs"),
    workers: Annotated[int, typer.Option(min=1, help="Processes that share the devices; more than 1 needs the extra dask.")] = 4,
    only: Annotated[str, typer.Option(help="Only experiments whose name contains this.")] = "",
) -> None:  # fmt: skip
    """docs/RESULTS.md: Tables 1, 3, 4a, 4b, 4c on MiniLM with three seeds, the audit and the claims."""
    started = time.monotonic()
    session = begin(root, offline=data_dir is not None)
    print(f"root       {session.root}", file=sys.stderr)
    runtime = runtime_of(device, data_dir, threads, progress=False)
    from cpdiff_core.experiments import RESULTS
    from flows.results import compute_results, write_results
    from tasks.engine import with_engine

    chosen = [item for item in RESULTS if only in item.name]
    if not chosen:
        raise UserError(f"--only {only!r}: is in no name; the names are {', '.join(item.name for item in RESULTS)}")
    session.ready()
    flow = with_engine(compute_results, default=f"local:{workers}" if workers > 1 else None)
    reports = {name: Path(folder) for name, folder in flow(tuple(chosen), runtime).items()}
    write_results(chosen, reports, out, runtime, time.monotonic() - started)
    typer.echo(f"{out / 'RESULTS.md'}: {len(chosen)} experiments, {time.monotonic() - started:.0f} s")


@resumable()
def table(
    name: Annotated[str, typer.Argument(help="table1, table3, table4a, table4b, table4c or extra.")],
    base: Annotated[str, typer.Option(help="minilm-l6, bert-base, roberta-base, deberta-base or gpt2.")] = "minilm-l6",
    seeds: Annotated[int, typer.Option(min=1, help="So many seeds, pooled.")] = 1,
    excerpt: Annotated[bool, typer.Option(help="On an excerpt of three tasks: shows the table, proves nothing.")] = False,
    device: Device = "auto", root: Root = None, data_dir: DataDir = None, threads: Threads = None,
) -> None:  # fmt: skip
    """One of the paper's tables: every row computed, what rows share once, the paper's numbers beside."""
    session = begin(root, offline=base == "minilm-l6" and (excerpt or data_dir is not None))
    print(f"root       {session.root}", file=sys.stderr)
    runtime = runtime_of(device, data_dir, threads)
    from cpdiff_core.experiments import BASES, TABLES

    for option, value, known in (("table", name, TABLES), ("--base", base, BASES)):
        if value not in known:
            raise UserError(f"{option} {value!r}: is unknown; choose one of {', '.join(known)}")
    from cpdiff_core.artifacts import checked
    from flows.tables import reproduce_table
    from tasks.engine import with_engine

    session.ready()
    made = Path(with_engine(reproduce_table)(name, base, seeds, "excerpt" if excerpt else "full", runtime))
    typer.echo(checked(made.parent, made.name).read_text(encoding="utf-8"))
    typer.echo(f"table: {made}")


@resumable()
def search(
    out: Annotated[Path, typer.Option(help="JSON file that gets the kept set and the evidence.")],
    base: Annotated[str, typer.Option(help="Name, hub id or folder of the base model.")] = "minilm-l6",
    device: Device = "auto", root: Root = None, data_dir: DataDir = None, threads: Threads = None,
) -> None:  # fmt: skip
    """The hyper-parameter search of Sec. 4.1 on the held-out split; kept under cpdiff_core/tuned it becomes a preset."""
    session = begin(root, offline=base == "minilm-l6" and data_dir is not None)
    print(f"root       {session.root}", file=sys.stderr)
    runtime = runtime_of(device, data_dir, threads)
    from cpdiff_core.domains.base_models import BaseModelConfig
    from cpdiff_core.domains.glue.search import SearchConfig
    from flows.search import search_hyper_parameters

    session.ready()
    config = SearchConfig(base_model=BaseModelConfig(name=base))
    out.parent.mkdir(parents=True, exist_ok=True)
    search_hyper_parameters(config, str(out.resolve()), runtime)
    typer.echo(f"kept set and evidence: {out}")
