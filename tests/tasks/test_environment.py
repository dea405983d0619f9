"""What must be settled before Prefect is imported, and an embedded run as a user starts it: in a fresh process."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from prefect.settings import PREFECT_API_DATABASE_CONNECTION_URL

from cpdiff_core.config import UserError
from tasks.environment import check_root, disk_fault, memory_fault, prepare

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parent.parent

# Runs in every Python process of the test before anything else: writes down who is spoken to.
SITECUSTOMIZE = """
import os, sys

def hook(event, arguments):
    if event == "socket.connect" and isinstance(arguments[1], tuple):
        host = arguments[1][0]
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        host = arguments[0]
    else:
        return
    with open(os.environ["HOSTS_FILE"], "a") as file:
        file.write(f"{host}\\n")

sys.addaudithook(hook)
"""

EMBEDDED_RUN = """
import os, signal, sys
from pathlib import Path
from tasks.environment import check_root, prepare
from tasks.server import start_server

root = prepare(offline=True)
check_root(root)
server = start_server(root)
print(server.port, flush=True)
from toy_stages import diamond
server.wait(120)
diamond(1, 2)
if "--kill" in sys.argv:
    os.kill(os.getpid(), signal.SIGKILL)
"""


SLOW_SENDER = """
from tasks.environment import prepare

prepare(offline=True)
import asyncio, time
import prefect.main
from prefect.events import Event
from prefect.events.clients import NullEventsClient
from prefect.events.worker import EventsWorker

class Slow(NullEventsClient):
    async def _emit(self, event):
        await asyncio.sleep(0.5)

EventsWorker.set_client_override(Slow)
sender = EventsWorker.instance()
for _ in range(3):
    sender.send(Event(event="tested", resource={"prefect.resource.id": "test"}))
time.sleep(0.2)  # the first is under way when the process ends
"""


def fresh_environment(home: Path, **variables: str) -> dict[str, str]:
    """The environment of a user who has set nothing."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT", "HF_", "DO_NOT"))}
    return kept | {"HOME": str(home), "PYTHONPATH": f"{home}:{PROJECT}:{HERE}"} | variables


def prepared(home: Path, *arguments: str, **variables: str) -> dict[str, str]:
    code = "import json, os, sys; from pathlib import Path; from tasks.environment import prepare; "
    code += f"path = prepare({', '.join(arguments)}); assert 'prefect' not in sys.modules and 'torch' not in sys.modules; "
    code += "print(json.dumps(dict(os.environ) | {'returned': str(path)}))"
    command = [sys.executable, "-c", code]
    environment = fresh_environment(home, **variables)
    done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_prepare_sets_what_is_not_set(tmp_path: Path) -> None:
    found = prepared(tmp_path)
    assert found["returned"] == found["PREFECT_LOCAL_STORAGE_PATH"] == str(tmp_path / ".cpdiff")
    assert (found["PREFECT_SERVER_ANALYTICS_ENABLED"], found["DO_NOT_TRACK"]) == ("false", "1")
    assert "HF_HUB_OFFLINE" not in found


def test_root_on_the_command_line_wins_and_offline_is_offline(tmp_path: Path) -> None:
    found = prepared(tmp_path, "Path('here')", "offline=True", PREFECT_LOCAL_STORAGE_PATH="/elsewhere")
    assert found["returned"] == found["PREFECT_LOCAL_STORAGE_PATH"] == str(tmp_path / "here")
    assert found["HF_HUB_OFFLINE"] == "1"


def test_home_that_cannot_be_written_is_not_needed(tmp_path: Path) -> None:
    assert "PREFECT_HOME" not in prepared(tmp_path)
    (tmp_path / "file").touch()
    for home in ("/proc/nobody", str(tmp_path / "file")):
        assert prepared(tmp_path, "Path('here')", HOME=home)["PREFECT_HOME"] == str(tmp_path / "here" / ".prefect")
        assert prepared(tmp_path, "Path('here')", HOME=home, PREFECT_HOME="/mine")["PREFECT_HOME"] == "/mine"


