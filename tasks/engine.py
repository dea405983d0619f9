"""Many machines: independent calls of a flow on the workers of a Dask cluster, if it has one.

CPDIFF_DASK names it: `tcp://scheduler:8786`, or `local:2` for two processes of this machine. Workers need the package,
the same data, the resource GPU (`dask worker tcp://... --resources GPU=1`, one per GPU with its CUDA_VISIBLE_DEVICES),
and either the same root or CPDIFF_REMOTE and a root of their own (PREFECT_LOCAL_STORAGE_PATH). Without the setting the
same flow computes in its own process: `each` is the one place where the two ways differ.
"""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

import torch
from prefect.context import FlowRunContext, hydrated_context, serialize_context
from prefect.results import ResultStore
from prefect.settings import PREFECT_LOCAL_STORAGE_PATH, temporary_settings

from cpdiff_core.config import UserError, first_line
from cpdiff_core.progress import Cancelled
from tasks import remote
from tasks.environment import nested, own_root, root
from tasks.observe import awaiting_signal, flow_runs, watching_too
from tasks.report import add, call_ended, tally

VARIABLE = "CPDIFF_DASK"
RESOURCE = "GPU"
PATIENCE_SECONDS = 60.0
"""How long calls may wait while the cluster has no worker: one that was killed is started anew in seconds."""

_POLL_SECONDS = 0.1
_ASK_SECONDS = 5.0

R = TypeVar("R")


def with_engine(flow: Any, default: str | None = None) -> Any:
    """The Prefect flow `flow` on the cluster that CPDIFF_DASK (or else `default`) names, or as it is."""
    value = os.environ.get(VARIABLE) or default
    if not value:
        return flow
    try:
        from prefect_dask import DaskTaskRunner
    except ImportError as error:
        raise UserError(f"{VARIABLE} {value!r}: needs another package; pip install 'cpdiff[dask]'") from error
    logging.getLogger("distributed").setLevel(logging.ERROR)  # it tells of every connection
    logging.getLogger("distributed.client").setLevel(logging.CRITICAL)  # of a lost one by a traceback; we tell it in a line
    if value.startswith("local:"):
        if not (number := value.removeprefix("local:")).isdigit() or int(number) < 1:
            raise UserError(f"{VARIABLE} {value!r}: must be local:<number of processes> or a scheduler's address")
        # Loopback only: an engine's messages are pickles, for the user's own processes.
        os.environ.setdefault("DASK_LOGGING__DISTRIBUTED", "error")  # for the processes, which write to our stderr
        cluster = {"n_workers": int(number), "threads_per_worker": 1, "resources": {RESOURCE: 1}, "host": "127.0.0.1"}
        return flow.with_options(task_runner=DaskTaskRunner(cluster_kwargs={**cluster, "dashboard_address": None}))
    return flow.with_options(task_runner=DaskTaskRunner(address=value))


def part_of_a_flow(flow: Any) -> Any:
    """What to call inside a flow in place of `flow`: its body, so that stages and artifacts stand on the page of the run
    that somebody has started; with a cluster the flow, as a run of its own that has the cluster."""
    found = with_engine(flow)
    return flow.fn if found is flow else found


def has_workers() -> bool:
    """Whether `each` would send its calls elsewhere. False on a worker: its own calls run where it is, since the GPU
    that they would wait for is the one that it holds itself."""
    context = FlowRunContext.get()
    return context is not None and type(context.task_runner).__name__ == "DaskTaskRunner" and not context.detached


def each(name: str, function: Callable[..., R], calls: Sequence[tuple[Any, ...]]) -> list[R]:
    """function(*call) for each of `calls`, in order: on the workers of the flow's cluster, one at a time per GPU, or
    here, one after another. `function` must be of a module; what it returns should name artifacts, not hold tensors.

    A worker that dies is no fault: another takes its call, and goes on from the state that it left below the root.
    Raises UserError if the cluster cannot be reached or has had no worker for a minute, and whatever `function` raises.
    """
    if not has_workers():
        return [function(*call) for call in calls]
    if not calls:
        return []
    client = _client()
    # No Prefect task around the call: its transaction would keep the locks and records of all stages inside to its end.
    context = serialize_context()
    with _sender() as sender:
        futures = [
            client.submit(_on_worker, context, sender, function, call, pure=False, resources={RESOURCE: 1}) for call in calls
        ]
        try:
            with awaiting_signal():
                return _results(name, futures, client)
        finally:
            client.cancel(futures)  # those that have not begun, if one has failed


def _client() -> Any:
    """The flow's connection to its cluster, which has workers."""
    context = FlowRunContext.get()
    assert context is not None
    runner: Any = context.task_runner
    try:
        client = runner.client
        client.wait_for_workers(1, timeout=PATIENCE_SECONDS)
        num = _num_workers(client)
    except (OSError, ValueError) as error:  # no scheduler answers, or the address is none
        where = f"{VARIABLE} {runner.address or 'local'!r}"
        raise UserError(f"{where}: {first_line(error)}; start the scheduler and its workers") from error
    if num == 0:
        raise UserError(
            f"{VARIABLE} {runner.address!r}: no worker has the resource {RESOURCE}; start them with --resources {RESOURCE}=1"
        )
    return client


