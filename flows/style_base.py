"""Pretrain a tiny PixArt, choose its sampling on photographs held out for choosing, and measure it on others.

`python -m flows.style_base --size 32 --export cpdiff_core/domains/style/tiny_base` made the base in the package.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Annotated

import typer

from cpdiff_core.config import RuntimeConfig
from tasks.environment import prepare
from tasks.server import start_server

GUIDANCE_SCALES = (1.0, 1.5, 2.0, 3.0)


def main(
    size: Annotated[int, typer.Option(help="Image side: 32 (the embedded default) or 64.")] = 32,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps; the preset's if not given.")] = None,
    data_dir: Annotated[Path, typer.Option(help="Folder with vision/pacs_photo.parquet.")] = Path("data"),
    root: Annotated[Path | None, typer.Option(help="Where artifacts are kept.")] = None,
    export: Annotated[Path | None, typer.Option(help="Folder to write the base, its quality and its samples to.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    compiled: Annotated[bool, typer.Option(help="Compile the transformer's blocks on a GPU.")] = True,
) -> None:
    """Pretrain one base through the cached stages and print its distance to held-out photographs beside the floor."""
    path = prepare(root, offline=True)
    path.mkdir(parents=True, exist_ok=True)
    server = start_server(path)
    runtime = RuntimeConfig(device=device, data_dir=str(data_dir), compile=compiled)
    from cpdiff_core.style_experiments import BASE_32, BASE_64
    from flows.style import measure_style_base

    config = {32: BASE_32, 64: BASE_64}[size]
    if steps is not None:
        config = config.model_copy(update={"training": config.training.model_copy(update={"steps": steps})})
    if server is not None:
        server.wait(timeout=120)
    started = time.monotonic()
    folder = Path(measure_style_base(config, GUIDANCE_SCALES, runtime))
    quality = json.loads((folder / "quality.json").read_text(encoding="utf-8"))
    typer.echo(json.dumps(quality, indent=1))
    typer.echo(f"{time.monotonic() - started:.0f} s in all; samples beside their nearest photographs: {folder / 'sheet.png'}")
    if export is not None:
        export.mkdir(parents=True, exist_ok=True)
        for source in (folder, path / quality["base"]["stage"] / quality["base"]["fingerprint"]):
            for file in source.iterdir():
                if file.suffix in (".json", ".safetensors", ".png") and file.name not in ("result.json", "losses.safetensors"):
                    shutil.copy(file, export / file.name if source != folder else export / f"quality_{file.name}")


if __name__ == "__main__":
    typer.run(main)
