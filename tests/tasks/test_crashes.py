"""The cache rule across processes: kills at the worst moments, and races."""

from __future__ import annotations

import random
import signal
import time
from itertools import pairwise
from pathlib import Path

import pytest
from toy_stages import (
    STEPS,
    Number,
    load,
    logged,
    many_files,
    number,
    replace_dying_at_every_step,
    run_number,
    run_slow,
    run_walk,
    slow,
    walk,
)

from cpdiff_core.artifacts import verify
from cpdiff_core.config import RuntimeConfig
from tasks.stage import clean, folder, is_done, resume_state

ONE = Number(value=1)


def finished(process) -> int:
    process.join(60)
    return process.exitcode


def wait_for(condition, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.01)


def test_what_one_process_computed_another_takes_from_the_cache(artifact_root: Path, start) -> None:
    assert finished(start(run_number, 1)) == 0
    assert finished(start(run_number, 1)) == 0
    assert load(number(ONE)) == 1.0
    assert logged(artifact_root) == ["number 1"]


@pytest.mark.parametrize("point", ["in-body", "before-record"])
def test_kill_before_the_record_is_no_hit_and_blocks_nobody(artifact_root: Path, start, point: str) -> None:
    artifact_root.mkdir()
    (artifact_root / f"die-{point}").touch()
    assert finished(start(run_number, 1)) == -signal.SIGKILL
    assert folder(number.artifact(ONE)).exists() == (point == "before-record")
    assert not is_done(number.artifact(ONE))

    (artifact_root / f"die-{point}").unlink()
    assert load(number(ONE)) == 1.0
    assert logged(artifact_root) == ["number 1", "number 1"]
    assert is_done(number.artifact(ONE))
    assert verify(folder(number.artifact(ONE))) == []
    assert len(clean(artifact_root, older_than_seconds=-1)) == (point == "in-body"), "the killed one's scratch folder"


def test_kills_while_the_resume_state_is_written_lose_little_and_nothing_is_wrong(artifact_root: Path, start) -> None:
    random.seed(0)
    runtime = RuntimeConfig()
    artifact = walk.artifact(STEPS, runtime=runtime)
    state_file = resume_state(artifact, runtime).folder / "state.safetensors"
    for kill in range(2):
        process = start(run_walk)
        wait_for(lambda kill=kill: len(logged(artifact_root)) == kill + 1 and state_file.exists())
        time.sleep(random.uniform(0.05, 0.15))
        process.kill()
        assert finished(process) == -signal.SIGKILL
        assert not is_done(artifact)
    assert load(walk(STEPS, runtime=runtime)) == float(STEPS)
    begun_at = [int(line.removeprefix("walk from ")) for line in logged(artifact_root)]
    assert len(begun_at) == 3
    assert begun_at[0] == 0
    assert all(earlier < later for earlier, later in pairwise(begun_at)), begun_at
    assert not state_file.parent.exists()


def test_kill_at_any_step_of_replacing_an_artifact_leaves_a_whole_hit_or_none(artifact_root: Path, start) -> None:
    many_files(3)
    assert finished(start(replace_dying_at_every_step)) == 0
    outcomes = logged(artifact_root)
    assert len(outcomes) > 20, "scratch folder, files, manifest, two renames, clearing away"
    assert set(outcomes) == {"hit whole", "none whole", "none broken"}, "a hit is never broken"
    assert (outcomes[0], outcomes[-1]) == ("hit whole", "none whole"), "the record is Prefect's to write"


def test_two_processes_that_race_compute_once(artifact_root: Path, start) -> None:
    processes = [start(run_slow, 0.5) for _ in range(2)]
    assert [finished(process) for process in processes] == [0, 0]
    assert logged(artifact_root) == ["slow begins", "slow ends", "had 0.5", "had 0.5"]


def test_waiting_process_takes_over_when_the_computing_one_is_killed(artifact_root: Path, start) -> None:
    first = start(run_slow, 1.5)
    wait_for(lambda: logged(artifact_root) == ["slow begins"])
    second = start(run_slow, 1.5)
    time.sleep(0.3)
    first.kill()
    assert finished(second) == 0
    assert logged(artifact_root) == ["slow begins", "slow begins", "slow ends", "had 1.5"]
    assert is_done(slow.artifact(1.5))
