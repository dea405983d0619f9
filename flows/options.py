"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cpdiff_core.config import MAX_THREADS

ExperimentName = Annotated[str, typer.Argument(help="An experiment's name (see `cpdiff list`) or a .json file.")]
Root = Annotated[
    Path | None, typer.Option(help="Where artifacts are kept; default PREFECT_LOCAL_STORAGE_PATH or ~/.cpdiff.")
]
DataDir = Annotated[
    Path | None, typer.Option(help="Folder that data paths start from; GLUE is DIR/glue/<task>/*.parquet.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:<index>.")]
Threads = Annotated[
    int | None,
    typer.Option(min=1, max=MAX_THREADS, help="CPU threads; if not given torch's choice, at most 8 beside a GPU."),
]
Quiet = Annotated[bool, typer.Option(help="No live progress.")]