def _num_workers(client: Any) -> int:
    workers = client.scheduler_info(n_workers=-1)["workers"].values()
    return sum(worker.get("resources", {}).get(RESOURCE, 0) >= 1 for worker in workers)


def _results(name: str, futures: Sequence[Any], client: Any) -> list[Any]:
    """What the calls return, as soon as all have ended or one has failed."""
    import distributed

    results: dict[int, Any] = {}
    asked = seen = time.monotonic()
    while len(results) < len(futures):
        time.sleep(_POLL_SECONDS)
        try:
            for i, future in enumerate(futures):
                if i not in results and future.done():
                    done: _Done = future.result()
                    if done.cancelled is not None:
                        raise Cancelled(done.cancelled)
                    results[i] = done.result
                    add(done.stages)
                    call_ended(name, len(results), len(futures))
            if time.monotonic() - asked >= _ASK_SECONDS:
                asked = time.monotonic()
                seen = asked if _num_workers(client) else seen
        except (distributed.KilledWorker, distributed.CancelledError, OSError) as error:
            killed = isinstance(error, distributed.KilledWorker)
            reason = "a call killed one worker after another" if killed else "the connection to the scheduler is lost"
            raise UserError(f"{VARIABLE}: {name}: {reason}; {_GO_ON}") from error
        if asked - seen > PATIENCE_SECONDS:
            raise UserError(f"{VARIABLE}: {name}: no worker has been there for {PATIENCE_SECONDS:.0f} s; {_GO_ON}")
    return [results[i] for i in range(len(futures))]


_GO_ON = "look at the logs of the workers and run again: finished stages are kept"


@dataclass(frozen=True)
class _Sender:
    """What a worker must know of the flow's process. own_root, nested: as in `tasks.environment`; token: a file that lies
    in the flow's root while it waits; threads: of torch, which may change last bits on a CPU."""

    root: Path
    own_root: Path | None
    nested: Path
    token: str
    remote: str | None
    flow_runs: frozenset[UUID]
    threads: int


@contextmanager
def _sender() -> Iterator[_Sender]:
    (root() / ".locks").mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=root() / ".locks", prefix="flow-") as token:
        yield _Sender(
            root(), own_root(), nested(), Path(token.name).name, os.environ.get(remote.VARIABLE), frozenset(flow_runs()),
            torch.get_num_threads(),
        )  # fmt: skip


@dataclass(frozen=True)
class _Done:
    """How a call ended. stages: how many in it were computed, or cached; cancelled: the message of `Cancelled`, which as
    it is would end the loops of Dask."""

    result: Any
    stages: dict[str, int]
    cancelled: str | None = None


def _on_worker(context: dict[str, Any], sender: _Sender, function: Callable[..., Any], call: tuple[Any, ...]) -> _Done:
    """The call, on a worker, as a part of the flow run."""
    _take_gpu()
    torch.set_num_threads(sender.threads)
    before = tally()
    result, cancelled = None, None
    with hydrated_context(context), _worker_root(sender), watching_too(sender.flow_runs):
        try:
            result = function(*call)
        except Cancelled as stop:
            cancelled = str(stop)
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()  # workers may share a GPU
    return _Done(result, {name: count - before[name] for name, count in tally().items()}, cancelled)


def _take_gpu() -> None:
    """A worker of `local:<n>` takes the GPU of its number; others are started with their CUDA_VISIBLE_DEVICES."""
    from distributed import get_worker

    name = get_worker().name
    if isinstance(name, int) and "CUDA_VISIBLE_DEVICES" not in os.environ and (num := torch.cuda.device_count()) > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(name % num)


@contextmanager
def _worker_root(sender: _Sender) -> Iterator[None]:
    """The flow's root, or the worker's own (then nested as the flow's is), checked to be one where the two can meet."""
    url = os.environ.get(remote.VARIABLE)
    if url != sender.remote:
        raise UserError(f"{remote.VARIABLE}: is {url!r} on a worker and {sender.remote!r} in the flow; set both alike")
    own = own_root()
    path = sender.root if own is None or own == sender.own_root else own / sender.nested
    if url is None and not (path / ".locks" / sender.token).exists():
        raise UserError(
            f"root {str(path)!r}: a worker sees another folder there than the flow's {str(sender.root)!r}; share one folder "
            f"among all, or set {remote.VARIABLE}"
        )
    context = FlowRunContext.get()
    assert context is not None
    # Prefect has brought the flow's settings and its place for records here.
    with temporary_settings({PREFECT_LOCAL_STORAGE_PATH: path}), context.model_copy(update={"result_store": ResultStore()}):
        yield
