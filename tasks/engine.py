"""Many machines: the passes of a fan-out on the workers of a Dask cluster, if the flow has one.

CPDIFF_DASK names it: `tcp://scheduler:8786`, or `local:2` for two processes of this machine. Workers need the package,
the same data and the same root (or CPDIFF_REMOTE), and the resource GPU: `dask worker tcp://... --resources GPU=1`,
one per GPU with its CUDA_VISIBLE_DEVICES. Without the setting the same flow computes in its own process.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from prefect import Flow, task
from prefect.cache_policies import NO_CACHE
from prefect.context import FlowRunContext

from cpdiff_core.config import UserError

VARIABLE = "CPDIFF_DASK"


def with_engine(flow: Flow[..., Any]) -> Flow[..., Any]:
    """`flow` on the cluster that CPDIFF_DASK names, or as it is."""
    value = os.environ.get(VARIABLE)
    if not value:
        return flow
    try:
        from prefect_dask import DaskTaskRunner
    except ImportError as error:
        raise UserError(f"{VARIABLE} {value!r}: needs another package; pip install 'cpdiff[dask]'") from error
    if value.startswith("local:"):
        if not (number := value.removeprefix("local:")).isdigit() or int(number) < 1:
            raise UserError(f"{VARIABLE} {value!r}: must be local:<number of processes> or a scheduler's address")
        # Loopback only: an engine's messages are pickles, for the user's own processes.
        cluster = {"n_workers": int(number), "threads_per_worker": 1, "resources": {"GPU": 1}, "host": "127.0.0.1"}
        return flow.with_options(task_runner=DaskTaskRunner(cluster_kwargs={**cluster, "dashboard_address": None}))  # type: ignore[arg-type]
    return flow.with_options(task_runner=DaskTaskRunner(address=value))  # type: ignore[arg-type]


def num_workers() -> int:
    """Workers of the Dask cluster of the flow around; 0 if it has none."""
    context = FlowRunContext.get()
    if context is None or type(context.task_runner).__name__ != "DaskTaskRunner":
        return 0
    return len(context.task_runner.client.scheduler_info(n_workers=-1)["workers"])  # type: ignore[attr-defined]


def run_all(name: str, function: Callable[..., None], calls: Sequence[tuple[Any, ...]]) -> None:
    """Call `function` with each of `calls` on the workers of the flow's Dask cluster, one at a time per GPU."""
    import dask

    submitted = task(name=name, cache_policy=NO_CACHE, persist_result=False)(function)
    with dask.annotate(resources={"GPU": 1}):
        futures = [submitted.submit(*call) for call in calls]
    for future in futures:
        future.result()
