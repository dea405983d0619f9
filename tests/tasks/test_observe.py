"""Runs that are watched and cancelled through the server, as from the UI."""

from __future__ import annotations

import csv
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
from prefect.states import Cancelling
from toy_stages import load, logged, march, march_in_flow, run_march

from cpdiff_core.config import RuntimeConfig, UserError
from tasks import observe
from tasks.observe import live_losses
from tasks.stage import is_done, resume_state

STEPS = 250


def wait_for(condition: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.05)


@pytest.mark.parametrize("submitted", [False, True], ids=["direct", "submitted"])
def test_cancelled_run_stops_in_seconds_and_goes_on_where_it_stopped(artifact_root: Path, start, submitted: bool) -> None:
    process = start(run_march, STEPS, submitted)
    wait_for(lambda: "march from 0" in logged(artifact_root))
    identifier = re.search(r"flow run (\S+)", "\n".join(logged(artifact_root)))
    assert identifier is not None
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(identifier[1], Cancelling(), force=True)
    process.join(15)
    assert process.exitcode not in (0, None)
    assert not is_done(march.artifact(STEPS))

    state = resume_state(march.artifact(STEPS), RuntimeConfig()).load()
    assert state is not None
    assert 0 < state[1]["step"] < STEPS
    with live_losses(march.artifact(STEPS)).open() as file:
        losses = {int(row["step"]): float(row["loss"]) for row in csv.DictReader(file)}
    assert losses
    assert all(loss == 1.0 / step for step, loss in losses.items())

    march_in_flow(STEPS, submitted)
    assert load(march.artifact(STEPS)) == float(STEPS)
    assert f"march from {state[1]['step']}" in logged(artifact_root)


def test_progress_is_an_artifact_in_the_ui_until_the_stage_is_there(
    artifact_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(observe, "SHOWN_SECONDS", 0.2)
    key = f"march-{march.artifact(STEPS).fingerprint}"
    with ThreadPoolExecutor(1) as pool, get_client(sync_client=True) as client:

        def shown() -> list[tuple[str | None, float]]:
            found = client.read_artifacts(artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=[key])))
            return [(item.type, float(str(item.data))) for item in found]

        running = pool.submit(copy_context().run, march_in_flow, STEPS, False)  # with this test's root
        wait_for(lambda: shown() or running.done())
        ((kind, percent),) = shown()
        assert kind == "progress"
        assert 0.0 < percent < 100.0
        running.result()
        assert shown() == []


def test_tensorboard_reads_the_losses_of_the_csv_file(artifact_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing import event_accumulator as events

    monkeypatch.setenv(observe.TENSORBOARD_VARIABLE, "true")
    march_in_flow(STEPS // 2, False)
    artifact = march.artifact(STEPS // 2)
    read = events.EventAccumulator(str(artifact_root / "tensorboard" / "march" / artifact.fingerprint)).Reload()
    assert read.Tags()["scalars"] == ["loss/march"]
    shown = [(event.step, event.value) for event in read.Scalars("loss/march")]
    with live_losses(artifact).open() as file:
        written = [(int(row["step"]), float(row["loss"])) for row in csv.DictReader(file)]
    assert shown
    assert shown == [(step, pytest.approx(loss)) for step, loss in written]


def test_tensorboard_is_off_by_default_and_a_wrong_value_is_named(
    artifact_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(observe.TENSORBOARD_VARIABLE, raising=False)
    march_in_flow(STEPS // 3, False)
    assert live_losses(march.artifact(STEPS // 3)).is_file()
    assert not (artifact_root / "tensorboard").exists()
    monkeypatch.setenv(observe.TENSORBOARD_VARIABLE, "maybe")
    with pytest.raises(UserError, match=r"CPDIFF_TENSORBOARD 'maybe': must be true or false"):
        march_in_flow(1, False)
