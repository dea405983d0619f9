"""`cpdiff results`: every experiment behind docs/RESULTS.md, in one command that goes on where it stopped.

All runs of all experiments are harvested first, in few large passes; then processes share the GPU, one experiment and
seed at a time, because a single small model leaves it idle between kernels; last come the pooled reports and the page.
"""

from __future__ import annotations

import atexit
import datetime
import multiprocessing
import os
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from cpdiff_core.config import RuntimeConfig, UserError
from tasks.environment import root
from tasks.server import TemporaryServer, start_server


def run_all(chosen: Sequence[Any], runtime: RuntimeConfig, workers: int) -> dict[str, Path]:
    """Name -> folder of the report, for every experiment."""
    context = multiprocessing.get_context("spawn")  # a forked process cannot use the GPU of its parent
    with ProcessPoolExecutor(
        min(workers, len(chosen)), mp_context=context, initializer=_start_worker, initargs=(str(root()),)
    ) as pool:
        spec = runtime.model_dump_json()
        groups: dict[int, list[str]] = {}
        for item in chosen:  # runs of one rank share their passes
            groups.setdefault(item.lora.rank, []).append(item.model_dump_json())
        _wait("harvest", [pool.submit(_work, _harvest, values, spec) for values in groups.values()])
        # The longest first. Seeds of one experiment are independent.
        jobs = sorted(((item, seed) for item in chosen for seed in range(item.num_seeds)), key=_expected_cost, reverse=True)
        _wait("seed", [pool.submit(_work, _seed, [item.for_seed(seed).model_dump_json()], spec) for item, seed in jobs])
        order = sorted(chosen, key=lambda item: item.audit is None)
        done = _wait("report", [pool.submit(_work, _report, [item.model_dump_json()], spec) for item in order])
    return {name: Path(report) for name, report in done}


def _expected_cost(job: tuple[Any, int]) -> tuple[int, int, int]:
    item, _ = job
    return (item.audit is not None, item.num_runs, item.lora.rank)


def _wait(what: str, futures: Sequence[Any]) -> list[Any]:
    found = []
    for number, future in enumerate(as_completed(futures), 1):
        found.append(future.result())
        print(f"{what} {number} of {len(futures)}", file=sys.stderr, flush=True)
    return found


_servers: list[TemporaryServer] = []


def _start_worker(path: str) -> None:
    """A server and a database of this worker's own, unless the user has a server: SQLite answers several busy
    processes with "503 Service Unavailable". Artifacts and their locks are shared through the root alone."""
    folder = tempfile.mkdtemp(prefix="cpdiff-server-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["PREFECT_SERVER_DATABASE_CONNECTION_URL"] = f"sqlite+aiosqlite:///{folder}/prefect.db"
    server = start_server(Path(path))  # before prefect is imported, which then finds it
    if server is not None:
        _servers.append(server)  # it ends with the last reference to it
        server.wait(timeout=180)


def _work(job: Callable[..., Any], values: list[str], spec: str) -> Any:
    """Run a job in a worker, and leave the device's memory to the others."""
    import torch

    from cpdiff_core.experiments import ExperimentConfig

    experiments = tuple(ExperimentConfig.model_validate_json(value) for value in values)
    try:
        found = job(experiments, RuntimeConfig.model_validate_json(spec))
    except UserError:
        raise
    except Exception as error:  # some exceptions do not survive the way between processes
        text = "".join(traceback.format_exception(error))
        raise RuntimeError(f"{experiments[0].name}: {text}") from None
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    return found


def _harvest(experiments: tuple[Any, ...], runtime: RuntimeConfig) -> None:
    from flows.pipeline import harvest_experiments

    harvest_experiments(experiments, runtime)


def _seed(experiments: tuple[Any, ...], runtime: RuntimeConfig) -> None:
    from flows.pipeline import compute_experiment

    compute_experiment(experiments[0], runtime)


def _report(experiments: tuple[Any, ...], runtime: RuntimeConfig) -> tuple[str, str]:
    from flows.pipeline import run_experiment

    return experiments[0].name, str(Path(run_experiment(experiments[0], runtime)).parent)


def write_results(
    chosen: Sequence[Any], reports: dict[str, Path], out: Path, runtime: RuntimeConfig, seconds: float
) -> None:
    """RESULTS.md, and beside it the figures, the long tables and the reports of the audited experiments."""
    from cpdiff_core.reports.comparison import comparison_frame, read_row
    from cpdiff_core.reports.results_page import Finished, results_markdown, worked_mixed_metrics

    finished = [Finished(item, reports[item.name]) for item in chosen]
    folder = out / "results"
    folder.mkdir(parents=True, exist_ok=True)
    rows = [read_row(item.config, item.report) for item in finished]
    arms = list(dict.fromkeys(arm for row in rows for arm in row.config.arms))
    comparison_frame(rows, arms).to_csv(folder / "results.csv", index=False, float_format="%.3f")
    for item in finished:
        name = item.name.replace("/", "-")
        shutil.copy(item.report / "facts.json", folder / f"{name}-facts.json")
        for figure in item.report.glob("*.png"):
            shutil.copy(figure, folder / f"{name}-{figure.name}")
        if item.config.audit is not None:
            shutil.copy(item.report / "report.html", folder / f"{name}.html")
    mixed = ""
    if {"generated", "original (oracle)"} <= set(finished[0].config.arms):
        mixed = worked_mixed_metrics(rows[0], _all_metrics(finished[0]))
    command = "cpdiff results" + (" --data-dir DIR" if runtime.data_dir else "")
    page = results_markdown(finished, command, datetime.date.today().isoformat(), seconds, mixed)
    (out / "RESULTS.md").write_text(page, encoding="utf-8")


def _all_metrics(item: Any) -> dict[str, dict[str, dict[str, float]]]:
    """task -> metric -> arm -> points, of the tasks with a combined score."""
    import pandas as pd

    frame = pd.read_csv(item.report / "metrics.csv")
    found: dict[str, dict[str, dict[str, float]]] = {}
    for task, part in frame.groupby("task"):
        if "combined_score" in set(part["metric"]):
            for metric, rows in part.groupby("metric"):
                found.setdefault(str(task), {})[str(metric)] = dict(zip(rows["arm"], rows["points"], strict=True))
    return found
