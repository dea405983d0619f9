"""The same flow with and without a Dask cluster, whose workers are real processes."""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.runtime import flow_run
from prefect.settings import PREFECT_LOCAL_STORAGE_PATH, temporary_settings
from prefect.states import Cancelling

pytest.importorskip("prefect_dask", reason="pip install 'cpdiff[dask]'")
from toy_stages import (
    Number,
    load,
    logged,
    march,
    number,
    run_below,
    run_on,
    run_on_nobody,
    run_worker,
    spread,
)

from cpdiff_core.artifacts import Artifact
from cpdiff_core.config import RuntimeConfig, UserError
from tasks.engine import VARIABLE, part_of_a_flow, with_engine
from tasks.groups import Member, passes_of
from tasks.stage import folder, is_done, resume_state

CALLS = [[1, 2], [3, 4], [5]]


def manifests() -> list[bytes]:
    artifacts = [number.artifact(Number(value=value)) for values in CALLS for value in values]
    assert all(map(is_done, artifacts))
    return [(folder(artifact) / "manifest.json").read_bytes() for artifact in artifacts]


def outcome(path: Path) -> Any:
    """What the last flow of `run_on` returned."""
    last = logged(path)[-1]
    assert last.startswith("returned "), last
    return json.loads(last.removeprefix("returned "))


def wait_for(condition: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.05)


def test_results_on_a_cluster_are_those_without_one(artifact_root: Path, scheduler: str, start, tmp_path: Path) -> None:
    workers = {start(run_worker, scheduler, {}).pid for _ in range(2)}
    start(run_on, scheduler, "spread", CALLS).join(60)
    where = outcome(artifact_root)
    assert [len(values) for values in where] == [2, 2, 1], "in the order of the calls"
    assert {pid for values in where for pid in values} <= workers
    assert all(len(set(values)) == 1 for values in where), "a worker makes the calls of a call itself"
    assert sorted(logged(artifact_root)[:-1]) == [f"number {value}" for value in range(1, 6)]
    on_dask = manifests()
    with temporary_settings({PREFECT_LOCAL_STORAGE_PATH: tmp_path / "plain"}):
        assert with_engine(spread)(CALLS) == [[os.getpid()] * len(values) for values in CALLS]
        assert manifests() == on_dask


