"""A report's table and figures as Prefect artifacts, beside the flow run that made them."""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import Any

import pandas as pd
from prefect.artifacts import create_markdown_artifact, create_table_artifact

from cpdiff_core.artifacts import checked

FIGURES = ("novelty", "similarity", "tsne", "trajectory")


def table_rows(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a table as Prefect's table artifact takes them: missing values are None."""
    plain = frame.astype(object).where(frame.notna(), None)
    return [{str(key): value for key, value in row.items()} for row in plain.to_dict("records")]


def publish(name: str, report: Path) -> None:
    """Publish results.csv as a table and summary.txt with the figures as markdown, from the report's folder."""
    key = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    frame = pd.read_csv(checked(report, "results.csv")).round(2)
    create_table_artifact(
        key=f"{key}-results", table=table_rows(frame), description=f"Results of {name}"
    )
    text = checked(report, "summary.txt").read_text(encoding="utf-8")
    images = [
        f"![{figure}](data:image/png;base64,{base64.b64encode(checked(report, f'{figure}.png').read_bytes()).decode()})"
        for figure in FIGURES
        if (report / f"{figure}.png").is_file()
    ]
    markdown = "\n\n".join([f"# {name}", f"```\n{text}```", *images])
    create_markdown_artifact(key=f"{key}-report", markdown=markdown, description=f"Report of {name}")
