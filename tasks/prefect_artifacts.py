"""A report's table and figures as Prefect artifacts, beside the flow run that made them."""

from __future__ import annotations

import base64
import re
from pathlib import Path

import pandas as pd
from prefect.artifacts import create_markdown_artifact, create_table_artifact

FIGURES = ("novelty", "similarity", "tsne", "trajectory")


def publish(name: str, report: Path) -> None:
    """Publish results.csv as a table and summary.txt with the figures as markdown, from the report's folder."""
    key = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    frame = pd.read_csv(report / "results.csv").astype(object)
    create_table_artifact(
        key=f"{key}-results", table=frame.where(frame.notna(), None).to_dict("records"), description=f"Results of {name}"
    )
    text = (report / "summary.txt").read_text(encoding="utf-8")
    images = [
        f"![{figure}](data:image/png;base64,{base64.b64encode((report / f'{figure}.png').read_bytes()).decode()})"
        for figure in FIGURES
        if (report / f"{figure}.png").is_file()
    ]
    markdown = "\n\n".join([f"# {name}", f"```\n{text}```", *images])
    create_markdown_artifact(key=f"{key}-report", markdown=markdown, description=f"Report of {name}")
