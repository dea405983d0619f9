"""A report's table, figures and place as Prefect artifacts, beside the flow run that made them."""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact

from cpdiff_core.artifacts import checked, read_table
from cpdiff_core.cards import ArmScore
from cpdiff_core.delivery import SUMMARY
from cpdiff_core.reports.comparison import markdown
from tasks.environment import ROOT_VARIABLE

FIGURES = ("vectors", "map", "novelty", "similarity", "tsne", "trajectory", "interpolation")
URL_VARIABLE = "CPDIFF_ROOT_URL"
WIDE = 6
"""More arms than this stand in rows, as the pages are narrow."""


def table_rows(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a table as Prefect's table artifact takes them: missing values are None."""
    plain = frame.astype(object).where(frame.notna(), None)
    return [{str(key): value for key, value in row.items()} for row in plain.to_dict("records")]


def artifact_key(*parts: str) -> str:
    """A key as Prefect takes it: lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", " ".join(parts).lower()).strip("-")


def publish(name: str, report: Path) -> None:
    """Publish results.csv as a table, the summary with the figures as markdown, and a link to the page, if it has one."""
    frame = read_table(report, "results.csv")
    create_table_artifact(
        key=artifact_key(name, "results"), table=table_rows(frame.round(2)), description=f"Results of {name}"
    )
    images = [
        f"![{figure}](data:image/png;base64,{base64.b64encode(checked(report, f'{figure}.png').read_bytes()).decode()})"
        for figure in FIGURES
        if (report / f"{figure}.png").is_file()
    ]
    page = checked(report, "table.md" if (report / "table.md").is_file() else "report.html")
    if (link := address(page)) is not None:
        create_link_artifact(key=artifact_key(name, "page"), link=link, link_text=page.name, description=f"Page of {name}")
    text = "\n\n".join([f"# {name}", summary(report, frame), f"Page: {place(page)}", *images])
    create_markdown_artifact(key=artifact_key(name, "report"), markdown=text, description=f"Report of {name}")


def publish_adapters(name: str, said: Sequence[str], out: Path) -> None:
    """Publish what there is to say of generated adapters as markdown, and each of them in a table. out: their folder."""
    made = json.loads((out / SUMMARY).read_text(encoding="utf-8"))
    lines = []
    for item in made["candidates"]:
        near, scores = item["nearest"], [ArmScore.model_validate(score) for score in item["scores"]]
        title = f"**{item['folder']}, chosen**" if item["folder"] == made["chosen"] else item["folder"]
        score = "; ".join(f"{one.metric} {one.estimate:.1f} [{one.low:.1f}, {one.high:.1f}]" for one in scores)
        away = f"{near['task']}: {near['distance_product'] / near['norm_product']:.2f}" if near else ""
        lines.append([title, score or "not scored", away])
    table = markdown(["adapter", "score", "nearest training adapter: distance, in its own norm"], lines)
    text = "\n".join([f"# {name}", "", *(f"- {line}" for line in said), f"- prompt: {made['prompt']!r}", "", table])
    create_markdown_artifact(key="adapters", markdown=text, description=f"Adapters in {name}")


def address(path: Path) -> str | None:
    """Where a browser finds a file below the process's root; None if CPDIFF_ROOT_URL does not say where the root is."""
    url, root = os.environ.get(URL_VARIABLE), os.environ.get(ROOT_VARIABLE)
    if not url or not root:
        return None
    file, top = path.resolve(), Path(root).expanduser().resolve()
    return f"{url.rstrip('/')}/{file.relative_to(top).as_posix()}" if file.is_relative_to(top) else None


def place(path: Path) -> str:
    """A file in Markdown: as a link if a browser finds it, else as its path, which must be free to wrap."""
    link = address(path)
    return re.sub(r"([\\_*~`<\[])", r"\\\1", str(path)) if link is None else f"[{path.name}]({link})"


def headline(report: Path) -> str:
    """What a report says first: the line below the table of its summary; nothing if there is none."""
    blocks = _blocks(report)
    after = [block for place, block in enumerate(blocks) if place and _is_table(blocks[place - 1])]
    return after[0].splitlines()[0].removeprefix("- ") if after else ""


def summary(report: Path, frame: pd.DataFrame) -> str:
    """summary.txt as Markdown, its table in columns that fit the page. frame: results.csv of the same report."""
    blocks = []
    for block in _blocks(report):
        if _is_table(block) and not block.startswith("|"):
            blocks.append(_columns(frame) or f"```\n{block}\n```")
        else:
            blocks.append(block if block.startswith(("|", "- ")) else block.replace("\n", "\n\n"))
    return "\n\n".join(blocks)


def _blocks(report: Path) -> list[str]:
    return checked(report, "summary.txt").read_text(encoding="utf-8").strip("\n").split("\n\n")


def _is_table(block: str) -> bool:
    return block.startswith("|") or any(re.fullmatch("-{20,}", line) for line in block.splitlines())


def _columns(frame: pd.DataFrame) -> str | None:
    """Tasks and arms as a pipe table; None for another kind of results."""
    if not {"task", "arm", "estimate", "low", "high"} <= set(frame.columns):
        return None
    cells = {
        (str(row.task), str(row.arm)): f"{row.estimate:.1f} [{row.low:.1f}, {row.high:.1f}]" for row in frame.itertuples()
    }
    tasks, arms = list(dict.fromkeys(frame.task)), list(dict.fromkeys(frame.arm))
    if len(arms) > WIDE:
        return markdown(["arm", *tasks], [[arm, *(cells.get((task, arm), "") for task in tasks)] for arm in arms])
    return markdown(["task", *arms], [[task, *(cells.get((task, arm), "") for arm in arms)] for task in tasks])
