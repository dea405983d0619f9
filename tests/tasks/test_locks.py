from __future__ import annotations

import contextvars
import copy
import threading
import time
from pathlib import Path

import pytest
from prefect.locking.protocol import LockManager
from toy_stages import hold_and_fork, hold_and_log, logged

from cpdiff_core.config import UserError
from tasks.locks import FlockManager, hold

KEY = "number/0123/result.json"


def wait_for(condition, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.02)


def test_flock_manager_has_every_method_prefect_calls() -> None:
    assert isinstance(FlockManager(), LockManager)


def test_lock_has_one_holder_at_a_time_in_one_process(artifact_root: Path) -> None:
    first, second = FlockManager(), FlockManager()
    assert first.acquire_lock(KEY, "a")
    assert first.acquire_lock(KEY, "a"), "asking again is no fault"
    assert not first.acquire_lock(KEY, "b", acquire_timeout=0)
    assert not second.acquire_lock(KEY, "b", acquire_timeout=0)
    assert second.is_locked(KEY)
    assert not second.is_lock_holder(KEY, "a")
    assert not second.wait_for_lock(KEY, timeout=0.2)
    with pytest.raises(ValueError, match="does not hold"):
        second.release_lock(KEY, "a")
    first.release_lock(KEY, "a")
    assert second.wait_for_lock(KEY, timeout=0)
    assert second.acquire_lock(KEY, "b", acquire_timeout=0)


def test_manager_sent_elsewhere_holds_nothing(artifact_root: Path) -> None:
    manager = FlockManager()
    manager.acquire_lock(KEY, "a")
    sent = copy.copy(manager)  # by __reduce__, as pickling for a worker elsewhere does
    assert not sent.is_lock_holder(KEY, "a")
    assert sent.is_locked(KEY)


def test_hold_and_the_manager_exclude_each_other(artifact_root: Path) -> None:
    manager = FlockManager()
    with hold([KEY, "number/4567/result.json"]):
        taken = []
        settings = contextvars.copy_context()  # which Prefect's task threads get too; the root is one of them
        thread = threading.Thread(target=lambda: taken.append(settings.run(manager.acquire_lock, KEY, "b", acquire_timeout=0)))
        thread.start()
        thread.join()
        assert taken == [False]
    assert manager.acquire_lock(KEY, "b", acquire_timeout=0)
    with pytest.raises(TimeoutError, match=KEY), hold(["a/1/result.json", KEY], timeout=0.2):
        pass
    assert not manager.is_locked("a/1/result.json"), "what was taken before the timeout is free again"


def test_stage_of_a_held_key_in_the_same_thread_is_an_error_and_no_deadlock(artifact_root: Path) -> None:
    with hold([KEY]), pytest.raises(RuntimeError, match="held by this thread"):
        FlockManager().acquire_lock(KEY, "a")


def test_crossed_holds_of_two_processes_neither_overlap_nor_block(artifact_root: Path, start) -> None:
    keys = ["x/1/result.json", "y/1/result.json"]
    processes = [start(hold_and_log, keys, 5, 0.01), start(hold_and_log, keys[::-1], 5, 0.01)]
    for process in processes:
        process.join(20)
        assert process.exitcode == 0
    lines = [line.split() for line in logged(artifact_root)]
    assert len(lines) == 20
    for (enter, pid), (leave, same) in zip(lines[::2], lines[1::2], strict=True):
        assert (enter, leave, pid) == ("enter", "leave", same)


def test_lock_is_free_when_its_holder_is_killed_even_if_a_forked_child_lives(artifact_root: Path, start) -> None:
    process = start(hold_and_fork, KEY)
    wait_for(lambda: "forked" in logged(artifact_root))
    manager = FlockManager()
    assert manager.is_locked(KEY)
    process.kill()
    process.join()
    assert manager.acquire_lock(KEY, "a", acquire_timeout=5)


def test_lock_in_an_unwritable_root_is_a_users_fault(artifact_root: Path) -> None:
    artifact_root.write_text("a file where the root should be")
    with pytest.raises(UserError, match=r"cannot be written.*--root"):
        FlockManager().acquire_lock(KEY, "a")


def test_hold_waits_for_its_first_key_in_order_before_it_takes_another(artifact_root: Path) -> None:
    outcome = []

    def want_both() -> None:
        with pytest.raises(TimeoutError), hold(["y/1/result.json", "x/1/result.json"], timeout=0.5):
            pass
        outcome.append("gave up")

    with hold(["x/1/result.json"]):
        settings = contextvars.copy_context()
        thread = threading.Thread(target=lambda: settings.run(want_both))
        thread.start()
        while thread.is_alive():
            assert not FlockManager().is_locked("y/1/result.json")
            time.sleep(0.01)
    assert outcome == ["gave up"]
