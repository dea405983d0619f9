"""Pretrain a tiny PixArt, choose its sampling on photographs held out for choosing, and measure it on others.

`python -m flows.style_base --size 32 --export DIR` made the base in the package.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Annotated

import typer

from cpdiff_core.artifacts import read_json
from cpdiff_core.config import RuntimeConfig
from flows.startup import begin, told_in_a_line

GUIDANCE_SCALES = (1.5, 2.0, 3.0, 4.0, 5.0)


def main(
    size: Annotated[list[int], typer.Option(help="Image side: 32 (the embedded default) or 64; may be given twice.")],
    steps: Annotated[int | None, typer.Option(help="Optimiser steps; the preset's if not given.")] = None,
    data_dir: Annotated[Path, typer.Option(help="Folder with vision/pacs_photo.parquet.")] = Path("data"),
    root: Annotated[Path | None, typer.Option(help="Where artifacts are kept.")] = None,
    export: Annotated[Path | None, typer.Option(help="Folder to copy base, quality and samples to, by size.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    compiled: Annotated[bool, typer.Option(help="Compile the transformer's blocks on a GPU.")] = True,
) -> None:
    """Pretrain bases through the cached stages; print the distance to held-out photographs beside the floor."""
    session = begin(root, offline=True)
    runtime = RuntimeConfig(device=device, data_dir=str(data_dir), compile=compiled)
    from cpdiff_core.style_experiments import BASE_32, BASE_64
    from flows.style import measure_style_base

    session.ready()
    for side in size:
        config = {32: BASE_32, 64: BASE_64}[side]
        if steps is not None:
            config = config.model_copy(update={"training": config.training.model_copy(update={"steps": steps})})
        started = time.monotonic()
        folder = Path(measure_style_base(config, GUIDANCE_SCALES, runtime))
        quality = read_json(folder, "quality.json")
        typer.echo(json.dumps(quality, indent=1))
        typer.echo(f"{side} px: {time.monotonic() - started:.0f} s in all; samples: {folder / 'sheet.png'}")
        if export is not None:
            base = session.root / quality["base"]["stage"] / quality["base"]["fingerprint"]
            copy_base(base, folder, export / str(side))


def copy_base(base: Path, quality: Path, target: Path) -> None:
    """The folder that the package ships: weights, specification, provenance, quality and samples."""
    target.mkdir(parents=True, exist_ok=True)
    for source in (base / "base.json", base / "provenance.json", *base.glob("transformer-*.safetensors")):
        shutil.copy(source, target)
    for name in ("quality.json", "sheet.png"):
        shutil.copy(quality / name, target)


if __name__ == "__main__":
    told_in_a_line(lambda: typer.run(main))
