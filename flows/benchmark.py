"""Benchmarks as a flow, so that they can be scheduled: speed against the plain loop and against the device's own limit.

What is measured stands in `cpdiff_core/benchmarks.py`. Results go to a CSV file, a Prefect table artifact and, as text,
to docs/BENCHMARKS.md.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from prefect import flow, get_run_logger
from prefect.artifacts import create_progress_artifact, create_table_artifact, update_progress_artifact

from cpdiff_core.benchmarks import ALL_PARTS, Bench, Part, parts_of
from cpdiff_core.config import RuntimeConfig, UserError
from cpdiff_core.domains.base_models import BaseModelConfig
from cpdiff_core.experiments import experiment
from cpdiff_core.measure import Measurement
from tasks.prefect_artifacts import table_rows
from tasks.stage import root


@flow(name="run-benchmarks", flow_run_name="benchmarks on {base_model}", persist_result=False)
def run_benchmarks(
    parts: tuple[Part, ...] = ALL_PARTS, base_model: str = "minilm-l6", steps: int | None = None,
    config: str | None = None, runtime: RuntimeConfig = RuntimeConfig(),
) -> str:  # fmt: skip
    """Measure speed on this machine and return the path of the CSV file.

    Args:
        parts: What to measure.
        base_model: Name, hub id or folder of the base model.
        steps: Steps per timing of the training loops; 100 on a GPU and 10 on a CPU if None.
        config: The experiment whose generator is timed; on a GPU glue6/minilm-r1, on a CPU the quickstart if None.
        runtime: Device, data folder and threads. Without a folder glue in it, and on a CPU, the excerpt is used.
    """
    bench = Bench(BaseModelConfig(name=base_model), runtime, steps)
    chosen = parts_of(bench, experiment(config or ("glue6/minilm-r1" if bench.gpu else "quickstart")))
    rows = [
        Measurement(work="large matrix product", ours=bench.rate / 1e12, unit=f"TFLOP/s in {bench.precision}", rate_share=1.0)
    ]
    name = torch.cuda.get_device_name(bench.device) if bench.gpu else f"CPU, {torch.get_num_threads()} threads"
    path = root() / "benchmarks" / f"{time.strftime('%Y%m%dT%H%M%S')}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    progress: Any = create_progress_artifact(0.0, key="benchmarks-progress", description=f"Of {', '.join(parts)}")
    for number, part in enumerate(parts, 1):
        measured = chosen[part]()
        rows += measured
        frame = pd.DataFrame([row.model_dump() for row in rows])
        frame.insert(0, "device", name)
        frame.to_csv(path, index=False)  # after every part, so that nothing is lost to a kill
        for row in measured:
            line = f"{part}: {row.work}: {row.ours:.4g} {row.unit}"
            print(line, file=sys.stderr, flush=True)
            get_run_logger().info(line)
        update_progress_artifact(progress, progress=100.0 * number / len(parts))
    create_table_artifact(shown(frame), key="benchmarks", description=f"Speed on {name}")
    return str(path)


def table(path: Path) -> str:
    """The CSV of a run as a Markdown table."""
    try:
        frame = pd.read_csv(path)
    except OSError as error:
        raise UserError(f"benchmark file {str(path)!r}: cannot be read; run `cpdiff benchmark` first") from error
    rows = shown(frame)
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return f"{frame.device.iloc[0]}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def shown(frame: pd.DataFrame) -> list[dict[str, str]]:
    """The rows of a run's CSV as people read them."""
    rows = []
    for row in table_rows(frame):
        compared = f"{row['reference']:.4g}: {row['reference_name']}" if row["reference"] is not None else ""
        ratio, share, peak = (
            form.format(row[name]) if row[name] is not None else ""
            for name, form in (("ratio", "{:.1f} x"), ("rate_share", "{:.1%}"), ("peak_gib", "{:.1f}"))
        )
        rows.append(
            {
                "work": row["work"], "ours": f"{row['ours']:.4g} {row['unit']}", "compared with": compared, "ratio": ratio,
                "share of matrix rate": share, "peak GiB": peak, "note": row["note"] or "",
            }
        )  # fmt: skip
    return rows