def test_users_settings_win_wherever_prefect_reads_them(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("PREFECT_LOCAL_STORAGE_PATH=~/mine\nPREFECT_LOGGING_LEVEL=INFO\nHF_HOME=/hub\n")
    (tmp_path / ".prefect").mkdir()
    profile = 'active = "lab"\n[profiles.lab]\nPREFECT_SERVER_LOGGING_LEVEL = "DEBUG"\n'
    (tmp_path / ".prefect" / "profiles.toml").write_text(profile)
    found = prepared(tmp_path, PREFECT_LOGGING_SERVER_LEVEL="ERROR")
    assert found["returned"] == str(tmp_path / "mine")
    assert (found["PREFECT_LOGGING_LEVEL"], found["PREFECT_LOGGING_SERVER_LEVEL"]) == ("INFO", "ERROR")
    assert "PREFECT_SERVER_LOGGING_LEVEL" not in found, "left to the profile"
    assert found["HF_HOME"] == "/hub"


@pytest.mark.parametrize(
    ("running", "chosen", "policy"),
    [("9", {}, "passive"), ("1", {}, None), ("9", {"OMP_WAIT_POLICY": "active"}, "active"), ("9", {"GOMP_SPINCOUNT": "9"}, None)],
)
def test_threads_wait_asleep_where_processors_are_shared(tmp_path: Path, running: str, chosen, policy: str | None) -> None:
    """On 2 processors with others on them, awake ones made the quickstart 13 minutes of 3."""
    (tmp_path / "load").write_text(f"0.0 0.0 0.0 {running}/99 1234\n")
    (tmp_path / "sitecustomize.py").write_text(
        "import os; from pathlib import Path; import tasks.environment as e; e.LOAD_FILE = Path('load'); os.cpu_count = lambda: 4"
    )
    assert prepared(tmp_path, **chosen).get("OMP_WAIT_POLICY") == policy


def test_prepare_too_late_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="before prefect is imported"):
        prepare()


