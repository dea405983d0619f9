"""What is seen of a stage while it runs, and how it is stopped from outside.

While a loop of a stage runs, its losses are appended to `<root>/.live/<stage>/<fingerprint>.csv` and, if
CPDIFF_TENSORBOARD is true, to an event file below `<root>/tensorboard/<stage>/<fingerprint>`; a progress artifact shows
in the Prefect UI how far it is, and once a second the server is asked whether the flow run has been cancelled.
That works wherever the body runs: called directly, in a thread, or in a Dask worker on another host.
"""

from __future__ import annotations

import csv
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.context import FlowRunContext, TaskRunContext

from cpdiff_core.artifacts import Artifact
from cpdiff_core.config import UserError
from cpdiff_core.progress import Cancelled, observed
from tasks.environment import root

TENSORBOARD_VARIABLE = "CPDIFF_TENSORBOARD"
SHOWN_SECONDS = 5.0
SIGNAL_SECONDS = 30.0


def live_losses(artifact: Artifact) -> Path:
    """Where the losses of a running stage are written as they come: seconds, loop, step, of, loss."""
    return root() / ".live" / artifact.stage / f"{artifact.fingerprint}.csv"


def event_folder(artifact: Artifact) -> Path:
    """Where TensorBoard's event file of a stage goes: `tensorboard --logdir <root>/tensorboard` shows all stages."""
    return root() / "tensorboard" / artifact.stage / artifact.fingerprint


@contextmanager
def watched(artifact: Artifact) -> Iterator[None]:
    """Loops inside show their progress as that of `artifact`, and stop when their flow run is cancelled."""
    watch = _Watch(artifact)
    try:
        with awaiting_signal(), observed(watch):
            yield
        watch.ended()
    finally:
        watch.close()


class _Watch:
    """The observer of one stage. Nothing is opened before the first second of a loop has passed."""

    def __init__(self, artifact: Artifact) -> None:
        self._artifact = artifact
        self._losses = _Losses(artifact)
        self._flow_runs = flow_runs()
        self._client: SyncPrefectClient | None = None
        self._shown = time.monotonic()
        self._progress: dict[str, UUID] = {}

    def __call__(self, stage: str, done: int, total: int, loss: float | None) -> bool:
        self._losses.add(stage, done, total, loss)
        if not self._flow_runs:
            return True
        now = time.monotonic()
        with suppress(Exception):  # a server that does not answer for a while must not end the computation
            if now - self._shown >= SHOWN_SECONDS:
                self._shown = now
                self._show(stage, done, total)
            return self._goes_on()
        return True

    def ended(self) -> None:
        """Of a stage that is there nobody asks how far it is, and a run's report would stand among dozens of such."""
        if self._client is not None:
            for identifier in self._progress.values():
                with suppress(Exception):
                    self._client.delete_artifact(identifier)

    def close(self) -> None:
        self._losses.close()
        if self._client is not None:
            self._client.__exit__(None, None, None)

    def _show(self, stage: str, done: int, total: int) -> None:
        percent = 100.0 * done / max(total, 1)
        if stage in self._progress:
            update_progress_artifact(self._progress[stage], progress=percent)
        else:
            made: Any = create_progress_artifact(
                progress=percent,
                key=f"{self._artifact.stage.replace('_', '-')}-{self._artifact.fingerprint}",
                description=f"{stage}; losses as they come: `{self._losses.file}`",
            )
            self._progress[stage] = made

    def _goes_on(self) -> bool:
        if self._client is None:
            self._client = get_client(sync_client=True)
            self._client.__enter__()
        for flow_run in self._flow_runs:
            state = self._client.read_flow_run(flow_run).state
            if state is not None and (state.is_cancelling() or state.is_final()):
                return False
        return True


class _Losses:
    """Writes what a stage's loops report: CSV always, TensorBoard's events of the same numbers if they are asked for."""

    def __init__(self, artifact: Artifact) -> None:
        self.file = live_losses(artifact)
        self._events_in = event_folder(artifact)
        self._event_writer = _event_writer_class()
        self._events: Any = None
        self._start = time.monotonic()

    def add(self, loop: str, step: int, total: int, loss: float | None) -> None:
        seconds = time.monotonic() - self._start
        with suppress(OSError):  # seen, not kept: a full disk is reported by what must be kept
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a", encoding="utf-8", newline="") as file:
                rows = csv.writer(file)
                if file.tell() == 0:
                    rows.writerow(("seconds", "loop", "step", "of", "loss"))
                rows.writerow((f"{seconds:.1f}", loop, step, total, "" if loss is None else loss))
            if self._event_writer is not None and loss is not None:
                if self._events is None:
                    self._events = self._event_writer(str(self._events_in))
                self._events.add_scalar(f"loss/{loop}", loss, step)
                self._events.flush()

    def close(self) -> None:
        if self._events is not None:
            with suppress(OSError):
                self._events.close()


def _event_writer_class() -> Any:
    """TensorBoard's writer, or None where it is not switched on. Raises UserError if it is and is not installed."""
    value = os.environ.get(TENSORBOARD_VARIABLE, "").lower()
    if value in ("", "0", "false"):
        return None
    if value not in ("1", "true"):
        raise UserError(f"{TENSORBOARD_VARIABLE} {value!r}: must be true or false")
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError(f"{TENSORBOARD_VARIABLE} {value!r}: needs another package; pip install 'cpdiff[tensorboard]'") from error
    return SummaryWriter


@contextmanager
def awaiting_signal() -> Iterator[None]:
    """A process worker sends SIGTERM to the flow run's process, and only the
    run that ends by it is Cancelled for Prefect; so the main thread waits for it, with its state saved and no work."""
    try:
        yield
    except Cancelled:
        if threading.current_thread() is threading.main_thread() and "PREFECT__FLOW_RUN_ID" in os.environ:
            time.sleep(SIGNAL_SECONDS)
        raise


_watched_too: ContextVar[frozenset[UUID]] = ContextVar("watched_too", default=frozenset())


@contextmanager
def watching_too(flow_runs: frozenset[UUID]) -> Iterator[None]:
    """Loops inside stop as well when one of these flow runs is cancelled: those around the flow that sent the work."""
    token = _watched_too.set(flow_runs)
    try:
        yield
    finally:
        _watched_too.reset(token)


def flow_runs() -> set[UUID]:
    """The flow run around, and the one that a worker started this process for."""
    found = set(_watched_too.get())
    if (task := TaskRunContext.get()) is not None and task.task_run.flow_run_id is not None:
        found.add(task.task_run.flow_run_id)
    if (flow := FlowRunContext.get()) is not None and flow.flow_run is not None:
        found.add(flow.flow_run.id)
    with suppress(KeyError, ValueError):
        found.add(UUID(os.environ["PREFECT__FLOW_RUN_ID"]))
    return found
