"""The same flow with and without a Dask cluster."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_LOCAL_STORAGE_PATH, temporary_settings
from prefect.states import Cancelling
from toy_stages import Number, logged, march, number, run_march_on_dask, run_spread_on_dask, spread

from cpdiff_core.config import RuntimeConfig, UserError
from tasks.engine import VARIABLE, with_engine
from tasks.stage import folder, is_done, resume_state

pytest.importorskip("prefect_dask", reason="pip install 'cpdiff[dask]'")
CALLS = [[1, 2], [3, 4], [5]]


def manifests() -> list[bytes]:
    artifacts = [number.artifact(Number(value=value)) for values in CALLS for value in values]
    assert all(map(is_done, artifacts))
    return [(folder(artifact) / "manifest.json").read_bytes() for artifact in artifacts]


def test_results_on_a_cluster_are_those_without_one(artifact_root: Path, start, tmp_path: Path) -> None:
    process = start(run_spread_on_dask, CALLS)
    process.join(240)
    assert process.exitcode == 0
    assert logged(artifact_root)[-1] == "2 workers"
    assert sorted(logged(artifact_root)[:-1]) == [f"number {value}" for value in range(1, 6)]
    on_dask = manifests()
    with temporary_settings({PREFECT_LOCAL_STORAGE_PATH: tmp_path / "plain"}):
        assert with_engine(spread)(CALLS) == 0
        assert manifests() == on_dask


def test_cancelled_run_stops_on_the_worker_and_leaves_its_state(artifact_root: Path, start) -> None:
    steps = 2000
    process = start(run_march_on_dask, steps)
    deadline = time.monotonic() + 180
    while "march from 0" not in logged(artifact_root):
        assert time.monotonic() < deadline
        assert process.is_alive()
        time.sleep(0.1)
    identifier = re.search(r"flow run (\S+)", "\n".join(logged(artifact_root)))
    assert identifier is not None
    cancelled = time.monotonic()
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(identifier[1], Cancelling(), force=True)
    while (state := resume_state(march.artifact(steps), RuntimeConfig()).load()) is None:
        assert time.monotonic() < cancelled + 20
        time.sleep(0.1)
    process.terminate()  # as a process worker does; the worker of the cluster, which no signal reaches, has stopped
    process.join(60)
    assert process.exitcode not in (0, None)
    assert 0 < state[1]["step"] < steps


@pytest.mark.parametrize("value", ["local:", "local:0", "local:two"])
def test_setting_that_cannot_work_is_refused(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv(VARIABLE, value)
    with pytest.raises(UserError, match="must be local:<number of processes>"):
        with_engine(spread)