def test_check_root_makes_the_folder_and_leaves_nothing_in_it(tmp_path: Path) -> None:
    check_root(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []


@pytest.mark.parametrize("path", ["{tmp}/file/root", "/proc/cpdiff", "/dev/null"])
def test_root_that_cannot_be_used_is_one_line_with_the_remedy(tmp_path: Path, path: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"^root '.*': cannot be used \(.*\); choose a writable folder with --root"):
        check_root(Path(path.format(tmp=tmp_path)))


def test_root_below_which_names_are_too_long_for_stages_is_told_at_once(tmp_path: Path) -> None:
    path = tmp_path
    while len(str(path)) < 3_790:
        path /= "d" * 95
    check_root(path)
    with pytest.raises(UserError, match=r"cannot be used \(File name too long\)"):
        check_root(path / ("d" * (3_990 - len(str(path)))))


@pytest.mark.parametrize(("inodes", "message"), [(0, "takes no more files.*no inodes"), (9, "the disk is full; free some")])
def test_a_disk_with_space_and_no_inodes_is_told_as_such(
    artifact_root: Path, monkeypatch: pytest.MonkeyPatch, inodes: int, message: str
) -> None:
    sizes = SimpleNamespace(f_files=100, f_favail=inodes, f_bavail=1000)
    monkeypatch.setattr(os, "statvfs", lambda path: sizes)
    assert re.search(message, str(disk_fault(OSError(errno.ENOSPC, "No space left on device"))))


def test_root_with_a_name_that_is_no_text_is_one_line(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    with pytest.raises(UserError, match=r"^root '.*/caf.udce9': its path is no UTF-8 text; rename or move it$"):
        check_root(path)
    assert not path.exists()


def copy_database(home: Path) -> str:
    """A Prefect database as a second run finds it; making one from nothing takes longer than all the rest here."""
    source = str(PREFECT_API_DATABASE_CONNECTION_URL.value()).removeprefix("sqlite+aiosqlite:///")
    with sqlite3.connect(source) as old, sqlite3.connect(home / "prefect.db") as new:
        old.backup(new)
    return f"sqlite+aiosqlite:///{home / 'prefect.db'}"


def listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def test_embedded_run_is_quiet_offline_cached_and_takes_its_server_along(tmp_path: Path, prefect_server: str) -> None:
    (tmp_path / "sitecustomize.py").write_text(SITECUSTOMIZE)
    (tmp_path / "run.py").write_text(EMBEDDED_RUN)
    hosts = tmp_path / "hosts"
    database = copy_database(tmp_path)
    environment = fresh_environment(
        tmp_path, HOSTS_FILE=str(hosts), PREFECT_SERVER_DATABASE_CONNECTION_URL=database, OMP_NUM_THREADS="1"
    )

    def run(*arguments: str) -> tuple[int, int, list[str]]:
        command = [sys.executable, str(tmp_path / "run.py"), *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        lines = [" ".join(line.split()[:-2] if "Completed" in line else line.split()) for line in done.stderr.splitlines()]
        return done.returncode, int(done.stdout), lines

    control = "import socket; client = socket.socket(); client.settimeout(0.01); client.connect_ex(('203.0.113.1', 9))"
    subprocess.run([sys.executable, "-c", control], env=environment, check=True)
    assert hosts.read_text() == "203.0.113.1\n", "an outside connection would be noticed"
    hosts.unlink()

    names = ["number value 1", "number value 2", "double", "add", "double"]
    code, port, lines = run("--kill")
    assert (code, lines) == (-signal.SIGKILL, [f"Completed {name}" for name in names])
    deadline = time.monotonic() + 20
    while listens(port):
        assert time.monotonic() < deadline, "the server outlives a killed run"
        time.sleep(0.1)
    code, _, lines = run()
    assert (code, lines) == (0, [f"Cached {name}" for name in names])
    assert set(hosts.read_text().split()) == {"127.0.0.1"}
    assert (tmp_path / ".cpdiff" / ".server.log").read_text() == ""


def test_env_example_is_what_prepare_does_anyway(tmp_path: Path) -> None:
    load = {"OMP_WAIT_POLICY": "active"}  # left to `prepare`, it depends on who else computes at the moment
    plain = prepared(tmp_path, **load)
    (tmp_path / ".env").write_text((PROJECT / ".env.example").read_text(encoding="utf-8"))
    assert prepared(tmp_path, **load) == plain | {"PREFECT_TASKS_REFRESH_CACHE": "false"}


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({}, False), ({"PREFECT_LOGGING_LEVEL": "WARNING"}, True), ({"PREFECT_LOGGING_LEVEL": "error"}, False),
        ({"PREFECT_LOGGING_LEVEL": "CRITICAL"}, False),
    ],
)  # fmt: skip
def test_events_still_to_be_sent_at_the_end_are_no_ones_concern(tmp_path: Path, variables: dict[str, str], told: bool) -> None:
    """Three slow events are on their way when the process ends: all are waited for, which only those see who asked."""
    command = [sys.executable, "-c", SLOW_SENDER]
    environment = fresh_environment(tmp_path, **variables)
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert ("Still processing items" in done.stderr) == told
    assert told or done.stderr == ""


def test_what_another_user_has_made_for_himself_alone_is_told_with_what_all_must_do(artifact_root: Path) -> None:
    fault = disk_fault(PermissionError(errno.EACCES, "Permission denied", str(artifact_root / "fit_head" / "ab")))
    assert "'fit_head/ab' cannot be used (Permission denied)" in str(fault)
    assert str(fault).endswith("of its group and work with umask 002")
    read_only = disk_fault(OSError(errno.EROFS, "Read-only file system", str(artifact_root / "fit_head" / "ab")))
    assert "cannot be written (Read-only file system)" in str(read_only)


def of_torch(num: int) -> None:
    torch.empty(num, dtype=torch.float64)


def of_numpy(num: int) -> None:
    np.zeros(num)


@pytest.mark.parametrize("allocate", [of_torch, of_numpy])
def test_memory_that_does_not_suffice_is_told_in_a_line_with_what_was_asked_for(allocate: Callable[[int], None]) -> None:
    with pytest.raises((MemoryError, RuntimeError)) as caught:
        allocate(10**17)
    fault = str(memory_fault("stage 'x'", caught.value))
    assert re.match(r"stage 'x': does not fit the memory \([\d.]+ ?\w+ at once\); lower the batch sizes", fault)
    assert "\n" not in fault
    assert memory_fault("stage 'x'", RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