def test_part_of_a_flow_is_no_run_of_its_own_unless_it_has_a_cluster(
    artifact_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @flow(persist_result=False)
    def part() -> str:
        return str(flow_run.id)

    @flow(persist_result=False)
    def started() -> list[str]:
        return [str(flow_run.id), part_of_a_flow(part)()]

    whole, of_the_part = started()
    assert of_the_part == whole
    monkeypatch.setenv(VARIABLE, "local:1")
    assert type(part_of_a_flow(part).task_runner).__name__ == "DaskTaskRunner"


def test_local_cluster_has_as_many_processes_as_it_says(artifact_root: Path, start) -> None:
    process = start(run_on, "local:2", "spread", CALLS)
    process.join(240)
    where = {pid for values in outcome(artifact_root) for pid in values}
    assert process.pid not in where
    assert 1 <= len(where) <= 2
    assert len(manifests()) == 5


def test_killed_worker_is_replaced_by_another_that_goes_on(artifact_root: Path, scheduler: str, start) -> None:
    steps = 200
    workers = [start(run_worker, scheduler, {}) for _ in range(2)]
    flow = start(run_on, scheduler, "march_apart", steps)
    state = resume_state(march.artifact(steps), RuntimeConfig())
    wait_for(lambda: (state.numbers() or {}).get("step", 0) > 20)
    (line,) = (line for line in logged(artifact_root) if line.startswith("marching in process"))
    (busy,) = (worker for worker in workers if worker.pid == int(line.split()[-1]))
    busy.kill()
    busy.join()
    flow.join(60)
    (other,) = (worker for worker in workers if worker is not busy)
    assert outcome(artifact_root) == other.pid
    assert load(march.artifact(steps)) == float(steps)
    starts = [int(line.split()[-1]) for line in logged(artifact_root) if line.startswith("march from")]
    assert len(starts) == 2
    assert starts[0] == 0
    assert 20 < starts[1] < steps, "from the state that the killed one left"
    assert not state.folder.exists()


def test_cancelled_run_stops_on_the_worker_and_leaves_its_state(artifact_root: Path, scheduler: str, start) -> None:
    steps = 5000
    start(run_worker, scheduler, {})
    process = start(run_below, scheduler, steps)
    state = resume_state(march.artifact(steps), RuntimeConfig())
    wait_for(lambda: (state.numbers() or {}).get("step", 0) > 20)
    identifier = re.search(r"outer flow run (\S+)", "\n".join(logged(artifact_root)))
    assert identifier is not None
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(identifier[1], Cancelling(), force=True)
    time.sleep(4.0)
    assert process.is_alive(), "it waits for the signal by which Prefect tells a cancelled run from a crashed one"
    numbers = state.numbers()
    assert numbers is not None
    time.sleep(1.0)
    assert state.numbers() == numbers, "nobody computes any more"
    process.terminate()
    process.join(20)
    assert process.exitcode not in (0, None)
    assert not is_done(march.artifact(steps))


def _error(path: Path) -> str:
    last = logged(path)[-1]
    assert last.startswith("error: "), last
    return last.removeprefix("error: ")


def test_fault_on_a_worker_is_the_users_line(artifact_root: Path, scheduler: str, start) -> None:
    start(run_worker, scheduler, {})
    start(run_on, scheduler, "fail_apart", "rank=0: must be at least 1; choose another").join(60)
    assert _error(artifact_root) == "rank=0: must be at least 1; choose another"


def test_scheduler_that_is_not_there_is_one_line(artifact_root: Path, start) -> None:
    start(run_on_nobody, "tcp://127.0.0.1:9").join(60)
    assert re.match(r"CPDIFF_DASK 'tcp://127.0.0.1:9': .*; start the scheduler and its workers$", _error(artifact_root))


def test_dask_tells_of_no_lost_connection_by_a_traceback_which_the_flow_tells_in_a_line() -> None:
    with_engine(spread, "tcp://127.0.0.1:9")
    assert not logging.getLogger("distributed.client").isEnabledFor(logging.ERROR)


@pytest.mark.parametrize(
    ("environment", "line"),
    [
        ({"PREFECT_LOCAL_STORAGE_PATH": "elsewhere"}, r"root '.*elsewhere': a worker sees another folder .*CPDIFF_REMOTE$"),
        ({"CPDIFF_REMOTE": "s3://bucket/root"}, r"CPDIFF_REMOTE: is 's3://bucket/root' on a worker and None in the flow;"),
    ],
)
def test_worker_that_could_not_share_is_refused(
    artifact_root: Path, scheduler: str, start, environment: dict[str, str], line: str
) -> None:
    start(run_worker, scheduler, environment)
    start(run_on, scheduler, "spread", CALLS).join(60)
    assert re.match(line, _error(artifact_root))
    assert not list(artifact_root.glob("number/*"))


@pytest.mark.parametrize("value", ["local:", "local:0", "local:two"])
def test_setting_that_cannot_work_is_refused(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv(VARIABLE, value)
    with pytest.raises(UserError, match="must be local:<number of processes>"):
        with_engine(spread)


@pytest.mark.parametrize(("num", "most", "sizes"), [(6, 16, [6]), (18, 16, [9, 9]), (33, 16, [11, 11, 11]), (5, 2, [2, 2, 1])])
def test_passes_follow_from_the_list_of_runs(num: int, most: int, sizes: list[int]) -> None:
    members = [
        Member(Artifact(stage="harvest", fingerprint=str(i)), f"run {i}", i, key) for i in range(num) for key in ("r1", "r4")
    ]
    passes = passes_of(members, most)
    assert [len(group) for group in passes] == sizes * 2
    assert sorted((m.work, m.key) for group in passes for m in group) == sorted((m.work, m.key) for m in members)
    assert all(len({member.key for member in group}) == 1 for group in passes)
