"""`cpdiff cache`: what is stored below the root, by experiment, how large it is, and what can go."""

from __future__ import annotations

import difflib
import os
import time
from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from cpdiff_core.config import UserError
from tasks.environment import check_root, prepare

app = typer.Typer(help="What is stored, how large it is, and what can go; never what is in use.", no_args_is_help=True)

Root = Annotated[
    Path | None, typer.Option(help="Where artifacts are; default PREFECT_LOCAL_STORAGE_PATH or ~/.cpdiff.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")]
NO_REPORT = "(no report)"
DAY = 86400.0


def _survey(root: Path | None) -> tuple[Path, dict[str, Any]]:
    path = prepare(root)
    if not path.is_dir():
        raise UserError(f"root {str(path)!r}: does not exist; choose another with --root or PREFECT_LOCAL_STORAGE_PATH")
    from tasks.inventory import survey

    return path, survey(path)


def readable(num_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for first, *others in [header, *rows]:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        typer.echo("  ".join(cells).rstrip())


@app.command("ls")
def list_stored(root: Root = None) -> None:
    """Experiments with a report: artifacts, size, size that no other experiment shares, and age."""
    _, stored = _survey(root)
    from tasks.inventory import NAMED_STAGES, experiments

    owned = experiments(stored)
    times = Counter(key for keys in owned.values() for key in keys)
    rows = []
    for name, keys in sorted(owned.items()):
        reports = [stored[key] for key in keys if stored[key].stage in NAMED_STAGES]
        alone = sum(stored[key].num_bytes for key in keys if times[key] == 1)
        written = datetime.fromtimestamp(max(report.written for report in reports)).strftime("%Y-%m-%d %H:%M")
        total = sum(stored[key].num_bytes for key in keys)
        rows.append((name, str(len(reports)), str(len(keys)), readable(total), readable(alone), written))
    if others := [item for key, item in stored.items() if key not in times]:
        size = readable(sum(item.num_bytes for item in others))
        rows.append((NO_REPORT, "0", str(len(others)), size, size, ""))
    _table(("experiment", "reports", "artifacts", "size", "its own", "last report"), rows)


@app.command()
def du(root: Root = None) -> None:
    """Size by stage, of resume states, and of what killed processes have left."""
    path, stored = _survey(root)
    from tasks.inventory import resume_states, size_of
    from tasks.stage import SCRATCH_PREFIX

    count = Counter(item.stage for item in stored.values())
    size: Counter[str] = Counter()
    for item in stored.values():
        size[item.stage] += item.num_bytes
    rows = [(stage, str(count[stage]), readable(size[stage])) for stage, _ in size.most_common()]
    states = resume_states(path)
    scratch = list(path.glob(f"*/{SCRATCH_PREFIX}*"))
    rest = [(".resume", states), ("scratch", scratch)]
    rows += [(name, str(len(folders)), readable(sum(map(size_of, folders)))) for name, folders in rest]
    total = sum(size.values()) + sum(map(size_of, states + scratch))
    rows.append(("total", str(len(stored) + len(states) + len(scratch)), readable(total)))
    _table(("stage", "folders", "size"), rows)


@app.command()
def verify(root: Root = None) -> None:
    """Compare every file with its digest; one line per fault, exit code 1 if there is one."""
    _, stored = _survey(root)
    from tasks.inventory import faults

    complete = [item for item in stored.values() if item.complete]
    found = [line for item in complete for line in faults(item)]
    for line in found:
        typer.echo(line)
    incomplete = len(stored) - len(complete)
    typer.echo(
        f"{len(complete)} artifacts checked, {incomplete} incomplete (never used), {len(found)} faults", err=True
    )
    if found:
        raise typer.Exit(1)


@app.command("rm")
def remove_experiment(
    name: Annotated[str, typer.Argument(help="The experiment, as `cpdiff cache ls` prints it.")],
    root: Root = None,
    dry_run: DryRun = False,
) -> None:
    """Remove an experiment's reports and what no other experiment shares."""
    path, stored = _survey(root)
    from tasks.inventory import experiments

    owned = experiments(stored)
    if name not in owned:
        near = difflib.get_close_matches(name, owned, n=3, cutoff=0.3) or sorted(owned)[:3]
        known = f"nearest: {', '.join(near)} (see `cpdiff cache ls`)" if near else "no experiment has a report here"
        raise UserError(f"experiment {name!r}: has no report in {str(path)!r}; {known}")
    shared = set().union(*(keys for other, keys in owned.items() if other != name))
    _remove(path, [stored[key] for key in sorted(owned[name] - shared)], dry_run)
    if kept := len(owned[name] & shared):
        typer.echo(f"kept {kept} artifacts that other experiments share")


@app.command()
def gc(
    root: Root = None,
    days: Annotated[float, typer.Option(min=0, help="Only what is older than this.")] = 14.0,
    dry_run: DryRun = False,
) -> None:
    """Remove what no report leads to, resume states and leftovers of killed processes, if older than --days."""
    path, stored = _survey(root)
    from tasks.inventory import experiments, remove_resume_state, resume_states, size_of
    from tasks.stage import clean

    owned = set().union(*experiments(stored).values())
    old = time.time() - days * DAY
    _remove(path, [item for key, item in stored.items() if key not in owned and item.written <= old], dry_run)
    states = [folder for folder in resume_states(path) if folder.stat().st_mtime <= old]
    sizes = [(folder, size_of(folder)) for folder in states]
    gone = [size for folder, size in sizes if dry_run or remove_resume_state(folder)]
    typer.echo(f"{_verb(dry_run)} {len(gone)} resume states, {readable(sum(gone))}")
    if not dry_run:
        typer.echo(f"removed {len(clean(path, days * DAY))} leftovers of killed processes")


def _verb(dry_run: bool) -> str:
    return "would remove" if dry_run else "removed"


def _remove(path: Path, items: list[Any], dry_run: bool) -> None:
    from tasks.inventory import remove

    if not dry_run:
        check_root(path)
    gone = []
    for item in sorted(items, key=lambda item: -item.written):  # what was made from others goes before them
        if dry_run or remove(item):
            gone.append(item)
        else:
            typer.echo(f"in use, kept: {os.path.relpath(item.folder, path)}")
    typer.echo(f"{_verb(dry_run)} {len(gone)} artifacts, {readable(sum(item.num_bytes for item in gone))}")
